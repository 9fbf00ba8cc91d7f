"""Rows times their expert's matrix: the body of a program.

# M = S rows, K = d, N = n, G = E

#            N ->                    A tile is block_m rows of one expert by
#   rows  +--------+--------+        block_n columns, over the whole contraction
#    e=0  | 0,0    | 0,1    |        or, where tiles are too few to fill the
#    e=0  | 1,0    | 1,1    | short  device, over one of split_k parts of it.
#    e=2  | 2,0    | 2,1    |
#   none  | 3,0    | 3,1    | zeros

Few tiles are a program each, and absent ones return at once. Where there are
many times more tiles than cores, there is a program per core, which walks every
num_programs-th tile: it reads the ids of its next tile before it multiplies
this one, so that no tile begins by waiting for them.

Rows are gathered as they are loaded and, where asked, scattered as they are
stored. Source: ScatterMoE (Tan et al., 2024), scatter2scatter. Its Triton
kernel walks every expert between a tile's first and last row; these tiles
never straddle two experts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from scattermoe_jax.kernels.schedule import max_windows, window_schedule
from scattermoe_jax.kernels.triton.launch import (
  as_column,
  as_row,
  launch,
  load,
  store,
)
from scattermoe_jax.kernels.triton.tiles import TritonConfig
from scattermoe_jax.routing import Routing

_NO_EXPERT = 2**31 - 1


class _Form(NamedTuple):
  """What is static about a launch.

  Attributes:
    num_experts: G.
    tiles_n: tiles side by side.
    fan_out: scattered rows per row of x; None if x is grouped.
    grouped_out: whether y is in grouped order.
    transpose_w: whether w is stored transposed.
    precision: of the products.
    config: blocks and parts.
  """

  num_experts: int
  tiles_n: int
  fan_out: int | None
  grouped_out: bool
  transpose_w: bool
  precision: Any
  config: TritonConfig


class _RowTile(NamedTuple):
  """Which rows a tile has, as its program has read them.

  Attributes:
    expert: whose rows they are; G for rows of no group.
    first: the first of them, grouped.
    num_rows: how many, at most block_m; 0 if the tile is absent.
    ids: scattered ids of block_m rows, the last live one repeated: that costs
      no traffic of its own. None where both x and y are grouped.
  """

  expert: Array
  first: Array
  num_rows: Array
  ids: Array | None


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
  tiles = _tiles(routing, config)
  out_shape = jax.ShapeDtypeStruct((num_rows, d_out), x.dtype)
  if config.split_k > 1:
    out_shape = jax.ShapeDtypeStruct(
      (config.split_k, num_rows, d_out), jnp.float32
    )
  form = _Form(
    num_experts=num_experts,
    tiles_n=tiles_n,
    fan_out=None if grouped_in else num_rows // x.shape[0],
    grouped_out=grouped_out,
    transpose_w=transpose_w,
    precision=precision,
    config=config,
  )
  body, num_programs = _walk_tiles, config.num_programs
  if num_programs is None:
    num_programs = tiles["expert_ids"].shape[0] * tiles_n * config.split_k
    body = _one_tile
  uses_ids = not (grouped_in and grouped_out)
  return launch(
    functools.partial(body, form=form),
    {
      "x": x,
      "w": w,
      "bias": bias,
      "scattered_ids": routing.scattered_ids if uses_ids else None,
      **tiles,
    },
    out_shape,
    num_programs=num_programs,
    config=config,
    interpret=interpret,
    name="scatter2scatter",
  )


def _tiles(routing, config) -> dict[str, Array]:
  """Returns what tells a program its tiles: a schedule, or every row's expert.

  The rows of no group are one group more, expert G, whose tiles are zeroed.
  Where each row could be a tile, no schedule is made: a program per row finds
  out by itself whether a tile starts there, and a decode step is launches
  shorter. Programs that walk have a schedule, and are told how many of its row
  tiles are an expert's and how many are in use.
  """
  num_rows, num_experts = routing.num_rows, routing.num_experts
  walks = config.num_programs is not None
  if not walks and num_rows <= max_windows(
    num_rows, num_experts, config.block_m
  ):
    return {"expert_ids": routing.expert_ids}
  tiles = window_schedule(routing.group_sizes, num_rows, config.block_m)
  found = {
    "expert_ids": tiles.expert_ids,
    "first_rows": tiles.first_rows,
    "counts": tiles.ends,
  }
  if walks:
    of_experts = jnp.sum(tiles.expert_ids < num_experts, dtype=jnp.int32)
    found["num_tiles"] = jnp.stack([of_experts, tiles.num_tiles])
  return found


def _one_tile(gmem, y_gmem, *, form):
  """Multiplies or zeroes the tile that has the program's number."""
  row_tile, place = _place(pl.program_id(0), form)
  found = _rows_of_tile(gmem, row_tile, form.config.block_m)
  expert, _, count = found

  @pl.when((count > 0) & (expert < form.num_experts))
  def _multiply():
    tile = _with_ids(gmem, found, form)
    _multiply_tile(gmem, y_gmem, tile, place, form)

  @pl.when((count > 0) & (expert == form.num_experts))
  def _zero():
    tile = _with_ids(gmem, found, form)
    _zero_tile(y_gmem, tile, place, form)


