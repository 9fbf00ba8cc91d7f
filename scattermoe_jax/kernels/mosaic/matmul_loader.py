"""The warpgroup of a grouped matmul that loads: it keeps a ring of stages full.

A step's w comes by TMA, its rows of x by TMA where they are grouped, else by
cp.async. TMA announces its own. Gathered rows are announced by the loader one
step late, so that two steps are under way, or (`copies_arrive`) by themselves
as they land, so that all stages may be.

    stage    0        1        2        3        0
             copy 0
                      copy 1
             full 0            copy 2
                      full 1            copy 3 ...
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic import pace
from scattermoe_jax.kernels.mosaic.matmul_tiles import (
  ALIGN,
  Entry,
  Plan,
  Walk,
  slice_of_w,
)

_IN_FLIGHT = 1  # steps of cp.async, while the next is issued


class Sources(NamedTuple):
  """What is loaded, in global memory.

  Attributes:
    x: the rows.
    w: the matrices.
    ids: the scattered row at each position, which names a row of x if rows are
      gathered.
    slice_index: which slice of w is multiplied, one number; None if all of it.
    extra: what the epilogue reads.
  """

  x: Any
  w: Any
  ids: Any
  slice_index: Any
  extra: Any


class Stages(NamedTuple):
  """The ring of stages in shared memory, and who may touch them.

  Attributes:
    x: of rows.
    w: of the halves of w.
    full: barriers: a stage holds a step.
    empty: barriers: a stage may be filled.
    landed: barriers: a stage holds a step's gathered rows; None if `full` says
      so too.
  """

  x: Any
  w: Any
  full: Any
  empty: Any
  landed: Any = None


def arrivals(plan: Plan, rows: Any) -> int:
  """Returns how often a stage's `full` is arrived at, until it is full."""
  return plan.halves + (1 if plan.grouped_in else rows.arrivals)


def copies_arrive(plan: Plan, epilogue: Any) -> bool:
  """Returns whether gathered rows are announced by their copies, as they land.

  Where blocks load alone and the epilogue reads as well that is faster: rows
  come from far, for few columns. Elsewhere it gains nothing, or loses.
  """
  reads = epilogue.num_loads(plan) > 0
  return reads and plan.cluster == 1 and not plan.grouped_in


def steps_at_once(plan: Plan, epilogue: Any) -> int:
  """Returns how many steps the loader takes in one turn of its loop.

  Where blocks load in pairs, or copies announce themselves, as many as there
  are stages, if they divide a tile's steps, else the most of up to five that
  do: where a gathered row begins serves all of them. Elsewhere that was mostly
  slower.
  """
  if plan.cluster == 1 and not copies_arrive(plan, epilogue):
    return 1
  candidates = plan.config.num_stages, 5, 4, 3, 2, 1
  return next(count for count in candidates if plan.steps % count == 0)


def turns_fill_the_ring(plan: Plan, epilogue: Any) -> bool:
  """Returns whether each turn of the loop begins with the first stage."""
  counts = steps_at_once(plan, epilogue), epilogue.num_loads(plan)
  return all(count % plan.config.num_stages == 0 for count in counts)


