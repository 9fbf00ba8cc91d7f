"""Which rows form the tiles of a launch: computed in XLA, read by kernels."""

from typing import NamedTuple

import jax.numpy as jnp
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


def max_tiles(num_rows: int, num_groups: int, block_m: int) -> int:
  """Returns the most tiles that `num_rows` in `num_groups` can need.

  Every group but the first can add one short tile, and no tile is empty.
  """
  return min(num_rows, -(-num_rows // block_m) + num_groups - 1)


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
  group_ends = jnp.cumsum(group_sizes).astype(jnp.int32)
  tiles_per_group = -(-group_sizes // block_m)
  tile_ends = jnp.cumsum(tiles_per_group).astype(jnp.int32)
  tiles = jnp.arange(length, dtype=jnp.int32)
  # Comparing with every group's end beats a binary search on a GPU: one fused
  # kernel of length * E comparisons.
  expert_ids = jnp.sum(
    tiles[:, None] >= tile_ends[None, :], axis=1, dtype=jnp.int32
  )
  expert_ids = jnp.minimum(expert_ids, group_sizes.shape[0] - 1)
  first_tile = (tile_ends - tiles_per_group)[expert_ids]
  group_start = (group_ends - group_sizes)[expert_ids]
  first_rows = group_start + (tiles - first_tile) * jnp.int32(block_m)
  rows_left = group_ends[expert_ids] - first_rows
  return TileSchedule(
    expert_ids=expert_ids,
    first_rows=first_rows.astype(jnp.int32),
    num_rows=jnp.clip(rows_left, 0, block_m).astype(jnp.int32),
    num_tiles=tile_ends[-1],
  )
