"""The tiles of a weight gradient: which there are, and in which order.

A tile is `left.block` columns of one operand by `right.block` of the other, of
one expert. Left is the side of 128 columns.

  tiles of an expert      right ->          Blocks at work at one time read
                       0  1 | 6  7          few rows and columns between them
                left   2  3 | 8  9          when their tiles form a square:
                       4  5 | 10 11         bands of `band_n` tiles (here 2).

A tile of a group of more rows than a block's fair share would end last, alone.
Such groups are cut into parts, each with tiles of its own:

  group      0          1            2        1 is cut in three
  part       0          1   2   3    4        longest parts first
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from scattermoe_jax.kernels.mosaic import xty_plan
from scattermoe_jax.kernels.mosaic.warpgroup_ops import ROWS
from scattermoe_jax.kernels.mosaic.xty_plan import Plan
from scattermoe_jax.kernels.schedule import sum_where
from scattermoe_jax.routing import Routing

# Groups of so many times the mean are cut into more parts than their shares.
_HOT = 1.5


class Parts(NamedTuple):
  """Of each part its group, for `part_at`; all 0 for parts that there are not.

  Attributes:
    expert: its expert less E.
    first: its first row.
    end: the row after its last.
    length: rows of one of its parts. None where no group is cut, like the rest.
    count: its parts.
    before: parts before its first.
    rank: groups before it.
  """

  expert: Int[Array, " P"]
  first: Int[Array, " P"]
  end: Int[Array, " P"]
  length: Any = None  # Int[Array, " P"] | None
  count: Any = None
  before: Any = None
  rank: Any = None


def parts_of_groups(plan: Plan, routing: Routing, slice_index=None) -> Parts:
  """Returns the parts of a launch, the longest parts first.

  Long tiles first leave short ones to fill the end of the launch, and the
  loader counts on those without rows to be the last. Comparing all with all
  takes few small kernels, where a sort and cumulative sums are several each;
  what can be said of one part alone is left to `part_at`.
  """
  sizes = routing.group_sizes
  length, count = sizes, None
  if plan.most_cuts:
    cuts = _cuts(plan, sizes, routing.num_rows)
    length, count = lax.optimization_barrier(cuts)
  experts = jnp.arange(sizes.shape[0], dtype=jnp.int32)
  is_earlier = experts[None, :] < experts[:, None]
  longest = jnp.where(sizes > 0, length, 0)
  is_longer = (longest[None, :] > longest[:, None]) | (
    (longest[None, :] == longest[:, None]) & is_earlier
  )
  # Without the barriers XLA would count once more for every pick.
  rank, first = lax.optimization_barrier(
    (jnp.sum(is_longer, axis=1, dtype=jnp.int32), sum_where(is_earlier, sizes))
  )
  group = (experts - plan.num_experts, first, first + sizes)
  if count is None:
    mine = experts[: plan.num_parts]
    if slice_index is not None:
      mine = mine * plan.num_slices + slice_index
    is_here = rank[None, :] == mine[:, None]
    return Parts(*(sum_where(is_here, of_group) for of_group in group))
  before = lax.optimization_barrier(
    sum_where(rank[None, :] < rank[:, None], count)
  )
  nth = jnp.arange(plan.num_parts, dtype=jnp.int32)[:, None] - before[None, :]
  is_here = (nth >= 0) & (nth < count[None, :])
  cuts = (length, count, before, rank)
  return Parts(*(sum_where(is_here, of_group) for of_group in group + cuts))


def _cuts(plan: Plan, sizes, num_rows: int):
  """Returns the rows of each group's parts, whole steps, and how many parts.

  A group that stands out is cut into parts of at most a fair share: the rest
  fills the other blocks. Of groups about as long as each other, parts of less
  than a share would only take two turns for one.

  No part is empty but of an empty group.
  """
  fair, mean = plan.part_rows, num_rows / plan.num_experts
  shares = jnp.where(
    sizes > int(_HOT * mean),
    pl.cdiv(sizes, jnp.int32(fair)),
    (sizes + fair // 8) // fair,
  )
  count = jnp.maximum(jnp.minimum(shares, sizes // xty_plan.LEAST_ROWS), 1)
  rows = jnp.maximum(sizes, 1)
  length = pl.cdiv(pl.cdiv(rows, count), jnp.int32(ROWS)) * ROWS
  # Of whole steps fewer parts may do.
  return length, pl.cdiv(rows, length)


class Part(NamedTuple):
  """A part of a group's rows, as scalars.

  Attributes:
    expert: its expert; E for a part that there is not.
    first: its first row.
    end: the row after its last.
    others: how many parts come before it in its group, if it is the last; -1 if
      it is not. None where none is cut.
    slot: where its sums are kept until the last adds them, counted in parts; of
      the last, where those of its group begin. None where none is cut.
  """

  expert: Int[Array, ""]
  first: Int[Array, ""]
  end: Int[Array, ""]
  others: Any = None  # Int[Array, ""] | None
  slot: Any = None  # Int[Array, ""] | None


def part_at(plan: Plan, parts: Parts, number) -> Part:
  """Returns the part of that number."""
  expert, first, end, *cuts = (a[number] for a in parts if a is not None)
  expert += plan.num_experts
  if not plan.most_cuts:
    return Part(expert, first, end)
  length, count, before, rank = cuts
  nth = number - before
  start = first // plan.aligned * plan.aligned + nth * length
  is_last = nth == count - 1
  return Part(
    expert,
    jnp.maximum(first, start),
    jnp.where(is_last, end, start + length),
    jnp.where(is_last, nth, -1),
    before - rank + jnp.where(is_last, 0, nth),
  )


class Tile(NamedTuple):
  """One tile, as scalars in a kernel.

  Attributes:
    number: its number; at least `Plan.num_tiles` if there are no more.
    expert: its expert.
    left_col: its first column of left.
    right_col: its first column of right.
    first: first row of the part.
    end: row after the part's last.
    start: first row of the first step: `first`, or the multiple of 8 below.
    num_steps: steps of 64 rows.
    others: as of its part.
    slot: as of its part, counted in tiles.
  """

  number: Int[Array, ""]
  expert: Int[Array, ""]
  left_col: Int[Array, ""]
  right_col: Int[Array, ""]
  first: Int[Array, ""]
  end: Int[Array, ""]
  start: Int[Array, ""]
  num_steps: Int[Array, ""]
  others: Any  # Int[Array, ""] | None
  slot: Any  # Int[Array, ""] | None

  def window(self, k):
    """Returns the first row of step k, and which rows count: [first, end)."""
    return self.start + k * ROWS, self.first, self.end


def tile_at(plan: Plan, parts: Parts, index) -> Tile:
  """Returns the tile of that number.

  The tiles of a cluster are neighbours along left, and follow each other.
  """
  part = jnp.minimum(index // plan.per_part, plan.num_parts - 1)
  within = lax.rem(index, jnp.int32(plan.per_part))
  nth = lax.rem(within, jnp.int32(plan.cluster))
  turn, turns_left = within // plan.cluster, plan.tiles_left // plan.cluster
  band = plan.config.band_n or plan.tiles_right
  band_start = turn // (turns_left * band) * band
  band_width = jnp.minimum(band, plan.tiles_right - band_start)
  place = turn - turns_left * band_start
  expert, first, end, others, slot = part_at(plan, parts, part)
  start = first // plan.aligned * plan.aligned
  if plan.most_cuts or plan.num_experts % plan.num_slices:
    index = jnp.where(expert < plan.num_experts, index, plan.num_tiles)
  if plan.most_cuts:
    slot = slot * plan.per_part + within
  num_steps = (end - start + (ROWS - 1)) // ROWS
  return Tile(
    index,
    expert,
    (place // band_width * plan.cluster + nth) * plan.left.block,
    (band_start + lax.rem(place, band_width)) * plan.right.block,
    first,
    end,
    start,
    jnp.where(end > first, num_steps, 0),
    others,
    slot,
  )


def columns(plan: Plan, t: Tile):
  """Returns the tile's first columns of left and of right."""
  # Said where it is used: a loop's carry forgets what divides it.
  return (
    pl.multiple_of(t.left_col, plan.left.block),
    pl.multiple_of(t.right_col, plan.right.block),
  )
