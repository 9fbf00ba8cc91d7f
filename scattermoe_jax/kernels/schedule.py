"""Which rows form the tiles of a launch: computed in XLA, read by kernels."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from scattermoe_jax.routing import take_rows


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
    group_windows: windows up to the end of each group, E + 1 of them.
  """

  expert_ids: Int[Array, " M"]
  first_rows: Int[Array, " M"]
  begins: Int[Array, " M"]
  ends: Int[Array, " M"]
  group_windows: Int[Array, " groups"]

  @property
  def num_tiles(self) -> Int[Array, ""]:
    """Windows in use, at most the static length M."""
    return self.group_windows[-1]


def max_tiles(num_rows: int, num_groups: int, block_m: int) -> int:
  """Returns the most tiles that `num_rows` in `num_groups` can need.

  Every group but the first can add one short tile, and no tile is empty.
  """
  return min(num_rows, -(-num_rows // block_m) + num_groups - 1)


def max_windows(
  num_rows: int,
  num_groups: int,
  block_m: int,
  align: int = 1,
  multiple: int = 1,
) -> int:
  """Returns the most windows that `window_schedule` can need.

  Aligning can lengthen each group, and the rows of none, by align - 1 rows.
  """
  num_groups += 1
  most = max_tiles(num_rows + num_groups * (align - 1), num_groups, block_m)
  # Some are added after those of the groups, and some after those of no group.
  return -(-(most + multiple - 1) // multiple) * multiple


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
  num_groups = group_sizes.shape[0]
  length = max_tiles(num_rows, num_groups, block_m)
  groups = _groups(group_sizes, num_rows, block_m, 1, num_groups)
  windows = _windows(groups, length, block_m)
  return TileSchedule(
    windows.expert_ids, windows.first_rows, windows.ends, windows.num_tiles
  )


def window_schedule(
  group_sizes: Int[Array, " E"],
  num_rows: int,
  block_m: int,
  align: int = 1,
  multiple: int = 1,
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
    multiple: what the number of windows of the groups is a multiple of: the
      last group with rows has windows without rows up to that, which start at
      row 0, where they begin and end.

  Example:
    >>> windows = window_schedule(jnp.array([5, 3]), 10, 8, align=4)
    >>> windows.first_rows[:4].tolist(), windows.begins[:4].tolist()
    ([0, 4, 8, 0], [0, 1, 0, 0])
  """
  num_experts = group_sizes.shape[0]
  length = max_windows(num_rows, num_experts, block_m, align, multiple)
  groups = _groups(
    group_sizes, num_rows, block_m, align, num_experts + 1, multiple
  )
  return _windows(groups, length, block_m)


def places_in_windows(
  expert_ids: Int[Array, " S"],
  group_sizes: Int[Array, " E"],
  block_m: int,
  align: int = 1,
  multiple: int = 1,
) -> Int[Array, " S"]:
  """Returns the place of each grouped row, counting all rows of all windows.

  Args:
    expert_ids: expert of each grouped row, ascending; E for none.
    group_sizes: as given to `window_schedule`, like the rest.
    block_m: rows of a window.
    align: what the start of a window is a multiple of.
    multiple: what the number of windows of the groups is a multiple of.
  """
  num_rows = expert_ids.shape[0]
  num_groups = group_sizes.shape[0] + 1
  groups = _groups(group_sizes, num_rows, block_m, align, num_groups, multiple)
  before = groups.first_tiles * block_m - groups.aligned
  return jnp.arange(num_rows, dtype=jnp.int32) + take_rows(before, expert_ids)


def sum_where(
  mask: Bool[Array, "A B"], values: Int[Array, " B"]
) -> Int[Array, " A"]:
  """Returns the sum of values[b] over all b where mask[a, b], for each a.

  On a GPU one small kernel, where a cumulative sum is several.
  """
  return jnp.sum(jnp.where(mask, values[None, :], 0), axis=1, dtype=jnp.int32)


class _Groups(NamedTuple):
  starts: Int[Array, " G"]
  ends: Int[Array, " G"]
  aligned: Int[Array, " G"]
  first_tiles: Int[Array, " G"]
  tile_ends: Int[Array, " G"]


def _groups(
  group_sizes: Int[Array, " E"],
  num_rows: int,
  block_m: int,
  align: int,
  num_groups: int,
  multiple: int = 1,
) -> _Groups:
  """Returns where groups lie; the rows of none are group E, if counted."""
  # Barriers, or XLA would count once more in every kernel that reads a count.
  groups = jnp.arange(num_groups, dtype=jnp.int32)
  experts = jnp.arange(group_sizes.shape[0], dtype=jnp.int32)[None, :]
  sizes = group_sizes.astype(jnp.int32)
  starts, ends = lax.optimization_barrier(
    (
      sum_where(experts < groups[:, None], sizes),
      sum_where(experts <= groups[:, None], sizes),
    )
  )
  ends = jnp.where(groups == group_sizes.shape[0], jnp.int32(num_rows), ends)
  aligned = starts - starts % jnp.int32(align)
  tiles = jnp.where(ends > starts, -(-(ends - aligned) // block_m), 0)
  if multiple > 1:
    num_experts = group_sizes.shape[0]
    # The last group with rows; of the groups after it none has a tile.
    is_last = (tiles > 0) & (ends == ends[num_experts - 1])
    more = -jnp.sum(tiles[:num_experts], dtype=jnp.int32) % jnp.int32(multiple)
    tiles += jnp.where(is_last, more, 0)
  tile_ends = lax.optimization_barrier(
    sum_where(groups[None, :] <= groups[:, None], tiles)
  )
  return _Groups(starts, ends, aligned, tile_ends - tiles, tile_ends)


def _windows(groups: _Groups, length: int, block_m: int) -> WindowSchedule:
  tiles = jnp.arange(length, dtype=jnp.int32)
  # Comparing with every group's end beats a binary search on a GPU.
  is_past = tiles[:, None] >= groups.tile_ends[None, :]
  group = lax.optimization_barrier(jnp.sum(is_past, axis=1, dtype=jnp.int32))
  num_groups = groups.ends.shape[0]
  in_use = group < num_groups
  group = jnp.minimum(group, num_groups - 1)
  place = (tiles - groups.first_tiles[group]) * block_m
  first_rows = groups.aligned[group] + place
  in_use &= groups.ends[group] > first_rows
  first_rows = jnp.where(in_use, first_rows, 0)

  def clip(row):
    rows = jnp.where(in_use, jnp.clip(row - first_rows, 0, block_m), 0)
    return rows.astype(jnp.int32)

  return WindowSchedule(
    expert_ids=group,
    first_rows=first_rows.astype(jnp.int32),
    begins=clip(groups.starts[group]),
    ends=clip(groups.ends[group]),
    group_windows=groups.tile_ends,
  )
