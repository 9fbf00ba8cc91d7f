"""Blocks kept about in step, so that one finds in L2 what another has read.

Side by side in the order of tiles, blocks read the same rows and the same
weights, each from the first column of the contraction to the last. Left alone
they drift apart, and half as much again comes from HBM; on a card at its power
limit, bytes are clock. So a loader reports every 32 steps, and waits until the
blocks' average number of reports is at most one behind its own:

  reports of all blocks >= epoch * blocks     epoch: reports of this one before

Where some blocks do not run at all, since other work holds their places, that
would never be: after some 50 microseconds a loader gives up, and with it all
that run, for the rest of the launch. Which bits come out does not change.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic import warpgroup_ops

# Steps of 64 columns between two reports. A tile of fewer is over before its
# operands have left L2.
STEPS = 32

_REPORT = "@$0 red.relaxed.gpu.global.add.u32 [$1], $2;"
# 200 looks, each of 100 ns of sleep and as long again for memory. To give up is
# to set the highest bit: more reports than any launch waits for.
_WAIT = """{
  .reg .pred done;
  .reg .u32 reports, looks;
  mov.u32 looks, 0;
  look:
  ld.relaxed.gpu.global.u32 reports, [$0];
  setp.ge.u32 done, reports, $1;
  @done bra leave;
  add.u32 looks, looks, 1;
  setp.gt.u32 done, looks, 200;
  @done bra give_up;
  nanosleep.u32 100;
  bra look;
  give_up:
  red.relaxed.gpu.global.max.u32 [$0], 0x80000000;
  leave:
}"""


def reports_of_tile(steps: int) -> int:
  """Returns how often a tile of so many steps is reported."""
  return lt.cdiv(steps, STEPS)


def reports_before(tile, step, steps: int):
  """Returns the reports of a block before step `step` of its `tile`-th tile."""
  return tile * reports_of_tile(steps) + step // STEPS


def may_be_due(ahead: int, at_once: int) -> bool:
  """Returns whether step k + ahead may be reported, k a multiple of at_once."""
  return ahead % math.gcd(at_once, STEPS) == 0


class Pace:
  """The reports of all blocks, as one loading warpgroup sees them.

  The interpreter has no memory that blocks share; its tests keep no pace.
  """

  def __init__(self, num_blocks: int, steps: int):
    self._num_blocks, self._steps = num_blocks, steps
    self._reports = warpgroup_ops.new_counter()

  @classmethod
  def of(cls, num_blocks: int, steps: int) -> "Pace | None":
    """Returns the pace of blocks whose tiles have so many steps, if any."""
    return cls(num_blocks, steps) if steps >= STEPS else None

  def skip(self) -> None:
    """Reports a tile without steps."""
    self.report(reports_of_tile(self._steps))

  def keep(self, tile, step) -> None:
    """Reports a step if it is due; then waits for blocks that are far behind.

    Args:
      tile: which of this block's tiles, all blocks having one.
      step: which of its steps.
    """

    @pl.when(lax.rem(step, jnp.int32(STEPS)) == 0)
    def _():
      self.report(1)
      before = reports_before(tile, step, self._steps)
      self.wait(before * self._num_blocks)

  def report(self, count) -> None:
    """Reports `count` times."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), lt.SCALAR))
    def add(_, reports, count):
      first, place = lt.is_thread(0), lt.global_pointer(reports)
      operands = [first, place, lt.scalar(count)]
      lt.run_ptx(_REPORT, "b,l,r", operands)
      return ()

    add(self._reports, lt.int32(count))

  def wait(self, target) -> None:
    """Waits until there are `target` reports, or somebody gives up."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), lt.SCALAR))
    def poll(_, reports, target):
      operands = [lt.global_pointer(reports), lt.scalar(target)]
      lt.run_ptx(_WAIT, "l,r", operands)
      return ()

    poll(self._reports, jnp.int32(target))
