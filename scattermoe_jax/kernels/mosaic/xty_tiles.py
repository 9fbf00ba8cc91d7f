"""The tiles of a weight gradient: which there are, and in which order.

A tile is `left.block` columns of one operand by `right.block` of the other, of
one expert. Left is the side of 128 columns.

  tiles of an expert      right ->          Blocks at work at one time read
                       0  1 | 6  7          few rows and columns between them
                left   2  3 | 8  9          when their tiles form a square:
                       4  5 | 10 11         bands of `band_n` tiles (here 2).
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.mosaic.warpgroup_ops import ROWS
from scattermoe_jax.kernels.schedule import sum_where
from scattermoe_jax.routing import Routing

BLOCK_LEFT = 128


class Side(NamedTuple):
  """One operand.

  Attributes:
    width: its columns.
    block: its columns of a tile.
    gathered: whether its rows are scattered.
    fan_out: scattered ids that name the same row, if it is gathered.
    by_tma: whether its rows come by TMA.
  """

  width: int
  block: int
  gathered: bool
  fan_out: int
  by_tma: bool


class Plan(NamedTuple):
  """All that the kernel depends on: equal plans are one compilation."""

  left: Side
  right: Side
  transposed: bool
  num_experts: int
  dtype: jnp.dtype
  config: TileConfig

  @property
  def tiles_left(self) -> int:
    """Tiles of an expert, counted along left."""
    return pl.cdiv(self.left.width, self.left.block)

  @property
  def tiles_right(self) -> int:
    """Tiles of an expert, counted along right."""
    return pl.cdiv(self.right.width, self.right.block)

  @property
  def num_tiles(self) -> int:
    """Tiles of all experts."""
    return self.num_experts * self.tiles_left * self.tiles_right

  @property
  def lag(self) -> int:
    """Steps between issuing a cp.async and announcing its arrival.

    Waiting for older copies only keeps newer ones in flight. More than stages
    less two would wait for a slot whose release waits for this announcement.
    """
    if self.left.by_tma and self.right.by_tma:
      return 0
    return min(1, self.config.num_stages - 2)


def make_plan(
  x, y, routing: Routing, x_grouped: bool, y_grouped: bool, config: TileConfig
) -> Plan:
  """Returns the plan of x^T y: which operand is left, and how each comes."""
  x_side = _side(x, x_grouped, config.block_m, routing.num_rows)
  y_side = _side(y, y_grouped, config.block_n, routing.num_rows)
  transposed = _is_transposed(x_side, y_side)
  return Plan(
    left=y_side if transposed else x_side,
    right=x_side if transposed else y_side,
    transposed=transposed,
    num_experts=routing.num_experts,
    dtype=x.dtype,
    config=config,
  )


def _side(operand, grouped: bool, block: int, num_rows: int) -> Side:
  rows, width = operand.shape
  # TMA reads tiles of 8 rows by 64 columns, and wants whole ones.
  by_tma = grouped and num_rows % 8 == 0 and width % 64 == 0
  return Side(width, block, not grouped, num_rows // rows, by_tma)


def _is_transposed(x: Side, y: Side) -> bool:
  if x.block == y.block:
    return y.gathered and not x.gathered
  return y.block == BLOCK_LEFT and x.block != BLOCK_LEFT


def ordered_groups(routing: Routing) -> tuple[Array, Array, Array]:
  """Returns (expert, first row, end) of each group, the largest group first.

  Long tiles first leave short ones to fill the end of the launch, and the
  loader counts on those without rows to be the last. Ranked and counted by
  comparing all with all: two small kernels, where a sort and a cumulative sum
  are several.
  """
  sizes = routing.group_sizes
  experts = jnp.arange(sizes.shape[0], dtype=jnp.int32)
  is_earlier = experts[None, :] < experts[:, None]
  is_longer = (sizes[None, :] > sizes[:, None]) | (
    (sizes[None, :] == sizes[:, None]) & is_earlier
  )
  # Without the barrier XLA would count once more for every pick.
  rank, first = lax.optimization_barrier(
    (jnp.sum(is_longer, axis=1, dtype=jnp.int32), sum_where(is_earlier, sizes))
  )
  pick = functools.partial(sum_where, rank[None, :] == experts[:, None])
  return pick(experts), pick(first), pick(first + sizes)


class Tile(NamedTuple):
  """One tile, as scalars in a kernel.

  Attributes:
    number: its number; at least `Plan.num_tiles` if there are no more.
    expert: its expert.
    left_col: its first column of left.
    right_col: its first column of right.
    first: first row of the expert.
    end: row after the expert's last.
    start: first row of the first step: `first`, or the multiple of 8 below.
    num_steps: steps of 64 rows.
  """

  number: Int[Array, ""]
  expert: Int[Array, ""]
  left_col: Int[Array, ""]
  right_col: Int[Array, ""]
  first: Int[Array, ""]
  end: Int[Array, ""]
  start: Int[Array, ""]
  num_steps: Int[Array, ""]


def tile_at(plan: Plan, groups, index) -> Tile:
  """Returns the tile of that number, of groups ordered as `ordered_groups`."""
  experts, firsts, ends = groups
  per_expert = plan.tiles_left * plan.tiles_right
  group = jnp.minimum(index // per_expert, plan.num_experts - 1)
  within = lax.rem(index, per_expert)
  band = plan.config.band_n or plan.tiles_right
  band_start = within // (plan.tiles_left * band) * band
  band_width = jnp.minimum(band, plan.tiles_right - band_start)
  place = within - plan.tiles_left * band_start
  first, end = firsts[group], ends[group]
  start = first
  if plan.left.by_tma or plan.right.by_tma:
    start = first // 8 * 8
  num_steps = (end - start + (ROWS - 1)) // ROWS
  return Tile(
    index,
    experts[group],
    place // band_width * plan.left.block,
    (band_start + lax.rem(place, band_width)) * plan.right.block,
    first,
    end,
    start,
    jnp.where(end > first, num_steps, 0),
  )


def columns(plan: Plan, t: Tile):
  """Returns the tile's first columns of left and of right."""
  # Said where it is used: a loop's carry forgets what divides it.
  return (
    pl.multiple_of(t.left_col, plan.left.block),
    pl.multiple_of(t.right_col, plan.right.block),
  )
