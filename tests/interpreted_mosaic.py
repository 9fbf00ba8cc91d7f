"""The Hopper kernels in Mosaic's interpreter, on a CPU.

The interpreter runs everything but PTX written by hand: the copies of gathered
rows, and the pace of blocks. In place of the first stands one copy for each
row, counted by the same barrier, so that the schedule, the ring of stages and
the epilogues are the real ones; of the second, only when it would report or
wait is noted. What the blocks of a cluster load together each loads whole here,
so that nobody would see one get what another asked for.

Its warpgroups are callbacks in XLA's threads: there must be more of these than
warpgroups that wait for each other. `conftest` asks for eight devices, and with
them come as many threads; on a machine of few cores alone, set NPROC.
"""

import functools
from types import SimpleNamespace
from typing import ClassVar, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scattermoe_jax.kernels import mosaic
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.mosaic import grouped_matmul, pace

SMALL = TileConfig(block_m=128, block_n=128, num_stages=3, num_sms=2)


class SingleRows(NamedTuple):
  """Stands in for `gather.RowCopies`: one copy for each row."""

  width: int
  fan_out: int = 1

  # At a stage's barrier: the rows of SMALL, and who announces them.
  arrivals = SMALL.block_m + 1

  def ids_type(self, block_rows):
    return jax.ShapeDtypeStruct((block_rows,), jnp.int32)

  def look_up(self, ids, first, num_rows, block_rows):
    last = jnp.minimum(first + jnp.maximum(num_rows - 1, 0), ids.shape[0] - 1)

    def look_up_row(row, found):
      return found.at[row].set(ids[jnp.minimum(first + row, last)])

    found = jnp.zeros((block_rows,), jnp.int32)
    return lax.fori_loop(0, block_rows, look_up_row, found)

  def consecutive(self, first, block_rows):
    return first + lax.iota(jnp.int32, block_rows)

  def load(self, x, x_smem, my_ids, column, barrier, *, offset):
    def load_row(row, _):
      plgpu.copy_gmem_to_smem(
        x.at[pl.ds(my_ids[row] // self.fan_out, 1), pl.ds(column + offset, 64)],
        x_smem.at[pl.ds(row, 1)],
        barrier,
      )

    lax.fori_loop(0, my_ids.shape[0], load_row, None)

  def arrive(self, barrier, in_flight):
    plgpu.barrier_arrive(barrier)

  # Here the copies arrive at the stage's barrier themselves.

  def landed_type(self, stages):
    return plgpu.SMEM((stages,), jnp.int32)

  def make_barriers(self, landed):
    pass

  def arrive_landed(self, landed, slot):
    pass

  def pass_landed(self, landed, slot):
    pass

  def wait_landed(self, landed, slot, turn):
    pass

  def store(self, y_smem, y, my_ids, column, begin, end):
    def store_row(row, _):
      plgpu.copy_smem_to_gmem(
        y_smem.at[pl.ds(row, 1)],
        y.at[pl.ds(my_ids[row] // self.fan_out, 1), pl.ds(column, 64)],
      )

    lax.fori_loop(begin, end, store_row, None)
    plgpu.wait_smem_to_gmem(0)


class NoPace(pace.Pace):
  """Stands in for `pace.Pace`, and says at what it would have waited."""

  kept: ClassVar[list] = []

  def __init__(self, num_blocks, steps):
    self._num_blocks, self._steps = num_blocks, steps

  def report(self, count):
    self.kept.append("report")

  def wait(self, target):
    self.kept.append("wait")


def mosaic_interpreted(config: TileConfig = SMALL, **params) -> SimpleNamespace:
  """Returns the backend, its kernels interpreted with small tiles.

  Args:
    config: the blocks; block_m as in `SMALL`.
    **params: of `plgpu.InterpretGPUParams`.
  """

  def interpreted(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
      interpret = plgpu.force_gpu_interpret_mode(
        plgpu.InterpretGPUParams(**params)
      )
      with (
        mock.patch.object(grouped_matmul, "RowCopies", SingleRows),
        mock.patch.object(pace, "Pace", NoPace),
        interpret,
      ):
        call = functools.partial(function, config=config, **kwargs)
        return jax.block_until_ready(jax.jit(call)(*args))

    return run

  names = (
    "scatter2scatter",
    "up_projection",
    "down_projection",
    "down_projection_grad",
  )
  return SimpleNamespace(
    **{name: interpreted(getattr(mosaic, name)) for name in names}
  )
