"""Rows times their expert's matrix: the body of one tile.

# M = S rows, K = d, N = n, G = E

#            N ->                    A program multiplies one tile: block_m rows
#   rows  +--------+--------+        of one expert by block_n columns, over the
#    e=0  | 0,0    | 0,1    |        whole contraction or, where tiles are too
#    e=0  | 1,0    | 1,1    | short  few to fill the device, over one of split_k
#    e=2  | 2,0    | 2,1    |        parts of it. Absent tiles return at once.
#   none  | 3,0    | 3,1    | zeros

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
from jaxtyping import Array, Float

from scattermoe_jax.kernels.schedule import max_windows, window_schedule
from scattermoe_jax.kernels.triton.launch import launch, load, store
from scattermoe_jax.kernels.triton.tiles import TritonConfig
from scattermoe_jax.routing import Routing

_NO_EXPERT = 2**31 - 1


def multiply_tiles(
  x: Float[Array, "rows K"],
  w: Float[Array, "G _ _"],
  bias: Float[Array, "G N"] | None,
  routing: Routing,
  *,
  grouped_in: bool,
  grouped_out: bool,
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
    routing: which expert each row belongs to.
    grouped_in: whether x is in grouped order.
    grouped_out: whether y is.
    transpose_w: whether w is stored transposed.
    precision: of the products.
    config: blocks, warps, stages and parts.
    interpret: whether to run in the interpreter.
  """
  num_experts, d_out = w.shape[0], w.shape[1 if transpose_w else 2]
  num_rows, tiles_n = routing.num_rows, -(-d_out // config.block_n)
  tiles = _tiles(routing, config.block_m)
  out_shape = jax.ShapeDtypeStruct((num_rows, d_out), x.dtype)
  if config.split_k > 1:
    out_shape = jax.ShapeDtypeStruct(
      (config.split_k, num_rows, d_out), jnp.float32
    )
  body = functools.partial(
    _tile,
    num_experts=num_experts,
    tiles_n=tiles_n,
    fan_out=None if grouped_in else num_rows // x.shape[0],
    grouped_out=grouped_out,
    transpose_w=transpose_w,
    precision=precision,
    config=config,
  )
  uses_ids = not (grouped_in and grouped_out)
  return launch(
    body,
    {
      "x": x,
      "w": w,
      "bias": bias,
      "scattered_ids": routing.scattered_ids if uses_ids else None,
      **tiles,
    },
    out_shape,
    num_programs=tiles["expert_ids"].shape[0] * tiles_n * config.split_k,
    config=config,
    interpret=interpret,
    name="scatter2scatter",
  )


def _tiles(routing, block_m) -> dict[str, Array]:
  """Returns what tells a program its tile: a schedule, or every row's expert.

  The rows of no group are one group more, expert G, whose tiles are zeroed.
  Where each row could be a tile, no schedule is made: a program per row finds
  out by itself whether a tile starts there, and a decode step is launches
  shorter.
  """
  num_rows = routing.num_rows
  if num_rows <= max_windows(num_rows, routing.num_experts, block_m):
    return {"expert_ids": routing.expert_ids}
  tiles = window_schedule(routing.group_sizes, num_rows, block_m)
  return {
    "expert_ids": tiles.expert_ids,
    "first_rows": tiles.first_rows,
    "counts": tiles.ends,
  }


def _tile(
  gmem, y_gmem, *, num_experts, tiles_n, fan_out, grouped_out, transpose_w,
  precision, config,
):  # fmt: skip
  """Loads the tile's ids, multiplies over its part of K, stores its rows."""
  num_rows, d_out = y_gmem.shape[-2:]
  # Columns before rows: programs that run together share the rows of x, and
  # walk through one expert's matrix after another.
  program = pl.program_id(0)
  part, program = _divide(program, config.split_k)
  tile_n, tile_m = _divide(program, tiles_n)
  expert, first, count = _rows_of_tile(gmem, tile_m, config.block_m)
  lanes = jnp.arange(config.block_m, dtype=jnp.int32)
  cols = tile_n * config.block_n + jnp.arange(config.block_n, dtype=jnp.int32)
  live_cols = (cols < d_out) if d_out % config.block_n else None

  def store_rows(acc):
    rows = first + lanes
    if not grouped_out:
      # Dead lanes aim past the end, where they meet no live row.
      ids = gmem["scattered_ids"]
      rows = load(ids, (rows,), lanes < count, other=num_rows)
    at = (rows[:, None], cols[None, :])
    parts = (part,) if config.split_k > 1 else ()
    store(y_gmem, (*parts, *at), acc, (lanes < count)[:, None], _row(live_cols))

  @pl.when((count > 0) & (expert < num_experts))
  def _multiply():
    # Dead lanes repeat the last live row, which costs no traffic of their own.
    rows = first + jnp.minimum(lanes, count - 1)
    if fan_out is not None:
      rows = lax.div(load(gmem["scattered_ids"], (rows,)), jnp.int32(fan_out))
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


def _rows_of_tile(gmem, tile, block_m):
  """Returns (expert, first row, rows) of a tile; no rows if it is absent."""
  expert = gmem["expert_ids"][tile]
  if "first_rows" in gmem:
    return expert, gmem["first_rows"][tile], gmem["counts"][tile]
  # The tile's number is a row. Counting the rows of lesser and of no greater
  # experts gives its group's ends; a tile starts every block_m rows of it.
  (num_rows,) = gmem["expert_ids"].shape
  rows = jnp.arange(1 << (num_rows - 1).bit_length(), dtype=jnp.int32)
  live = (rows < num_rows) if rows.size != num_rows else None
  experts = load(gmem["expert_ids"], (rows,), live, other=_NO_EXPERT)
  begin = jnp.sum(experts < expert, dtype=jnp.int32)
  end = jnp.sum(experts <= expert, dtype=jnp.int32)
  starts = lax.rem(tile - begin, jnp.int32(block_m)) == 0
  count = jnp.minimum(end - tile, jnp.int32(block_m))
  return expert, tile, jnp.where(starts, count, jnp.zeros_like(count))


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
