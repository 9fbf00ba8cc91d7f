"""Clusters of blocks, which load for each other: their grid, their barriers.

A kernel's `lax.axis_index` of "cluster" counts clusters, of "block" the blocks
of one. A cluster of one is a block as any other.
"""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

# Thread 0 of a warpgroup arrives at a cluster's barrier in its first block,
# thread 8 at that in its second: so does JAX's `CollectiveBarrierRef.arrive`
# (jax.experimental.mosaic.gpu.utils).
THREADS_TO_ARRIVE = 8


def grid(num_blocks: int, cluster: int) -> dict[str, Any]:
  """Returns arguments of `plgpu.kernel`: blocks in clusters of so many."""
  return dict(
    grid=(num_blocks // cluster,),
    grid_names=("cluster",),
    cluster=(cluster,),
    cluster_names=("block",),
  )


def barriers(cluster: int, num_arrivals: int, num_barriers: int):
  """Returns barriers at which each block of a cluster arrives so often.

  To arrive at one is to arrive at that of every block. In a cluster of one, all
  threads of a warpgroup arrive; in one of more a single thread does for them,
  and waits for no other: right after `wgmma_wait`, which is the warpgroup's,
  before anything was read, else after `commit_smem`.
  """
  if cluster == 1:
    return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=num_barriers)
  return plgpu.ClusterBarrier(
    collective_axes=("block",),
    num_arrivals=num_arrivals,
    num_barriers=num_barriers,
  )
