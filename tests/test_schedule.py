"""Tiles cover every routed row once, and none crosses two experts."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from scattermoe_jax.kernels.schedule import (
  max_tiles,
  places_in_windows,
  tile_schedule,
  window_schedule,
)


@functools.partial(jax.jit, static_argnums=(1, 2))
def schedule(group_sizes, num_rows, block_m):
  return tile_schedule(group_sizes, num_rows, block_m)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def windows_of(group_sizes, expert_of_row, block_m, align, multiple):
  """The windows, and (window, place) of each row."""
  cut = (block_m, align, multiple)
  windows = window_schedule(group_sizes, expert_of_row.shape[0], *cut)
  places = places_in_windows(expert_of_row, group_sizes, *cut)
  return windows, jnp.divmod(places, block_m)


GROUP_SIZES = st.lists(st.integers(0, 20), min_size=6, max_size=6)


@hypothesis.given(st.sampled_from([1, 8, 128]), GROUP_SIZES)
def test_tiles_cover_every_row_once(block_m, group_sizes):
  num_rows = 120
  tiles = schedule(jnp.array(group_sizes, jnp.int32), num_rows, block_m)
  ends = np.cumsum(group_sizes)
  covered = []
  for i in range(int(tiles.num_tiles)):
    expert, first = int(tiles.expert_ids[i]), int(tiles.first_rows[i])
    rows = int(tiles.num_rows[i])
    assert 1 <= rows <= block_m
    assert ends[expert] - group_sizes[expert] <= first
    assert first + rows <= ends[expert]
    covered.extend(range(first, first + rows))
  assert covered == list(range(sum(group_sizes)))
  assert int(tiles.num_tiles) <= max_tiles(num_rows, 6, block_m)
  assert tiles.num_rows[int(tiles.num_tiles) :].tolist() == [0] * (
    tiles.num_rows.shape[0] - int(tiles.num_tiles)
  )


def test_the_most_tiles_are_reached_by_short_groups():
  # 16 rows in 4 groups, blocks of 4: 1 + 1 + 1 + 13 rows need 3 + 4 tiles.
  tiles = schedule(jnp.array([1, 1, 1, 13], jnp.int32), 16, 4)
  assert int(tiles.num_tiles) == max_tiles(16, 4, 4) == 7
  assert max_tiles(3, 100, 4) == 3


@hypothesis.given(
  st.sampled_from([(8, 1), (8, 8), (16, 8)]), st.integers(1, 3), GROUP_SIZES
)
def test_windows_cover_every_row_once_and_start_aligned(
  blocks, multiple, group_sizes
):
  num_rows, (block_m, align) = 120, blocks
  # Rows of no group are the group after the last.
  sizes = [*group_sizes, num_rows - sum(group_sizes)]
  expert_of_row = np.repeat(np.arange(7, dtype=np.int32), sizes)
  windows, (window, place) = windows_of(
    jnp.array(group_sizes, jnp.int32), expert_of_row, block_m, align, multiple
  )
  covered = []
  num_tiles, length = int(windows.num_tiles), windows.first_rows.shape[0]
  assert num_tiles <= length and length % multiple == 0
  assert windows.group_windows[-2] % multiple == 0
  for i in range(num_tiles):
    first = int(windows.first_rows[i])
    assert first % align == 0
    begin, end = int(windows.begins[i]), int(windows.ends[i])
    if first == begin == end == 0:
      of_groups = int(windows.group_windows[-2])
      assert of_groups - multiple < i < of_groups and group_sizes != [0] * 6
      assert not np.any(windows.ends[i:of_groups])
      assert windows.expert_ids[i] == windows.expert_ids[i - 1] < 6
      continue
    assert 0 <= begin < end <= block_m
    rows = range(first + begin, first + end)
    assert set(expert_of_row[rows]) == {int(windows.expert_ids[i])}
    covered.extend(rows)
    np.testing.assert_array_equal(np.asarray(window)[rows], i)
    np.testing.assert_array_equal(np.asarray(place)[rows] + first, rows)
  assert covered == list(range(num_rows))
  for unused in (windows.first_rows, windows.begins, windows.ends):
    assert not np.any(unused[num_tiles:])


def test_windows_added_after_the_groups_leave_room_for_rows_of_none():
  # A window of three rows, one added to make two, and one of a row of none.
  windows = window_schedule(jnp.array([3], jnp.int32), 4, 8, multiple=2)
  assert int(windows.num_tiles) == 3
  assert windows.first_rows.tolist() == [0, 0, 3, 0]
  assert windows.ends.tolist() == [3, 0, 1, 0]
