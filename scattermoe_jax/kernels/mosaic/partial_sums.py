"""Sums of parts of a long group's rows, added by the block of the last part.

  block of part 0   sums -> global memory, flag 0
  block of part 1   sums -> global memory, flag 1
  block of part 2   sums + wait for flag 0, its sums + wait for flag 1, its sums

in this order whichever block is first, so that the bits are the same each time.
Tiles are drawn in order, and one waits only for tiles that were drawn before
it: the first that is not finished waits for nobody.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic.xty_plan import LEFT_EACH, MULTIPLIERS, Plan
from scattermoe_jax.kernels.mosaic.xty_tiles import Tile


def workspace(plan: Plan) -> list[jax.ShapeDtypeStruct]:
  """Returns the array of sums of all parts but the last; [] if none is cut."""
  if not plan.most_cuts:
    return []
  tiles, chunks = plan.most_cuts * plan.per_part, plan.right.block // lt.COLUMNS
  shape = (tiles, MULTIPLIERS, chunks, LEFT_EACH, lt.COLUMNS)
  return [jax.ShapeDtypeStruct(shape, jnp.float32)]


class PartialSums(NamedTuple):
  """One multiplier's view of the sums of parts.

  Attributes:
    ops: the module `warpgroup_ops` or the like of it.
    sums: of `workspace`.
    flags: for each tile and multiplier, whether its sums are there.
    multiplier: which this is.
    per_part: tiles of a part.
  """

  ops: Any
  sums: Any
  flags: Any
  multiplier: Any
  per_part: int

  @classmethod
  def of(cls, plan: Plan, ops, sums, multiplier) -> "PartialSums | None":
    """Returns the view; None if no group is cut."""
    if not plan.most_cuts:
      return None
    [sums] = sums
    flags = ops.new_flags(sums.shape[0] * MULTIPLIERS)
    return cls(ops, sums, flags, multiplier, plan.per_part)

  def join(self, t: Tile, chunks: list) -> list:
    """Returns a tile's sums over its whole group if its part is the last.

    Else puts them where the last will find them.
    """

    @pl.when(t.others < 0)
    def _():
      for i, chunk in enumerate(chunks):
        self.sums[t.slot, self.multiplier, i] = chunk
      self.ops.signal(self.flags, t.slot * MULTIPLIERS + self.multiplier)

    def add_part(nth, chunks):
      slot = t.slot + nth * self.per_part
      self.ops.wait_for(self.flags, slot * MULTIPLIERS + self.multiplier)
      theirs = self.sums.at[slot, self.multiplier]
      return [
        chunk + plgpu.load(theirs.at[i], optimized=False)
        for i, chunk in enumerate(chunks)
      ]

    return lax.fori_loop(0, jnp.maximum(t.others, 0), add_part, chunks)
