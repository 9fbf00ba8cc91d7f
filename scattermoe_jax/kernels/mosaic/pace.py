"""Blocks kept about in step, so that one finds in L2 what another has read.

Side by side in the order of tiles, blocks read the same rows and the same
weights, each from the first column of the contraction to the last. Left alone
they drift apart, and at L twice the bytes come from HBM; on a card at its power
limit, bytes are clock. So a loader reports every 32 steps, and waits until the
blocks have reported as often as it, on average, but once:

  reports of all blocks >= epoch * blocks     epoch: reports of this one before

A wait ends after some microseconds in any case: it only saves power, and other
work may keep a block from running at all. Which bits come out does not change.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from scattermoe_jax.kernels.mosaic import layouts as lt

# Steps of 64 columns between two reports. A tile of fewer is over before its
# operands have left L2.
STEPS = 32
_POLLS = 100  # of 100 ns each, and as much again for memory

_REPORT = "@$0 red.relaxed.gpu.global.add.u32 [$1], $2;"
_WAIT = f"""{{
  .reg .pred done;
  .reg .u32 reports, polls;
  mov.u32 polls, 0;
  poll:
  ld.relaxed.gpu.global.u32 reports, [$0];
  setp.ge.u32 done, reports, $1;
  @done bra leave;
  add.u32 polls, polls, 1;
  setp.gt.u32 done, polls, {_POLLS};
  @done bra leave;
  nanosleep.u32 100;
  bra poll;
  leave:
}}"""


class Pace:
  """The reports of all blocks, as one loading warpgroup sees them.

  The interpreter has no memory that blocks share; its tests keep no pace.
  """

  def __init__(self, num_blocks: int):
    self._num_blocks = num_blocks
    self._reports = pl.get_global(plgpu.SemaphoreType.REGULAR)

  def report(self, count) -> None:
    """Reports `count` times."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), lt.SCALAR))
    def add(_, reports, count):
      first = arith.cmpi(arith.CmpIPredicate.eq, lt.thread_index(), lt.const(0))
      operands = [first, lt.global_pointer(reports), lt.scalar(count)]
      _run_ptx(_REPORT, "b,l,r", operands)
      return ()

    add(self._reports, lt.int32(count))

  def keep(self, epoch) -> None:
    """Reports once, then waits until the others are not far behind.

    Args:
      epoch: how often this block has reported before.
    """
    self.report(1)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), lt.SCALAR))
    def wait(_, reports, target):
      operands = [lt.global_pointer(reports), lt.scalar(target)]
      _run_ptx(_WAIT, "l,r", operands)
      return ()

    wait(self._reports, jnp.int32(epoch * self._num_blocks))


def _run_ptx(text: str, constraints: str, operands: list[ir.Value]) -> None:
  void = ir.Type.parse("!llvm.void")
  llvm.inline_asm(void, operands, text, constraints, has_side_effects=True)
