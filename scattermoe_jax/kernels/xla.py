"""The plain JAX backend: any dtype, any device, the truth for the others.

A loop over the tiles of the schedule, each one dense product of one expert. The
loop runs as often as there are tiles, so cost and memory follow the routed
rows. (`jax.lax.ragged_dot` instead multiplies every row by every expert outside
TPUs.) On a GPU a step of the loop costs some 20 us of launches whatever it
does, so there it takes many tiles at once, as one batched product.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scattermoe_jax._compat import current_device, vary_over, varying_axes
from scattermoe_jax.kernels import composed
from scattermoe_jax.kernels.contract import Columns, Problem, accumulator_dtype
from scattermoe_jax.kernels.schedule import TileSchedule, tile_schedule
from scattermoe_jax.routing import Routing, input_rows

# M = S rows, K = d, N = n, G = E


def check(problem: Problem) -> str | None:
  """Returns why `problem` cannot run here, or None: floating dtypes all can."""
  if not jnp.issubdtype(jnp.dtype(problem.dtype), jnp.floating):
    return f"dtype {problem.dtype} is not a floating-point dtype"
  return None


def block_rows(num_rows: int, num_experts: int) -> int:
  """Returns the rows of a tile: a power of two near the mean group size.

  Larger tiles waste work on short groups; smaller ones read w more often.
  """
  mean = -(-num_rows // num_experts)
  return min(max(1 << (mean - 1).bit_length(), 16), 512)


def tiles_per_step(block_m: int, d_in: int, d_out: int, itemsize: int) -> int:
  """Returns how many tiles a step of the loop takes: one, or many on a GPU.

  As many as keep what a step copies, w and rows of both widths, below 256 MiB.
  """
  if current_device().platform != "gpu":
    return 1
  copied = (d_in * d_out + block_m * (d_in + d_out)) * itemsize
  return max(2**28 // copied, 1)


def _tile(
  routing: Routing,
  d_in: int,
  d_out: int,
  itemsize: int,
  block_m: int | None,
  step_tiles: int | None,
) -> tuple[int, int]:
  """Returns the rows of a tile and the tiles of a step, if not given."""
  block_m = block_m or block_rows(routing.num_rows, routing.num_experts)
  if step_tiles is None:
    step_tiles = tiles_per_step(block_m, d_in, d_out, itemsize)
    if step_tiles > 1:
      block_m *= 2  # so that most experts are one tile
  return block_m, step_tiles


def scatter2scatter(
  x: Float[Array, "rows d"],
  w: Float[Array, "E _ _"],
  routing: Routing,
  *,
  bias: Float[Array, "E n"] | None = None,
  grouped_in: bool = False,
  grouped_out: bool = False,
  transpose_w: bool = False,
  columns: Columns | None = None,
  precision: lax.PrecisionLike = None,
  block_m: int | None = None,
  step_tiles: int | None = None,
) -> Float[Array, "S _"]:
  """Returns y with y[row] = x[row] @ w[expert of row] + bias[expert of row].

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `grouped_in`.
    w: (E, d, n), or (E, n, d) if `transpose_w`.
    routing: the routing.
    bias: (E, n), added to the rows of its expert.
    grouped_in: whether x is in grouped order.
    grouped_out: whether y is.
    transpose_w: whether to multiply by the transpose of w[e].
    columns: the slice of y that is made; all of it if None.
    precision: of the products, as `jax.lax.dot_general` takes it.
    block_m: rows of a tile; by the mean group size if None.
    step_tiles: tiles of a step; `tiles_per_step` if None.
  """
  if columns is not None:
    w = columns.of(w, 1 if transpose_w else 2)
    bias = None if bias is None else columns.of(bias, 1)
  num_rows = routing.num_rows
  d_in, d_out = x.shape[1], w.shape[1 if transpose_w else 2]
  if num_rows == 0:
    return jnp.zeros((0, d_out), x.dtype)
  widths = d_in, d_out, x.dtype.itemsize
  block_m, step_tiles = _tile(routing, *widths, block_m, step_tiles)
  tiles = tile_schedule(routing.group_sizes, num_rows, block_m)
  step_tiles = min(step_tiles, tiles.expert_ids.shape[0])
  x_rows = input_rows(routing, x.shape[0], grouped=grouped_in)
  y_rows = input_rows(routing, num_rows, grouped=grouped_out)
  contract = (((2,), (2 if transpose_w else 1,)), ((0,), (0,)))

  def multiply_tiles(i, y):
    taken = i * step_tiles + jnp.arange(step_tiles, dtype=jnp.int32)
    experts = _take(tiles.expert_ids, taken)
    rows, live = _rows_of(tiles, taken, block_m)
    y_tiles = lax.dot_general(
      x[_take(x_rows, rows)],
      w[experts],
      contract,
      precision=precision,
      preferred_element_type=accumulator_dtype(x.dtype),
    )
    if bias is not None:
      y_tiles += bias[experts].astype(y_tiles.dtype)[:, None, :]
    # Rows past a group's end aim past y's, each at a place of its own.
    dead = num_rows + jnp.arange(rows.size, dtype=jnp.int32)
    at = jnp.where(live, _take(y_rows, rows), dead.reshape(rows.shape))
    return y.at[at].set(
      y_tiles.astype(y.dtype), mode="drop", unique_indices=True
    )

  # What no tile writes remains zero: the rows of no group.
  y = jnp.zeros((num_rows, d_out), x.dtype)
  y = vary_over(y, varying_axes(x, w, routing, bias))
  steps = -(-tiles.num_tiles // step_tiles)
  return lax.fori_loop(0, steps, multiply_tiles, y)


def group_xty(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  routing: Routing,
  *,
  x_grouped: bool = False,
  y_grouped: bool = False,
  precision: lax.PrecisionLike = None,
  block_m: int | None = None,
  step_tiles: int | None = None,
) -> Float[Array, "E d n"]:
  """Returns xty[e] = x_e^T y_e over the rows of expert e.

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `x_grouped`.
    y: (T, n) or (S, n) scattered, or (S, n) if `y_grouped`.
    routing: the routing.
    x_grouped: whether x is in grouped order.
    y_grouped: whether y is.
    precision: of the products, as `jax.lax.dot_general` takes it.
    block_m: rows of a tile; by the mean group size if None.
    step_tiles: tiles of a step; `tiles_per_step` if None.
  """
  num_rows, num_experts = routing.num_rows, routing.num_experts
  d_in, d_out = x.shape[1], y.shape[1]
  xty = jnp.zeros((num_experts, d_in, d_out), x.dtype)
  if num_rows == 0:
    return xty
  widths = d_in, d_out, x.dtype.itemsize
  block_m, step_tiles = _tile(routing, *widths, block_m, step_tiles)
  tiles = tile_schedule(routing.group_sizes, num_rows, block_m)
  step_tiles = min(step_tiles, tiles.expert_ids.shape[0])
  sides = (
    (x, input_rows(routing, x.shape[0], grouped=x_grouped)),
    (y, input_rows(routing, y.shape[0], grouped=y_grouped)),
  )

  def products(taken):
    """Returns (tiles, d, n), the partial sums of some tiles."""
    rows, live = _rows_of(tiles, taken, block_m)
    # Both operands are masked: zero times a neighbour's NaN would be NaN.
    x_tiles, y_tiles = (
      jnp.where(live[:, :, None], a[_take(a_rows, rows)], 0)
      for a, a_rows in sides
    )
    return lax.dot_general(
      x_tiles,
      y_tiles,
      (((1,), (1,)), ((0,), (0,))),
      precision=precision,
      preferred_element_type=accumulator_dtype(x.dtype),
    )

  # An expert of one tile is done in one product, many of them at a time. The
  # others add up tile by tile, in order: no atomics, the same bits every time.
  is_single = _take(routing.group_sizes, tiles.expert_ids) <= block_m
  singles = _where(is_single & (tiles.num_rows > 0))
  others = _where(~is_single & (tiles.num_rows > 0))

  def set_tiles(i, xty):
    taken = i * step_tiles + jnp.arange(step_tiles, dtype=jnp.int32)
    taken = singles.at[taken].get(mode="fill", fill_value=singles.size)
    dead = num_experts + jnp.arange(step_tiles, dtype=jnp.int32)
    at = jnp.where(taken < singles.size, _take(tiles.expert_ids, taken), dead)
    return xty.at[at].set(
      products(taken).astype(xty.dtype), mode="drop", unique_indices=True
    )

  def add_tile(i, carry):
    xty, total = carry
    expert = tiles.expert_ids[others[i]]
    last = tiles.expert_ids[others[jnp.maximum(i - 1, 0)]]
    total = jnp.where((i > 0) & (expert == last), total, 0)
    total += products(others[i][None])[0]
    return xty.at[expert].set(total.astype(xty.dtype)), total

  axes = varying_axes(x, y, routing)
  steps = -(-jnp.sum(singles < singles.size, dtype=jnp.int32) // step_tiles)
  xty = lax.fori_loop(0, steps, set_tiles, vary_over(xty, axes))
  total = jnp.zeros((d_in, d_out), accumulator_dtype(x.dtype))
  steps = jnp.sum(others < others.size, dtype=jnp.int32)
  carry = xty, vary_over(total, axes)
  return lax.fori_loop(0, steps, add_tile, carry)[0]


(
  up_projection,
  down_projection,
  down_projection_grad,
  up_projection_grad,
) = composed.fused_forms(scatter2scatter, group_xty, unroll=False)


def _rows_of(
  tiles: TileSchedule, taken: Int[Array, " C"], block_m: int
) -> tuple[Int[Array, "C B"], Bool[Array, "C B"]]:
  """Returns the grouped rows of some tiles, and which are theirs."""
  lanes = jnp.arange(block_m, dtype=jnp.int32)[None, :]
  rows = _take(tiles.first_rows, taken)[:, None] + lanes
  return rows, lanes < _take(tiles.num_rows, taken)[:, None]


def _take(a: Int[Array, " L"], at: Int[Array, "*at"]) -> Int[Array, "*at"]:
  """Returns a[at]; zero past its end, so that absent tiles have no rows."""
  return a.at[at].get(mode="fill", fill_value=0)


def _where(mask: Bool[Array, " L"]) -> Int[Array, " L"]:
  """Returns the places where the mask holds, ascending; then L."""
  (places,) = jnp.nonzero(mask, size=mask.size, fill_value=mask.size)
  return places.astype(jnp.int32)