def _walk_tiles(gmem, y_gmem, *, form):
  """Multiplies, then zeroes, every num_programs-th tile from the program's."""
  program, stride = pl.program_id(0), jnp.int32(form.config.num_programs)
  columns = jnp.int32(form.tiles_n * form.config.split_k)
  # Tiles of no group come last.
  of_experts, in_use = (gmem["num_tiles"][i] * columns for i in range(2))
  (most,) = gmem["expert_ids"].shape

  def read(number):
    row_tile = jnp.minimum(_place(number, form)[0], jnp.int32(most - 1))
    found = _rows_of_tile(gmem, row_tile, form.config.block_m)
    return _with_ids(gmem, found, form)

  def multiply(i, tile):
    number = program + i * stride
    following = read(number + stride)
    _multiply_tile(gmem, y_gmem, tile, _place(number, form)[1], form)
    return following

  def zero(i, carry):
    number = program + i * stride
    _zero_tile(y_gmem, read(number), _place(number, form)[1], form)
    return carry

  def mine_below(number):
    return lax.div(number - program + (stride - 1), stride)

  mine = mine_below(of_experts)
  lax.fori_loop(jnp.int32(0), mine, multiply, read(program))
  lax.fori_loop(mine, mine_below(in_use), zero, jnp.int32(0))


def _place(number, form):
  """Returns a tile's row tile and its (column tile, part of K).

  Columns before rows: programs that run together share the rows of x, and walk
  through one expert's matrix after another.
  """
  part, number = _divide(number, form.config.split_k)
  tile_n, tile_m = _divide(number, form.tiles_n)
  return tile_m, (tile_n, part)


def _with_ids(gmem, found, form) -> _RowTile:
  expert, first, count = found
  if "scattered_ids" not in gmem:
    return _RowTile(expert, first, count, None)
  last = jnp.maximum(count - 1, 0)  # Of an absent tile, any row will do.
  rows = first + jnp.minimum(_lanes(form.config.block_m), last)
  ids = load(gmem["scattered_ids"], (rows,))
  return _RowTile(expert, first, count, ids)


def _multiply_tile(gmem, y_gmem, tile, place, form):
  """Multiplies the tile over its part of K, stores its rows."""
  tile_n, part = place
  if form.fan_out is None:
    lanes = _lanes(form.config.block_m)
    rows = tile.first + jnp.minimum(lanes, tile.num_rows - 1)
  else:
    rows = lax.div(tile.ids, jnp.int32(form.fan_out))
  cols, live_cols = _columns(tile_n, y_gmem.shape[-1], form)
  acc = _contract(
    gmem["x"], gmem["w"], rows, tile.expert, cols, live_cols, part, form
  )
  if "bias" in gmem:
    at = (tile.expert, cols)
    bias = load(gmem["bias"], at, live_cols).astype(jnp.float32)
    acc += jnp.where(part == 0, bias, jnp.zeros_like(bias))[None, :]
  _store_rows(y_gmem, tile, place, acc, form)


def _zero_tile(y_gmem, tile, place, form):
  acc = jnp.zeros((form.config.block_m, form.config.block_n), jnp.float32)
  _store_rows(y_gmem, tile, place, acc, form)


def _store_rows(y_gmem, tile, place, acc, form):
  tile_n, part = place
  num_rows, d_out = y_gmem.shape[-2:]
  cols, live_cols = _columns(tile_n, d_out, form)
  lanes = _lanes(form.config.block_m)
  live = lanes < tile.num_rows
  if form.grouped_out:
    rows = tile.first + lanes
  else:
    # Dead lanes aim past the end, where they meet no live row.
    rows = jnp.where(live, tile.ids, jnp.int32(num_rows))
  at = (rows[:, None], cols[None, :])
  parts = (part,) if form.config.split_k > 1 else ()
  store(y_gmem, (*parts, *at), acc, live[:, None], as_row(live_cols))


def _columns(tile_n, d_out, form):
  """Returns the columns of a tile, and which are live; None if all are."""
  block_n = form.config.block_n
  cols = tile_n * block_n + _lanes(block_n)
  return cols, (cols < d_out) if d_out % block_n else None


def _lanes(size):
  return jnp.arange(size, dtype=jnp.int32)


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


def _contract(x_gmem, w_gmem, rows, expert, cols, live_cols, part, form):
  """Returns (block_m, block_n): x[rows] w[expert, :, cols], a part of K."""
  config, transpose_w = form.config, form.transpose_w
  d_in = x_gmem.shape[1]
  steps = -(-d_in // (config.block_k * config.split_k))
  is_ragged = d_in % (config.block_k * config.split_k) != 0

  def step(i, acc):
    ks = (part * steps + i) * config.block_k
    ks += jnp.arange(config.block_k, dtype=jnp.int32)
    # Both operands are masked: zero times what lies past the end could be NaN.
    live_ks = (ks < d_in) if is_ragged else None
    x_tile = load(x_gmem, (rows[:, None], ks[None, :]), as_row(live_ks))
    if transpose_w:
      at = (expert, cols[:, None], ks[None, :])
      w_tile = load(w_gmem, at, as_column(live_cols), as_row(live_ks))
    else:
      at = (expert, ks[:, None], cols[None, :])
      w_tile = load(w_gmem, at, as_column(live_ks), as_row(live_cols))
    return acc + lax.dot_general(
      x_tile,
      w_tile,
      (((1,), (1 if transpose_w else 0,)), ((), ())),
      precision=form.precision,
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
