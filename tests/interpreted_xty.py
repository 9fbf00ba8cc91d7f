"""The Hopper weight gradient in Mosaic's interpreter, on a CPU.

The interpreter cannot run cp.async, so `InterpretedOps` stands in for
`warpgroup_ops`; schedule, barriers, TMA copies, products and stores are the
kernel's own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scattermoe_jax.kernels.mosaic import xty_plan
from scattermoe_jax.kernels.mosaic.grouped_xty import group_xty

ROWS = 64


class InterpretedOps:
  """The functions of `warpgroup_ops`, as plain loads and stores."""

  def __init__(self, num_blocks):
    self.num_blocks = num_blocks

  def new_counter(self):
    return None

  def increment(self, counter, ring, place, turn):
    del counter
    ring[place] = lax.axis_index("cluster") + turn * lax.axis_size("cluster")

  def meet_cluster(self):
    pass

  @staticmethod
  def sum_share(plan, worker, smem, first_byte, rows, places, out, slice_index):
    del smem, first_byte  # Rows pass no shared memory here.
    workers = plan.blocks * plan.warpgroups
    columns = pl.ds(slice_index * plan.width, plan.width)

    def sum_token(i, _):
      token = worker + i * workers
      total = jnp.zeros((plan.width,), jnp.float32)
      for j in range(plan.top_k):
        total += rows[places[token, j], :].astype(jnp.float32)
      out[token, columns] = total.astype(plan.dtype)

    lax.fori_loop(
      0, pl.cdiv(plan.num_tokens - worker, workers), sum_token, None
    )

  def new_flags(self, count):
    # One block: no part is waited for.
    assert self.num_blocks == 1
    return None

  def signal(self, flags, i):
    pass

  def wait_for(self, flags, i):
    pass

  @staticmethod
  def range_ids(window):
    return window[0] + jnp.arange(ROWS, dtype=jnp.int32)

  @staticmethod
  def load_ids(ids, window):
    # One slice that stays inside; then each row its own place.
    start = jnp.clip(window[0], 0, max(ids.shape[0] - ROWS, 0))
    rows = ids[pl.ds(start, min(ROWS, ids.shape[0]))]
    place = window[0] - start + jnp.arange(ROWS, dtype=jnp.int32)
    return rows[jnp.clip(place, 0, rows.shape[0] - 1)]

  @staticmethod
  def copy(source, smem, ids, window, *, column, width, fan_out):
    first_row, group_first, group_end = window
    piece = math.gcd(width, smem.shape[-1])
    for first in range(0, smem.shape[-1], piece):
      in_width = column + first < width
      from_column = jnp.where(in_width, column + first, 0)

      def copy_row(r, _, first=first, in_width=in_width, column=from_column):
        row = first_row + r
        exists = in_width & (row >= group_first) & (row < group_end)
        source_row = jnp.where(exists, ids[r] // fan_out, 0)
        values = source[source_row, pl.ds(column, piece)]
        smem[r, first : first + piece] = jnp.where(
          exists, values, jnp.zeros_like(values)
        )

      lax.fori_loop(0, ROWS, copy_row, None)

  @staticmethod
  def commit():
    pass

  @staticmethod
  def wait(groups):
    del groups
    plgpu.commit_smem()


# 3, 133, 0 and 16 rows: expert 1 has a step cut at its start, a whole one, and
# one cut at its end; expert 2 has none.
IDS = np.array([[0, 3]] * 3 + [[1, 3]] * 13 + [[1, 1]] * 60, np.int32)
EXPERTS = 4


def operands(x_grouped, y_grouped, d, n, ids=IDS, dtype=jnp.bfloat16, seed=0):
  rng = np.random.default_rng(seed)
  rows = lambda grouped: ids.size if grouped else ids.shape[0]
  x = jnp.asarray(rng.normal(size=(rows(x_grouped), d)), dtype)
  y = jnp.asarray(rng.normal(size=(rows(y_grouped), n)), dtype)
  return x, y


def interpreted(*arrays, config, product=group_xty, races=False, **layout):
  params = plgpu.InterpretGPUParams(detect_races=races)
  ops = InterpretedOps(config.num_sms)
  with plgpu.force_gpu_interpret_mode(params):
    return jax.jit(
      lambda *arrays: product(*arrays, config=config, ops=ops, **layout)
    )(*arrays)


def cut_to_steps(monkeypatch):
  monkeypatch.setattr(xty_plan, "_part_rows", lambda *_: ROWS)
  monkeypatch.setattr(xty_plan, "LEAST_ROWS", ROWS)
