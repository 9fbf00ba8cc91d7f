"""Tiles cover every routed row once, and none crosses two experts."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from scattermoe_jax.kernels.schedule import max_tiles, tile_schedule


@functools.partial(jax.jit, static_argnums=(1, 2))
def schedule(group_sizes, num_rows, block_m):
  return tile_schedule(group_sizes, num_rows, block_m)


@hypothesis.given(
  st.sampled_from([1, 8, 128]),
  st.lists(st.integers(0, 20), min_size=6, max_size=6),
)
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
