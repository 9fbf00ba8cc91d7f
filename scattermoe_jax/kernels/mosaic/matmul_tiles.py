"""How a grouped matmul is cut: the plan of a launch, and one of its tiles."""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array

from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.schedule import max_windows

# Warpgroups that multiply; each holds its part of a tile's rows.
CONSUMERS = 2
# Tiles start at multiples of 8 rows, as TMA asks of rows that it copies for the
# tensor core or the epilogue. All products do, so that they share one schedule.
ALIGN = 8


class Tile(NamedTuple):
  """What a consumer's epilogue knows about the tile in its registers.

  Attributes:
    expert: its expert; E for rows of no group.
    row: grouped row of its first row, in this consumer's part.
    begin: first row of the part that is to be stored.
    end: row after the last that is to be stored.
    index_m: which tile of rows.
    index_n: which tile of columns.
    part: the part's first row in the tile.
    consumer: which of the two consumers holds it.
  """

  expert: Array
  row: Array
  begin: Array
  end: Array
  index_m: Array
  index_n: Array
  part: Array
  consumer: Array


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything about a launch that is known when it is traced.

  Attributes:
    num_rows: S.
    num_experts: E.
    d_in: contraction, a multiple of 64.
    d_out: columns of w that are multiplied, a multiple of 64.
    dtype: of the operands and the stored results.
    config: the blocks.
    grouped_in: whether rows of x are grouped (TMA) or gathered (cp.async).
    transpose_w: whether w is (E, d_out, d_in).
    halves: 2 if a tile takes half of its columns from each half of w, so that
      gate and up of the same column meet in one thread; else 1.
  """

  num_rows: int
  num_experts: int
  d_in: int
  d_out: int
  dtype: Any
  config: TileConfig
  grouped_in: bool = False
  transpose_w: bool = False
  halves: int = 1

  @property
  def part_m(self) -> int:
    """Rows of a tile that one consumer holds."""
    return self.config.block_m // CONSUMERS

  @property
  def num_windows(self) -> int:
    """The most tiles of rows."""
    return max_windows(
      self.num_rows, self.num_experts, self.config.block_m, ALIGN
    )

  @property
  def part_n(self) -> int:
    """Columns of a tile in one half of w."""
    return self.config.block_n // self.halves

  @property
  def num_tiles_n(self) -> int:
    """Tiles of columns."""
    return lt.cdiv(self.d_out // self.halves, self.part_n)
