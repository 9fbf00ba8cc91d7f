"""Tiles handed out at run time, to whichever block is free.

Groups differ in size and tiles with them; dealt out in advance, one block gets
the longest while others idle. Instead each block draws the next number from a
counter in global memory. Which block computes a tile does not change its bits.

A block's loading warpgroup draws a few tiles ahead and shares each number with
the other warpgroups through a ring in shared memory:

  draw(i)    loader:  counter += 1 -> ring[i % RING] -> drawn[i % RING]
  read(i)    all:     wait drawn[i % RING], read
  release(i) others:  the place may be used again

A cluster of blocks draws one ticket for as many numbers as it has blocks, and
each takes its own: of ticket q, block b of n takes number n q + b. The first
block's loader writes it into the rings of all; all meet at the barriers.

The loader announces every step that it has loaded before it draws: else it may
wait for a place in the ring, and the others for a step.

Source: dynamic tile schedulers of persistent kernels, such as CUTLASS's
(NVIDIA, include/cutlass/gemm/kernel/sm90_tile_scheduler*.hpp) and the
work-queue of Gupta et al., A study of persistent threads style GPU
programming (2012).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scattermoe_jax.kernels.mosaic import clusters
from scattermoe_jax.kernels.mosaic import layouts as lt

RING = 8
# Tiles between drawing a number and needing it: the counter is far away.
AHEAD = 3


def scratch_types(cluster: int, readers: int) -> dict:
  """Returns the scratch of a ring.

  Args:
    cluster: blocks that draw together.
    readers: other warpgroups that read, of each block.
  """
  return dict(
    ring=plgpu.SMEM((RING,), jnp.int32),
    drawn=clusters.barriers(cluster, 1, RING),
    taken=clusters.barriers(cluster, readers, RING),
  )


class Queue(NamedTuple):
  """One warpgroup's view of the tickets of its block."""

  ring: Any
  drawn: Any
  taken: Any
  cluster: int

  @classmethod
  def of(cls, cluster: int, scratch: dict) -> "Queue":
    """Takes what it needs out of the scratch of `scratch_types`."""
    ring, drawn, taken = map(scratch.pop, ("ring", "drawn", "taken"))
    return cls(ring, drawn, taken, cluster)

  def draw(self, counter, increment, i) -> None:
    """Draws the cluster's i-th ticket; for the loading warpgroups."""
    place = lt.rem(i, RING)

    @pl.when(i >= RING)
    def _():
      plgpu.barrier_wait(self.taken.at[place])

    increment(counter, self.ring, place, i)
    self._arrive(self.drawn.at[place])

  def read(self, i):
    """Returns the block's i-th number, waiting until it is drawn."""
    place = lt.rem(i, RING)
    plgpu.barrier_wait(self.drawn.at[place])
    return self.ring[place] * self.cluster + lax.axis_index("block")

  def release(self, i) -> None:
    """Says that this warpgroup has read the i-th number."""
    self._arrive(self.taken.at[lt.rem(i, RING)])

  def _arrive(self, barrier) -> None:
    if self.cluster > 1:
      # One thread will arrive for all: first they all come here.
      plgpu.commit_smem()
    plgpu.barrier_arrive(barrier)