class Loader:
  """Loads the tiles of a walk, one after another."""

  def __init__(
    self,
    plan: Plan,
    epilogue: Any,
    rows: Any,
    walk: Walk,
    sources: Sources,
    stages: Stages,
  ):
    """Makes the loader of one block.

    Args:
      plan: the launch.
      epilogue: it may want stages filled after those of a tile.
      rows: how rows are gathered: a `gather.RowCopies` or the like of it.
      walk: the block's tiles.
      sources: from where.
      stages: where to.
    """
    self.plan, self.epilogue, self.rows = plan, epilogue, rows
    self.walk, self.sources, self.stages = walk, sources, stages
    self.num_stages = plan.config.num_stages
    self.at_once = steps_at_once(plan, epilogue)
    self.slots_are_constants = turns_fill_the_ring(plan, epilogue)
    index = sources.slice_index
    self.shift = None if index is None else index[0] * plan.d_out
    self.pace = pace.Pace.of(plan.config.num_sms, plan.steps)

  def load_tiles(self) -> None:
    """Fills the ring with the steps of all tiles, and waits for its release."""
    if self.stages.landed is not None:
      self.rows.make_barriers(self.stages.landed)
    now = self.walk.entry(0)
    start = (jnp.int32(0), jnp.int32(-1), now, self._look_up(now))
    _, previous, *_ = lax.fori_loop(
      0, self.walk.num_tiles, self._load_tile, (*start, self.walk.entry(1))
    )
    self._announce_last(previous, in_flight=0)

    # Wait for the last release of every stage: a barrier may not go while
    # someone is about to arrive at it.
    for slot in range(self.num_stages):
      plgpu.barrier_wait(self.stages.empty.at[slot])

  def _look_up(self, tile: Entry):
    if self.plan.grouped_in:
      return ()
    block_m = self.plan.config.block_m
    return self.rows.look_up(self.sources.ids, tile.first, tile.end, block_m)

  def _load_tile(self, t, carry):
    step, previous, now, my_ids, soon = carry
    # One tile ahead: the ids of its rows, and the entry after that.
    next_ids, later = self._look_up(soon), self.walk.entry(t + 2)
    index_n = self.walk.index_of(t)[1]
    first = pl.multiple_of(now.first, ALIGN)
    all_have_one = self.walk.all_have_one(t)
    num_steps = self.walk.num_steps(now.expert)
    if self.pace is not None:
      pl.when(all_have_one & (num_steps == 0))(self.pace.skip)

    def load_steps(i, carry):
      step, previous = carry
      slots = self._slots(step)
      k = i * self.at_once
      for ahead, slot in enumerate(slots):
        if self.pace is not None and pace.may_be_due(ahead, self.at_once):
          report = functools.partial(self.pace.keep, t, k + ahead)
          pl.when(all_have_one)(report)
        plgpu.barrier_wait(self.stages.empty.at[slot])
        self._load_w(now, index_n, k + ahead, slot)
        self._load_x(first, my_ids, k, ahead, slot)
        if ahead == 0:
          # Where turns fill the ring, the one before ended with this stage.
          last = slots[-1] if self.slots_are_constants else None
          self._announce_last(previous, _IN_FLIGHT, last)
        else:
          self._announce(slots[ahead - 1], _IN_FLIGHT)
      return step + self.at_once, jnp.int32(slots[-1])

    step, previous = lax.fori_loop(
      0, num_steps // self.at_once, load_steps, (step, previous)
    )
    if self.epilogue.num_loads(self.plan):
      step = self._load_for_epilogue(step, previous, first, index_n)
      previous = jnp.int32(-1)
    return step, previous, soon, next_ids, later

  def _slots(self, step) -> Sequence[Any]:
    """Returns the stages of a turn of the loop that begins with a step."""
    if self.slots_are_constants:
      return [ahead % self.num_stages for ahead in range(self.at_once)]
    steps = [step + ahead for ahead in range(self.at_once)]
    return [lt.rem(step, self.num_stages) for step in steps]

  def _load_w(self, now: Entry, index_n, k, slot) -> None:
    plan, w, stages = self.plan, self.sources.w, self.stages
    column = k * plan.config.block_k

    def load(together=None):
      for half in range(plan.halves):
        source = slice_of_w(plan, now.expert, column, index_n, half, self.shift)
        plgpu.copy_gmem_to_smem(
          w.at[source],
          stages.w.at[slot, half],
          stages.full.at[slot],
          collective_axes=together,
        )

    if plan.cluster == 1:
      load()
    else:
      # Each block loads its share into all of them.
      pl.when(now.is_shared)(lambda: load("block"))
      pl.when(jnp.logical_not(now.is_shared))(load)

  def _load_x(self, first, my_ids, k, ahead: int, slot) -> None:
    """Loads the rows of step k + `ahead`; all of one k share addresses."""
    config, x = self.plan.config, self.sources.x
    target, full = self.stages.x.at[slot], self.stages.full.at[slot]
    if self.plan.grouped_in:
      column = (k + ahead) * config.block_k
      source = pl.ds(first, config.block_m), pl.ds(column, config.block_k)
      plgpu.copy_gmem_to_smem(x.at[source], target, full)
    else:
      column, offset = k * config.block_k, ahead * config.block_k
      self.rows.load(x, target, my_ids, column, full, offset=offset)
      if self.stages.landed is not None:
        self.rows.arrive_landed(self.stages.landed, slot)
        plgpu.barrier_arrive(full)

  def _announce(self, slot, in_flight: int) -> None:
    """Announces a stage of gathered rows, once they are there.

    TMA announces its own, and so do rows that arrive by themselves.

    Args:
      slot: the stage.
      in_flight: how many later steps may still be on their way.
    """
    if not self.plan.grouped_in and self.stages.landed is None:
      self.rows.arrive(self.stages.full.at[slot], in_flight)

  def _announce_last(self, previous, in_flight: int, slot=None) -> None:
    """Announces the stage loaded last, if one waits for that.

    Args:
      previous: the stage, -1 if none waits.
      in_flight: as of `_announce`.
      slot: the stage as a constant, if it is known.
    """
    slot = jnp.maximum(previous, 0) if slot is None else slot
    pl.when(previous >= 0)(lambda: self._announce(slot, in_flight))

  def _load_for_epilogue(self, step, previous, first, index_n):
    """Fills a stage for each chunk of columns that the epilogue reads."""
    self._announce_last(previous, in_flight=0)

    def load_chunk(j, step):
      slot = lt.rem(step, self.num_stages)
      plgpu.barrier_wait(self.stages.empty.at[slot])
      full = self.stages.full.at[slot]
      stage = self.stages.x.at[slot], self.stages.w.at[slot, 0]
      copies = self.epilogue.load(
        self.plan, j, first, index_n, self.sources.extra, stage, full
      )
      for _missing in range(arrivals(self.plan, self.rows) - copies):
        plgpu.barrier_arrive(full)
      if self.stages.landed is not None:
        self.rows.pass_landed(self.stages.landed, slot)
      return step + 1

    return lax.fori_loop(
      0, self.epilogue.num_loads(self.plan), load_chunk, step
    )
