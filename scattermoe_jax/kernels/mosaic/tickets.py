"""Tiles handed out at run time, to whichever block is free.

Groups differ in size and tiles with them; dealt out in advance, one block gets
the longest while others idle. Instead each block draws the next number from a
counter in global memory. Which block computes a tile does not change its bits.

A block's loading warpgroup draws a few tiles ahead and shares each number with
the other warpgroups through a ring in shared memory:

  draw(i)    loader:  counter += 1 -> ring[i % RING] -> drawn[i % RING]
  read(i)    all:     wait drawn[i % RING], read
  release(i) others:  the place may be used again

The loader may draw only what the others can reach by what it has announced:
else it waits for a place, and they for a step.

Source: dynamic tile schedulers of persistent kernels, such as CUTLASS's
(NVIDIA, include/cutlass/gemm/kernel/sm90_tile_scheduler*.hpp) and the
work-queue of Gupta et al., A study of persistent threads style GPU
programming (2012).
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

RING = 8
# Tiles between drawing a number and needing it: the counter is far away.
AHEAD = 3


def scratch_types(readers: int) -> dict:
  """Returns the scratch of a ring that `readers` other warpgroups read."""
  return dict(
    ring=plgpu.SMEM((RING,), jnp.int32),
    drawn=plgpu.Barrier(num_arrivals=1, num_barriers=RING),
    taken=plgpu.Barrier(num_arrivals=readers, num_barriers=RING),
  )


class Queue:
  """One warpgroup's view of the tickets of its block."""

  def __init__(self, ring, drawn, taken):
    self._ring, self._drawn, self._taken = ring, drawn, taken

  def draw(self, i, counter, increment) -> None:
    """Draws the block's i-th number; for the loading warpgroup."""
    place = lax.rem(i, RING)

    @pl.when(i >= RING)
    def _():
      plgpu.barrier_wait(self._taken.at[place])

    increment(counter, self._ring, place, i)
    plgpu.barrier_arrive(self._drawn.at[place])

  def read(self, i):
    """Returns the block's i-th number, waiting until it is drawn."""
    place = lax.rem(i, RING)
    plgpu.barrier_wait(self._drawn.at[place])
    return self._ring[place]

  def release(self, i) -> None:
    """Says that this warpgroup has read the i-th number."""
    plgpu.barrier_arrive(self._taken.at[lax.rem(i, RING)])
