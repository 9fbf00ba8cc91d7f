"""Which rows form the tiles of a launch: computed in XLA, read by kernels."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class TileSchedule(NamedTuple):
  """The row tiles of one launch, in ascending order of rows.

  Attributes:
    expert_ids: expert of each tile.
    first_rows: grouped row at which each tile starts.
    num_rows: rows of each tile, 1 to block_m; 0 past the last tile.
    num_tiles: tiles in use, at most the static length M.
  """

  expert_ids: Int[Array, " M"]
  first_rows: Int[Array, " M"]
  num_rows: Int[Array, " M"]
  num_tiles: Int[Array, ""]


class WindowSchedule(NamedTuple):
  """Tiles as windows of block_m rows, of which some may be another expert's.

  Attributes:
    expert_ids: expert of each window; E for rows of no group.
    first_rows: grouped row at which each window starts, a multiple of `align`.
    begins: rows at the window's start that belong to an earlier expert.
    ends: where the expert's rows end in the window, at most block_m.
    num_tiles: windows in use, at most the static length M.
  """

  expert_ids: Int[Array, " M"]
  first_rows: Int[Array, " M"]
  begins: Int[Array, " M"]
  ends: Int[Array, " M"]
  num_tiles: Int[Array, ""]


def max_tiles(num_rows: int, num_groups: int, block_m: int) -> int:
  """Returns the most tiles that `num_rows` in `num_groups` can need.

  Every group but the first can add one short tile, and no tile is empty.
  """
  return min(num_rows, -(-num_rows // block_m) + num_groups - 1)


def max_windows(
  num_rows: int, num_groups: int, block_m: int, align: int = 1
) -> int:
  """Returns the most windows that `window_schedule` can need.

  Aligning can lengthen each group, and the rows of none, by align - 1 rows.
  """
  num_groups += 1
  return max_tiles(num_rows + num_groups * (align - 1), num_groups, block_m)


def tile_schedule(
  group_sizes: Int[Array, " E"], num_rows: int, block_m: int
) -> TileSchedule:
  """Returns tiles of at most `block_m` rows, none across two experts.

    rows  +--------+          One tile is one expert's rows only. A group whose
     e=0  | tile 0 |          end falls inside a block costs one short tile, so
     e=0  | tile 1 | short    there are at most cdiv(S, block_m) + E - 1 tiles.
     e=2  | tile 2 |          An empty group costs none.

  Args:
    group_sizes: rows of each expert.
    num_rows: S, at least the sum of `group_sizes`.
    block_m: the most rows of a tile.

  Example:
    >>> tile_schedule(jnp.array([5, 0, 3]), 8, 4).num_rows.tolist()
    [4, 1, 3, 0]
  """
  length = max_tiles(num_rows, group_sizes.shape[0], block_m)
  windows = _windows(group_sizes, length, block_m, align=1)
  return TileSchedule(
    windows.expert_ids, windows.first_rows, windows.ends, windows.num_tiles
  )


def window_schedule(
  group_sizes: Int[Array, " E"], num_rows: int, block_m: int, align: int = 1
) -> WindowSchedule:
  """Returns windows over all rows; those of no group form a last group, E.

  A copy of a tiled operand by TMA starts at a multiple of 8 rows, and a group
  anywhere. So a group's first window starts at the multiple below, and what
  it holds of the group before is computed and not stored.

    row     0       8       16      24       align = 8, block_m = 16,
    expert  0 0 0 0 0 1 1 1 1 1 1 1 1 1 1 1  groups end at rows 5 and 16
            |---- window 0: [0, 5) ---|
            |---- window 1: [5, 16) --|

  Args:
    group_sizes: rows of each expert.
    num_rows: S.
    block_m: rows of a window, a multiple of `align`.
    align: what the start of a window is a multiple of.

  Example:
    >>> windows = window_schedule(jnp.array([5, 3]), 10, 8, align=4)
    >>> windows.first_rows[:4].tolist(), windows.begins[:4].tolist()
    ([0, 4, 8, 0], [0, 1, 0, 0])
  """
  length = max_windows(num_rows, group_sizes.shape[0], block_m, align)
  group_sizes = _with_ungrouped(group_sizes, num_rows)
  return _windows(group_sizes, length, block_m, align)


def window_of_rows(
  expert_ids: Int[Array, " S"],
  group_sizes: Int[Array, " E"],
  block_m: int,
  align: int = 1,
) -> tuple[Int[Array, " S"], Int[Array, " S"]]:
  """Returns the window that holds each grouped row, and its place in there.

  Args:
    expert_ids: expert of each grouped row, ascending; E for none.
    group_sizes: as given to `window_schedule`, like the rest.
    block_m: rows of a window.
    align: what the start of a window is a multiple of.
  """
  num_rows = expert_ids.shape[0]
  groups = _groups(_with_ungrouped(group_sizes, num_rows), block_m, align)
  places = jnp.arange(num_rows, dtype=jnp.int32) - groups.aligned[expert_ids]
  first_tiles = (groups.tile_ends - groups.tiles)[expert_ids]
  return first_tiles + places // block_m, places % block_m


class _Groups(NamedTuple):
  starts: Int[Array, " G"]
  ends: Int[Array, " G"]
  aligned: Int[Array, " G"]
  tiles: Int[Array, " G"]
  tile_ends: Int[Array, " G"]


def _groups(group_sizes: Int[Array, " G"], block_m: int, align: int) -> _Groups:
  ends = _running_sum(group_sizes)
  starts = ends - group_sizes
  aligned = starts - starts % jnp.int32(align)
  tiles = jnp.where(group_sizes > 0, -(-(ends - aligned) // block_m), 0)
  return _Groups(starts, ends, aligned, tiles, _running_sum(tiles))


def _running_sum(sizes: Int[Array, " G"]) -> Int[Array, " G"]:
  # G * G masked sums: on a GPU one small kernel, where a cumsum is several.
  groups = jnp.arange(sizes.shape[0], dtype=jnp.int32)
  upto = groups[None, :] <= groups[:, None]
  return jnp.sum(jnp.where(upto, sizes[None, :], 0), axis=1, dtype=jnp.int32)


def _with_ungrouped(
  group_sizes: Int[Array, " E"], num_rows: int
) -> Int[Array, " E+1"]:
  # Otherwise XLA counts each group's rows once more for the sum below.
  group_sizes = lax.optimization_barrier(group_sizes.astype(jnp.int32))
  ungrouped = jnp.int32(num_rows) - jnp.sum(group_sizes, dtype=jnp.int32)
  return jnp.concatenate([group_sizes, ungrouped[None]])


def _windows(
  group_sizes: Int[Array, " G"], length: int, block_m: int, align: int
) -> WindowSchedule:
  groups = _groups(group_sizes, block_m, align)
  tiles = jnp.arange(length, dtype=jnp.int32)
  # Comparing with every group's end beats a binary search on a GPU, and masked
  # sums beat gathers: one fused kernel of length * E comparisons.
  is_past = tiles[:, None] >= groups.tile_ends[None, :]
  first_tiles = groups.tile_ends - groups.tiles
  is_in = ~is_past & (tiles[:, None] >= first_tiles[None, :])

  def of_group(values):
    masked = jnp.where(is_in, values[None, :], 0)
    return jnp.sum(masked, axis=1, dtype=jnp.int32)

  group = jnp.sum(is_past, axis=1, dtype=jnp.int32)
  place = (tiles - of_group(first_tiles)) * block_m
  in_use = tiles < groups.tile_ends[-1]
  first_rows = jnp.where(in_use, of_group(groups.aligned) + place, 0)

  def clip(row):
    rows = jnp.where(in_use, jnp.clip(row - first_rows, 0, block_m), 0)
    return rows.astype(jnp.int32)

  return WindowSchedule(
    expert_ids=jnp.minimum(group, group_sizes.shape[0] - 1),
    first_rows=first_rows.astype(jnp.int32),
    begins=clip(of_group(groups.starts)),
    ends=clip(of_group(groups.ends)),
    num_tiles=groups.tile_ends[-1],
  )
