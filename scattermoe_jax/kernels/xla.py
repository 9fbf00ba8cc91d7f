"""The plain JAX backend: any dtype, any device, the truth for the others.

One loop over the tiles of the schedule, each one dense product of one expert.
The loop runs as often as there are tiles, so cost and memory follow the routed
rows. (`jax.lax.ragged_dot` instead multiplies every row by every expert outside
TPUs.)
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from scattermoe_jax._compat import vary_over, varying_axes
from scattermoe_jax.kernels import composed
from scattermoe_jax.kernels.contract import Problem, accumulator_dtype
from scattermoe_jax.kernels.schedule import tile_schedule
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


def scatter2scatter(
  x: Float[Array, "rows d"],
  w: Float[Array, "E _ _"],
  routing: Routing,
  *,
  bias: Float[Array, "E n"] | None = None,
  grouped_in: bool = False,
  grouped_out: bool = False,
  transpose_w: bool = False,
  precision: lax.PrecisionLike = None,
  block_m: int | None = None,
) -> Float[Array, "S n"]:
  """Returns y with y[row] = x[row] @ w[expert of row] + bias[expert of row].

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `grouped_in`.
    w: (E, d, n), or (E, n, d) if `transpose_w`.
    routing: the routing.
    bias: (E, n), added to the rows of its expert.
    grouped_in: whether x is in grouped order.
    grouped_out: whether y is.
    transpose_w: whether to multiply by the transpose of w[e].
    precision: of the products, as `jax.lax.dot_general` takes it.
    block_m: rows of a tile; by the mean group size if None.
  """
  num_rows = routing.num_rows
  d_out = w.shape[1 if transpose_w else 2]
  if num_rows == 0:
    return jnp.zeros((0, d_out), x.dtype)
  block_m = block_m or block_rows(num_rows, routing.num_experts)
  tiles = tile_schedule(routing.group_sizes, num_rows, block_m)
  rows_in = _pad_rows(
    input_rows(routing, x.shape[0], grouped=grouped_in), block_m
  )
  contract = (((1,), (1 if transpose_w else 0,)), ((), ()))

  def multiply_tile(i, y):
    first_row, expert = tiles.first_rows[i], tiles.expert_ids[i]
    x_tile = x[lax.dynamic_slice(rows_in, (first_row,), (block_m,))]
    y_tile = lax.dot_general(
      x_tile,
      w[expert],
      contract,
      precision=precision,
      preferred_element_type=accumulator_dtype(x.dtype),
    )
    if bias is not None:
      y_tile += bias[expert].astype(y_tile.dtype)[None, :]
    # Rows past the group's end are zero until the next tile overwrites them:
    # what remains zero at the end is the rows of no group.
    y_tile = jnp.where(_live(tiles.num_rows[i], block_m), y_tile, 0)
    return lax.dynamic_update_slice(
      y, y_tile.astype(y.dtype), (first_row, jnp.zeros_like(first_row))
    )

  y = jnp.zeros((num_rows + block_m, d_out), x.dtype)
  y = vary_over(y, varying_axes(x, w, routing, bias))
  y = lax.fori_loop(0, tiles.num_tiles, multiply_tile, y)
  if grouped_out:
    return y[:num_rows]
  return y[routing.grouped_ids.reshape(num_rows)]


def group_xty(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  routing: Routing,
  *,
  x_grouped: bool = False,
  y_grouped: bool = False,
  precision: lax.PrecisionLike = None,
  block_m: int | None = None,
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
  """
  num_rows, num_experts = routing.num_rows, routing.num_experts
  d_in, d_out = x.shape[1], y.shape[1]
  xty = jnp.zeros((num_experts, d_in, d_out), x.dtype)
  if num_rows == 0:
    return xty
  block_m = block_m or block_rows(num_rows, num_experts)
  tiles = tile_schedule(routing.group_sizes, num_rows, block_m)
  x_rows = _pad_rows(
    input_rows(routing, x.shape[0], grouped=x_grouped), block_m
  )
  y_rows = _pad_rows(
    input_rows(routing, y.shape[0], grouped=y_grouped), block_m
  )

  def add_tile(i, carry):
    xty, total = carry
    first_row, expert = tiles.first_rows[i], tiles.expert_ids[i]
    live = _live(tiles.num_rows[i], block_m)
    # Both operands are masked: zero times a neighbour's NaN would be NaN.
    x_tile, y_tile = (
      jnp.where(live, a[lax.dynamic_slice(rows, (first_row,), (block_m,))], 0)
      for a, rows in ((x, x_rows), (y, y_rows))
    )
    partial = lax.dot_general(
      x_tile,
      y_tile,
      (((0,), (0,)), ((), ())),
      precision=precision,
      preferred_element_type=accumulator_dtype(x.dtype),
    )
    continues = (i > 0) & (expert == tiles.expert_ids[jnp.maximum(i - 1, 0)])
    total = jnp.where(continues, total, 0) + partial
    return xty.at[expert].set(total.astype(xty.dtype)), total

  total = jnp.zeros((d_in, d_out), accumulator_dtype(x.dtype))
  carry = vary_over((xty, total), varying_axes(x, y, routing))
  return lax.fori_loop(0, tiles.num_tiles, add_tile, carry)[0]


up_projection = functools.partial(composed.up_projection, scatter2scatter)
down_projection_grad = functools.partial(
  composed.down_projection_grad, scatter2scatter
)


def _pad_rows(rows: Int[Array, " S"], block_m: int) -> Int[Array, " _"]:
  # The last tile may reach past the end; its rows there are masked.
  return jnp.pad(rows, (0, block_m))


def _live(num_rows: Int[Array, ""], block_m: int) -> Array:
  return (jnp.arange(block_m, dtype=jnp.int32) < num_rows)[:, None]
