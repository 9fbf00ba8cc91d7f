"""All that the kernel of a weight gradient depends on, while it is traced."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.mosaic.choice_sums import SumPlan, plan_sum
from scattermoe_jax.kernels.mosaic.warpgroup_ops import ROWS
from scattermoe_jax.kernels.tuning import xty_is_transposed
from scattermoe_jax.routing import Routing

BLOCK_LEFT = 128
MULTIPLIERS = 2  # warpgroups that multiply
LEFT_EACH = BLOCK_LEFT // MULTIPLIERS  # columns of left of each
# Rows below which a part is all start and end.
LEAST_ROWS = 1024


class Side(NamedTuple):
  """One operand.

  Attributes:
    width: its columns.
    block: its columns of a tile.
    gathered: whether its rows are scattered.
    fan_out: scattered ids that name the same row, if it is gathered.
    by_tma: whether its rows come by TMA.
    shared: whether the blocks of a cluster load its rows together.
  """

  width: int
  block: int
  gathered: bool
  fan_out: int
  by_tma: bool
  shared: bool = False


class Plan(NamedTuple):
  """All that the kernel depends on: equal plans are one compilation.

  Attributes:
    left: the operand whose columns are cut in blocks of 128.
    right: the other.
    transposed: whether left is y.
    num_experts: E.
    dtype: of both operands and of the result.
    config: the tiles.
    most_cuts: how many more parts there may be than groups.
    part_rows: rows of a tile that are a block's fair share.
    sum_plan: what some blocks sum before they multiply; None if nothing.
  """

  left: Side
  right: Side
  transposed: bool
  num_experts: int
  dtype: jnp.dtype
  config: TileConfig
  most_cuts: int
  part_rows: int
  sum_plan: SumPlan | None = None

  @property
  def num_slices(self) -> int:
    """Launches that share the parts.

    Launch i has those of rank i, i + num_slices, and so on.
    """
    return 1 if self.sum_plan is None else self.sum_plan.num_slices

  @property
  def cluster(self) -> int:
    """Blocks that draw together, tiles of the same columns of right."""
    return 2 if self.right.shared else 1

  @property
  def num_parts(self) -> int:
    """The most parts of all groups together, of one launch."""
    return pl.cdiv(self.num_experts + self.most_cuts, self.num_slices)

  @property
  def per_part(self) -> int:
    """Tiles of a part."""
    return self.tiles_left * self.tiles_right

  @property
  def aligned(self) -> int:
    """What the first row of a tile is a multiple of."""
    # TMA reads tiles of 8 rows.
    return 8 if self.left.by_tma or self.right.by_tma else 1

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
    """The most tiles of all parts."""
    return self.num_parts * self.per_part

  @property
  def ring_shares(self) -> tuple[int, int]:
    """Bytes of the rings that are a warpgroup's own until operands come.

    The loader has all of left's, each multiplier its part of right's.
    """
    left, right = (
      self.config.num_stages * ROWS * side.block * self.dtype.itemsize
      for side in (self.left, self.right)
    )
    return left, right // MULTIPLIERS

  def with_sum(self, rows, routing: Routing, num_slices: int = 1) -> "Plan":
    """Returns this plan, with sums of k rows beside it if that pays.

    Args:
      rows: what is summed beside one launch.
      routing: the routing.
      num_slices: launches.
    """
    # One launch does not wait for another's parts of a group.
    if num_slices > 1 and self.most_cuts:
      return self
    products = routing.num_rows * self.left.width * self.right.width
    sum_plan = plan_sum(
      rows,
      routing.top_k,
      num_slices,
      products=products // num_slices,
      num_tiles=self.num_experts * self.per_part // num_slices,
      num_blocks=self.config.num_sms,
      warpgroups=MULTIPLIERS + 1,
      ring_bytes=min(self.ring_shares),
    )
    return self._replace(sum_plan=sum_plan)

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
  transposed = xty_is_transposed(
    (config.block_m, config.block_n), y_side.gathered and not x_side.gathered
  )
  part_rows = _part_rows(x_side, y_side, routing.num_rows, config.num_sms)
  most_cuts = 0
  # Choices of one token differ: an expert has at most a row of each.
  if part_rows < routing.num_tokens:
    # Each cut takes more than 7/8 of `part_rows`, and the first of a group as
    # much again.
    most_cuts = (routing.num_rows - 1) // part_rows
  left, right = (y_side, x_side) if transposed else (x_side, y_side)
  in_pairs = pl.cdiv(left.width, left.block) % 2 == config.num_sms % 2 == 0
  return Plan(
    left=left,
    right=right._replace(shared=right.by_tma and in_pairs),
    transposed=transposed,
    num_experts=routing.num_experts,
    dtype=x.dtype,
    config=config,
    most_cuts=most_cuts,
    part_rows=part_rows,
  )


def _part_rows(x: Side, y: Side, num_rows: int, num_sms: int) -> int:
  """Returns the rows of a tile that would be a block's fair share of all."""
  tiles = pl.cdiv(x.width, x.block) * pl.cdiv(y.width, y.block)
  fair = pl.cdiv(num_rows * tiles, num_sms)
  return max(pl.cdiv(fair, ROWS) * ROWS, LEAST_ROWS)


def _side(operand, grouped: bool, block: int, num_rows: int) -> Side:
  rows, width = operand.shape
  # TMA reads tiles of 8 rows by 64 columns, and wants whole ones.
  by_tma = grouped and num_rows % 8 == 0 and width % 64 == 0
  return Side(width, block, not grouped, num_rows // rows, by_tma)
