"""How a grouped matmul is cut: a launch, a block's tiles, and one of them."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.schedule import WindowSchedule, max_windows

# Warpgroups that multiply; each holds its part of a tile's rows.
CONSUMERS = 2
# Tiles start at multiples of 8 rows, as TMA asks of rows that it copies for the
# tensor core or the epilogue. All products do, so that they share one schedule.
ALIGN = 8
# From so many bytes of an expert's columns on, blocks load in pairs. In six
# layers no product above lost by it, and none below gained.
_LARGE_BYTES = 4 * 2**20


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


class Entry(NamedTuple):
  """A tile's row of the schedule, as a kernel loads it.

  Nothing is computed from it in the turn in which it is loaded: the thread
  would wait for memory.

  Attributes:
    expert: its expert; E for rows of no group.
    first: its first row.
    begin: rows of it that come before the expert's.
    end: row after the expert's last, counted in the tile.
    top_expert: that of the first tile of the cluster.
    bottom_expert: that of its last.
  """

  expert: Array
  first: Array
  begin: Array
  end: Array
  top_expert: Array
  bottom_expert: Array

  @property
  def is_shared(self) -> Array:
    """Whether all blocks of the cluster multiply by the same matrix."""
    return self.top_expert == self.bottom_expert


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
  def steps(self) -> int:
    """Steps of contraction of a tile."""
    return self.d_in // self.config.block_k

  @property
  def part_m(self) -> int:
    """Rows of a tile that one consumer holds."""
    return self.config.block_m // CONSUMERS

  @property
  def num_windows(self) -> int:
    """The most tiles of rows."""
    return max_windows(self.num_rows, self.num_experts, *self.windows)

  @property
  def windows(self) -> tuple[int, int, int]:
    """How tiles of rows are cut: block_m, align, multiple of `schedule`."""
    return self.config.block_m, ALIGN, self.cluster

  @property
  def cluster(self) -> int:
    """Blocks that load an expert's matrix together, each a share of it.

    They multiply tiles one below the other: for the most part of one expert, if
    experts have rows for two tiles. Small matrices stay in L2 anyway, and
    blocks that wait for each other lose.
    """
    rows = self.num_rows / self.num_experts
    num_bytes = self.d_in * self.d_out * jnp.dtype(self.dtype).itemsize
    pays = num_bytes >= _LARGE_BYTES and rows >= 2 * self.config.block_m
    return 2 if pays and self.config.num_sms % 2 == 0 else 1

  @property
  def part_n(self) -> int:
    """Columns of a tile in one half of w."""
    return self.config.block_n // self.halves

  @property
  def num_tiles_n(self) -> int:
    """Tiles of columns."""
    return lt.cdiv(self.d_out // self.halves, self.part_n)


class Walk(NamedTuple):
  """The tiles that one block takes, one in each turn of its cluster.

  Attributes:
    plan: the launch.
    schedule: the launch's windows, in global memory.
    cluster_index: which of the clusters the block is of.
    block_index: which of its blocks it is.
    num_turns_m: rows of clusters of tiles.
    num_turns: clusters of tiles.
  """

  plan: Plan
  schedule: WindowSchedule
  cluster_index: Array
  block_index: Array
  num_turns_m: Array
  num_turns: Array

  @classmethod
  def of(cls, plan: Plan, schedule: WindowSchedule) -> "Walk":
    """Returns the walk of the block that asks."""
    # A cluster takes as many row tiles at a time as it has blocks.
    num_turns_m = lt.cdiv(
      schedule.group_windows[plan.num_experts], plan.cluster
    )
    num_turns = num_turns_m * plan.num_tiles_n
    return cls(
      plan,
      schedule,
      lax.axis_index("cluster"),
      lax.axis_index("block"),
      num_turns_m,
      num_turns,
    )

  @property
  def num_tiles(self) -> Array:
    """How many tiles the block takes."""
    clusters = self._num_clusters
    return (self.num_turns - self.cluster_index + clusters - 1) // clusters

  def index_of(self, t) -> tuple[Array, Array]:
    """Returns (first row tile of the cluster's t-th turn, column tile)."""
    turn = self.cluster_index + t * self._num_clusters
    row, column = place_of_turn(self.plan, turn, self.num_turns_m)
    return row * self.plan.cluster, column

  def entry(self, t) -> Entry:
    """Loads the t-th tile's row of the schedule; used a tile later."""
    last = self.plan.num_windows - self.plan.cluster
    index_m = jnp.clip(self.index_of(t)[0], 0, last)
    *fields, _ = self.schedule
    expert, first, begin, end = (f[index_m + self.block_index] for f in fields)
    experts = self.schedule.expert_ids
    top, bottom = experts[index_m], experts[index_m + self.plan.cluster - 1]
    return Entry(expert, first, begin, end, top, bottom)

  def num_steps(self, expert) -> Array:
    """Returns the steps of contraction of a tile; none for rows of no group."""
    steps = jnp.int32(self.plan.steps)
    return jnp.where(expert < self.plan.num_experts, steps, 0)

  def all_have_one(self, t) -> Array:
    """Returns whether all blocks have a t-th tile."""
    return (t + 1) * self._num_clusters <= self.num_turns

  @property
  def _num_clusters(self) -> int:
    return lax.axis_size("cluster")


def place_of_turn(plan: Plan, turn, num_turns_m):
  """Returns (row, column) of a turn: clusters of tiles, numbered in order.

  Columns of a band first: blocks side by side read the same rows, and write
  them whole.

    band_n = 2     0  1 | 6  7 | 12
                   2  3 | 8  9 | 13
                   4  5 |10 11 | 14

  Args:
    plan: the launch.
    turn: its number.
    num_turns_m: rows of clusters of tiles.
  """
  columns, band_n = plan.num_tiles_n, plan.config.band_n
  if not 0 < band_n < columns:
    return turn // columns, lax.rem(turn, jnp.int32(columns))
  band = turn // (num_turns_m * band_n)
  first = band * band_n
  width = jnp.minimum(band_n, columns - first)
  place = turn - first * num_turns_m
  return place // width, first + lax.rem(place, width)


def slice_of_w(plan: Plan, expert, column, index_n, half: int, shift):
  """Returns the slice of w for one half of a k-step."""
  ks = pl.ds(column, plan.config.block_k)
  first = index_n * plan.part_n + half * (plan.d_out // plan.halves)
  ns = pl.ds(first if shift is None else first + shift, plan.part_n)
  return (expert, ns, ks) if plan.transpose_w else (expert, ks, ns)
