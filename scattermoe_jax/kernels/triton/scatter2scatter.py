"""Rows times their expert's matrix: the body of one tile.

# M = S rows, K = d, N = n, G = E

#            N ->                    A program multiplies one tile: block_m rows
#   rows  +--------+--------+        of one expert by block_n columns, over the
#    e=0  | 0,0    | 0,1    |        whole contraction or, where tiles are too
#    e=0  | 1,0    | 1,1    | short  few to fill the device, over one of split_k
#    e=2  | 2,0    | 2,1    |        parts of it. Programs of absent tiles return
#   none  | 3,0    | 3,1    | zeros  at once.

Rows are gathered as they are loaded and, where asked, scattered as they are
stored. Source: ScatterMoE (Tan et al., 2024), scatter2scatter. Its Triton
kernel walks every expert between a tile's first and last row; these tiles
never straddle two experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from scattermoe_jax.kernels.schedule import TileSchedule
from scattermoe_jax.kernels.triton.launch import launch, load, store
from scattermoe_jax.kernels.triton.tiles import TritonConfig


def multiply_tiles(
  x: Float[Array, "rows K"],
  w: Float[Array, "G _ _"],
  bias: Float[Array, "G N"] | None,
  rows_in: Int[Array, " M"] | None,
  rows_out: Int[Array, " M"] | None,
  tiles: TileSchedule,
  *,
  num_rows: int,
  transpose_w: bool,
  precision: Any,
  config: TritonConfig,
  interpret: bool,
) -> Float[Array, "*parts M N"]:
  """Returns y, or its split_k parts in float32 if there is more than one.

  Args:
    x: the rows.
    w: (G, K, N), or (G, N, K) if `transpose_w`.
    bias: added to the first part.
    rows_in: row of x that each grouped row reads; None for itself.
    rows_out: row of y that each grouped row writes; None for itself.
    tiles: row tiles of at most block_m rows; those of expert G are zeroed.
    num_rows: M.
    transpose_w: whether w is stored transposed.
    precision: of the products.
    config: blocks, warps, stages and parts.
    interpret: whether to run in the interpreter.
  """
  num_experts, d_out = w.shape[0], w.shape[1 if transpose_w else 2]
  tiles_n = -(-d_out // config.block_n)
  shape, dtype = (num_rows, d_out), x.dtype
  if config.split_k > 1:
    shape, dtype = (config.split_k, *shape), jnp.dtype(jnp.float32)
  body = functools.partial(
    _tile,
    num_experts=num_experts,
    tiles_n=tiles_n,
    transpose_w=transpose_w,
    precision=precision,
    config=config,
  )
  return launch(
    body,
    {
      "x": x,
      "w": w,
      "bias": bias,
      "rows_in": rows_in,
      "rows_out": rows_out,
      "experts": tiles.expert_ids,
      "first_rows": tiles.first_rows,
      "counts": tiles.num_rows,
    },
    jax.ShapeDtypeStruct(shape, dtype),
    num_programs=tiles.expert_ids.shape[0] * tiles_n * config.split_k,
    config=config,
    interpret=interpret,
    name="scatter2scatter",
  )


def _tile(
  gmem, y_gmem, *, num_experts, tiles_n, transpose_w, precision, config
):
  """Loads the tile's ids, multiplies over its part of K, stores its rows."""
  num_rows, d_out = y_gmem.shape[-2:]
  # Columns before rows: programs that run together share the rows of x, and
  # walk through one expert's matrix after another.
  program = pl.program_id(0)
  part, program = _divide(program, config.split_k)
  tile_n, tile_m = _divide(program, tiles_n)
  expert, count = gmem["experts"][tile_m], gmem["counts"][tile_m]
  first = gmem["first_rows"][tile_m]
  lanes = jnp.arange(config.block_m, dtype=jnp.int32)
  cols = tile_n * config.block_n + jnp.arange(config.block_n, dtype=jnp.int32)
  live_cols = (cols < d_out) if d_out % config.block_n else None

  def store_rows(acc):
    rows = first + lanes
    if "rows_out" in gmem:
      # Dead lanes aim past the end, where they meet no live row.
      rows = load(gmem["rows_out"], (rows,), lanes < count, other=num_rows)
    at = (rows[:, None], cols[None, :])
    if config.split_k > 1:
      at = (part, *at)
    store(y_gmem, at, acc, (lanes < count)[:, None], _row(live_cols))

  @pl.when((count > 0) & (expert < num_experts))
  def _multiply():
    # Dead lanes repeat the last live row, which costs no traffic of their own.
    rows = first + jnp.minimum(lanes, count - 1)
    if "rows_in" in gmem:
      rows = load(gmem["rows_in"], (rows,))
    acc = _contract(
      gmem["x"], gmem["w"], rows, expert, cols, live_cols, part,
      transpose_w=transpose_w, precision=precision, config=config,
    )  # fmt: skip
    if "bias" in gmem:
      bias = load(gmem["bias"], (expert, cols), live_cols).astype(jnp.float32)
      acc += jnp.where(part == 0, bias, jnp.zeros_like(bias))[None, :]
    store_rows(acc)

  @pl.when((count > 0) & (expert == num_experts))
  def _zero():
    store_rows(jnp.zeros((config.block_m, config.block_n), jnp.float32))


def _contract(
  x_gmem, w_gmem, rows, expert, cols, live_cols, part, *, transpose_w,
  precision, config,
):  # fmt: skip
  """Returns (block_m, block_n): x[rows] w[expert, :, cols], a part of K."""
  d_in = x_gmem.shape[1]
  steps = -(-d_in // (config.block_k * config.split_k))
  is_ragged = d_in % (config.block_k * config.split_k) != 0

  def step(i, acc):
    ks = (part * steps + i) * config.block_k
    ks += jnp.arange(config.block_k, dtype=jnp.int32)
    # Both operands are masked: zero times what lies past the end could be NaN.
    live_ks = (ks < d_in) if is_ragged else None
    x_tile = load(x_gmem, (rows[:, None], ks[None, :]), _row(live_ks))
    if transpose_w:
      at = (expert, cols[:, None], ks[None, :])
      w_tile = load(w_gmem, at, _column(live_cols), _row(live_ks))
    else:
      at = (expert, ks[:, None], cols[None, :])
      w_tile = load(w_gmem, at, _column(live_ks), _row(live_cols))
    return acc + lax.dot_general(
      x_tile,
      w_tile,
      (((1,), (1 if transpose_w else 0,)), ((), ())),
      precision=precision,
      preferred_element_type=jnp.float32,
    )

  acc = jnp.zeros((config.block_m, config.block_n), jnp.float32)
  # NumPy bounds: Python's would be 64-bit under jax_enable_x64.
  return lax.fori_loop(np.int32(0), np.int32(steps), step, acc)


def _divide(index, by):
  """Returns (index modulo by, index divided by it), for a static divisor."""
  if by == 1:
    return jnp.zeros_like(index), index
  return lax.rem(index, jnp.int32(by)), lax.div(index, jnp.int32(by))


def _row(mask):
  return None if mask is None else mask[None, :]


def _column(mask):
  return None if mask is None else mask[:, None]
