"""Sums of outer products over each expert's rows: the body of one tile.

# M = d, N = n, K = rows of one expert, G = E

A program owns one tile of xty[e], (block_m, block_n), and walks the expert's
rows, block_k at a time, so no two programs add to the same place. Either
operand is gathered as it is loaded. An expert without rows adds nothing and
stores zeros. Source: ScatterMoE (Tan et al., 2024), groupXtY.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from scattermoe_jax.kernels.triton.launch import (
  as_column,
  as_row,
  launch,
  load,
  store,
)
from scattermoe_jax.kernels.triton.tiles import TritonConfig


def multiply_groups(
  x: Float[Array, "rows_x M"],
  y: Float[Array, "rows_y N"],
  x_rows: Int[Array, " S"] | None,
  y_rows: Int[Array, " S"] | None,
  offsets: Int[Array, " ends"],
  *,
  precision: Any,
  config: TritonConfig,
  interpret: bool,
) -> Float[Array, "G M N"]:
  """Returns xty[e] = x_e^T y_e.

  Args:
    x: one operand.
    y: the other.
    x_rows: row of x that each grouped row reads; None for itself.
    y_rows: row of y that each grouped row reads; None for itself.
    offsets: first grouped row of each expert, then the end of the last.
    precision: of the products.
    config: blocks, warps and stages.
    interpret: whether to run in the interpreter.
  """
  num_experts = offsets.shape[0] - 1
  d_in, d_out = x.shape[1], y.shape[1]
  tiles_m = -(-d_in // config.block_m)
  tiles_n = -(-d_out // config.block_n)
  body = functools.partial(
    _tile, tiles_m=tiles_m, tiles_n=tiles_n, precision=precision, config=config
  )
  return launch(
    body,
    {"x": x, "y": y, "x_rows": x_rows, "y_rows": y_rows, "offsets": offsets},
    jax.ShapeDtypeStruct((num_experts, d_in, d_out), x.dtype),
    num_programs=num_experts * tiles_m * tiles_n,
    config=config,
    interpret=interpret,
    name="group_xty",
  )


def _tile(gmem, xty_gmem, *, tiles_m, tiles_n, precision, config):
  """Adds up the expert's rows, stores the tile."""
  _, d_in, d_out = xty_gmem.shape
  program = pl.program_id(0)
  tile_n = lax.rem(program, jnp.int32(tiles_n))
  program = lax.div(program, jnp.int32(tiles_n))
  tile_m = lax.rem(program, jnp.int32(tiles_m))
  expert = lax.div(program, jnp.int32(tiles_m))
  begin, end = gmem["offsets"][expert], gmem["offsets"][expert + 1]
  ms = tile_m * config.block_m + jnp.arange(config.block_m, dtype=jnp.int32)
  ns = tile_n * config.block_n + jnp.arange(config.block_n, dtype=jnp.int32)
  live_ms = (ms < d_in) if d_in % config.block_m else None
  live_ns = (ns < d_out) if d_out % config.block_n else None

  def add_product(i, acc, *, is_whole):
    rows = begin + i * config.block_k
    rows += jnp.arange(config.block_k, dtype=jnp.int32)
    # Both operands are masked: zero times a neighbour's NaN would be NaN.
    live = None if is_whole else rows < end

    def operand(name, cols, live_cols):
      ids = rows
      if f"{name}_rows" in gmem:
        ids = load(gmem[f"{name}_rows"], (rows,), live)
      at = (ids[:, None], cols[None, :])
      return load(gmem[name], at, as_column(live), as_row(live_cols))

    return acc + lax.dot_general(
      operand("x", ms, live_ms),
      operand("y", ns, live_ns),
      (((0,), (0,)), ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
    )

  # Whole steps need no masks. The rest goes first: behind or between them it
  # would keep the compiler from running their products asynchronously.
  whole = lax.div(end - begin, jnp.int32(config.block_k))
  acc = jnp.zeros((config.block_m, config.block_n), jnp.float32)
  acc = add_product(whole, acc, is_whole=False)
  whole_step = functools.partial(add_product, is_whole=True)
  acc = lax.fori_loop(jnp.int32(0), whole, whole_step, acc)
  at = (expert, ms[:, None], ns[None, :])
  store(xty_gmem, at, acc, as_column(live_ms), as_row(live_ns))
