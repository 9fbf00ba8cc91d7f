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
num_programs-th tile in one loop over all their steps: no tile begins by waiting
for its rows, whose loads were begun while the last one was multiplied.

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
from jaxtyping import Array, Float, Int

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
    d_out: N.
    tiles_n: tiles side by side.
    fan_out: scattered rows per row of x; None if x is grouped.
    grouped_out: whether y is in grouped order.
    transpose_w: whether w is stored transposed.
    precision: of the products.
    config: blocks and parts.
  """

  d_out: int
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
  slice_index: Int[Array, ""] | None,
  *,
  d_out: int,
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
    slice_index: which slice of N columns of w is read; None if w has no more.
    d_out: N.
    grouped_in: whether x is in grouped order.
    grouped_out: whether y is.
    transpose_w: whether w is stored transposed.
    precision: of the products.
    config: blocks, warps, stages and parts.
    interpret: whether to run in the interpreter.
  """
  num_rows, tiles_n = routing.num_rows, -(-d_out // config.block_n)
  tiles = _tiles(routing, config)
  parts = (config.split_k,) if config.split_k > 1 else ()
  dtype = jnp.float32 if parts else x.dtype
  form = _Form(
    d_out=d_out,
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
      "slice_index": None if slice_index is None else slice_index[None],
      **tiles,
    },
    jax.ShapeDtypeStruct((*parts, num_rows, d_out), dtype),
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
  (expert, _, count), num_experts = found, gmem["w"].shape[0]

  @pl.when((count > 0) & (expert < num_experts))
  def _multiply():
    tile = _with_ids(gmem, found, form)
    _multiply_tile(gmem, y_gmem, tile, place, form)

  @pl.when((count > 0) & (expert == num_experts))
  def _zero():
    tile = _with_ids(gmem, found, form)
    _store_rows(y_gmem, tile, place, _zeros(form), form)


def _walk_tiles(gmem, y_gmem, *, form):
  """Multiplies, then zeroes, every num_programs-th tile from the program's.

  The steps of all its tiles are one loop: while a tile is stored, the first
  operands of the next are on their way.
  """
  program, stride = pl.program_id(0), jnp.int32(form.config.num_programs)
  columns = jnp.int32(form.tiles_n * form.config.split_k)
  # Tiles of no group come last.
  of_experts, in_use = (gmem["num_tiles"][i] * columns for i in range(2))
  (most,) = gmem["expert_ids"].shape
  steps = jnp.int32(_num_steps(gmem, form))
  first_column = _first_column(gmem, form)

  def read(number):
    row_tile = jnp.minimum(_place(number, form)[0], jnp.int32(most - 1))
    found = _rows_of_tile(gmem, row_tile, form.config.block_m)
    return number, _with_ids(gmem, found, form)

  def step(i, carry):
    acc, k, number, tile = carry
    number, tile = lax.cond(
      k == 0,
      lambda number, tile: read(number + stride),
      lambda number, tile: (number, tile),
      number,
      tile,
    )
    place = _place(number, form)[1]
    acc = _add_step(gmem, first_column, tile, place, k, acc, form)

    def store_and_clear(acc):
      _store_tile(gmem, y_gmem, tile, place, acc, form)
      return jnp.zeros_like(acc)

    is_last = k == steps - 1
    acc = lax.cond(is_last, store_and_clear, lambda acc: acc, acc)
    return acc, jnp.where(is_last, jnp.int32(0), k + 1), number, tile

  def zero(i, carry):
    number, tile = read(program + i * stride)
    _store_rows(y_gmem, tile, _place(number, form)[1], _zeros(form), form)
    return carry

  def mine_below(number):
    return lax.div(number - program + (stride - 1), stride)

  mine = mine_below(of_experts)
  start = (_zeros(form), jnp.int32(0), program - stride, _no_tile(gmem, form))
  lax.fori_loop(jnp.int32(0), mine * steps, step, start)
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


def _no_tile(gmem, form) -> _RowTile:
  """Returns what a program that walks holds before its first tile."""
  nothing, ids = jnp.int32(0), None
  if "scattered_ids" in gmem:
    ids = jnp.zeros((form.config.block_m,), jnp.int32)
  return _RowTile(nothing, nothing, nothing, ids)


def _multiply_tile(gmem, y_gmem, tile, place, form):
  """Multiplies the tile over its part of K, stores its rows."""
  first_column = _first_column(gmem, form)
  # NumPy bounds: Python's would be 64-bit under jax_enable_x64.
  acc = lax.fori_loop(
    np.int32(0),
    np.int32(_num_steps(gmem, form)),
    lambda k, acc: _add_step(gmem, first_column, tile, place, k, acc, form),
    _zeros(form),
  )
  _store_tile(gmem, y_gmem, tile, place, acc, form)


def _num_steps(gmem, form):
  """Returns how many steps a part of the contraction has."""
  d_in, config = gmem["x"].shape[1], form.config
  return -(-d_in // (config.block_k * config.split_k))


def _zeros(form):
  return jnp.zeros((form.config.block_m, form.config.block_n), jnp.float32)


def _first_column(gmem, form):
  """Returns which column of w is y's first; None if w has no others."""
  if "slice_index" not in gmem:
    return None
  return gmem["slice_index"][0] * jnp.int32(form.d_out)


def _add_step(gmem, first_column, tile, place, k, acc, form):
  """Returns acc + x[rows, ks] w[expert, ks, cols], ks of the part's step k."""
  (_, part), config = place, form.config
  lanes = _lanes(config.block_m)
  if form.fan_out is None:
    rows = tile.first + jnp.minimum(lanes, tile.num_rows - 1)
  else:
    rows = lax.div(tile.ids, jnp.int32(form.fan_out))
  cols, live_cols = _columns(place, form)
  if first_column is not None:
    cols += first_column
  ks = (part * _num_steps(gmem, form) + k) * config.block_k
  ks += _lanes(config.block_k)
  d_in = gmem["x"].shape[1]
  is_ragged = d_in % (config.block_k * config.split_k) != 0
  # Both operands are masked: zero times what lies past the end could be NaN.
  live_ks = (ks < d_in) if is_ragged else None
  x_tile = load(gmem["x"], (rows[:, None], ks[None, :]), as_row(live_ks))
  if form.transpose_w:
    at = (tile.expert, cols[:, None], ks[None, :])
    w_tile = load(gmem["w"], at, as_column(live_cols), as_row(live_ks))
  else:
    at = (tile.expert, ks[:, None], cols[None, :])
    w_tile = load(gmem["w"], at, as_column(live_ks), as_row(live_cols))
  return acc + lax.dot_general(
    x_tile,
    w_tile,
    (((1,), (1 if form.transpose_w else 0,)), ((), ())),
    precision=form.precision,
    preferred_element_type=jnp.float32,
  )


def _store_tile(gmem, y_gmem, tile, place, acc, form):
  """Stores a tile's sums, and the bias in their first part."""
  if "bias" in gmem:
    cols, live_cols = _columns(place, form)
    bias = load(gmem["bias"], (tile.expert, cols), live_cols)
    bias = bias.astype(jnp.float32)
    acc += jnp.where(place[1] == 0, bias, jnp.zeros_like(bias))[None, :]
  _store_rows(y_gmem, tile, place, acc, form)


def _store_rows(y_gmem, tile, place, acc, form):
  cols, live_cols = _columns(place, form)
  lanes = _lanes(form.config.block_m)
  live = lanes < tile.num_rows
  if form.grouped_out:
    rows = tile.first + lanes
  else:
    # Dead lanes aim past the end, where they meet no live row.
    rows = jnp.where(live, tile.ids, jnp.int32(y_gmem.shape[-2]))
  at = (rows[:, None], cols[None, :])
  parts = place[1:] if form.config.split_k > 1 else ()
  store(y_gmem, (*parts, *at), acc, live[:, None], as_row(live_cols))


def _columns(place, form):
  """Returns y's columns in a tile, and which are live; None if all are."""
  block_n = form.config.block_n
  cols = place[0] * block_n + _lanes(block_n)
  return cols, (cols < form.d_out) if form.d_out % block_n else None


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


def _divide(index, by):
  """Returns (index modulo by, index divided by it), for a static divisor."""
  if by == 1:
    return jnp.zeros_like(index), index
  return lax.rem(index, jnp.int32(by)), lax.div(index, jnp.int32(by))
