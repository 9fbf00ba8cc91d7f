"""The fused forms of the contract, composed of its two products.

What a backend without fused kernels of its own runs, and the equations that
fused kernels must equal.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax._compat import vary_over, varying_axes
from scattermoe_jax.kernels.contract import Columns, accumulator_dtype
from scattermoe_jax.routing import Routing, take_rows


class FusedForms(NamedTuple):
  """The fused forms of a backend, by their names in the contract."""

  up_projection: Callable[..., Any]
  down_projection: Callable[..., Any]
  down_projection_grad: Callable[..., Any]
  up_projection_grad: Callable[..., Any]


def fused_forms(
  scatter2scatter: Callable[..., Array],
  group_xty: Callable[..., Array],
  *,
  unroll: bool = True,
) -> FusedForms:
  """Returns the forms below, composed of a backend's products.

  Args:
    scatter2scatter: the one.
    group_xty: the other.
    unroll: see `by_columns`.
  """
  slices = functools.partial(by_columns, unroll=unroll)
  return FusedForms(
    functools.partial(up_projection, scatter2scatter),
    functools.partial(down_projection, scatter2scatter, slices),
    functools.partial(down_projection_grad, scatter2scatter),
    functools.partial(up_projection_grad, scatter2scatter, group_xty, slices),
  )


def up_projection(
  scatter2scatter: Callable[..., Array],
  x: Float[Array, "rows d"],
  w: Float[Array, "E d m"],
  routing: Routing,
  *,
  bias: Float[Array, "E m"] | None,
  activation: Any,
  keep_h: bool,
  precision: Any = None,
) -> tuple[Float[Array, "S m"] | None, Float[Array, "S n"]]:
  """Returns (h, a): h = x w_e (None unless `keep_h`) and a = activation(h)."""
  h = scatter2scatter(
    x, w, routing, bias=bias, grouped_out=True, precision=precision
  )
  a = activation.apply(h)
  return (h if keep_h else None), a


def down_projection(
  scatter2scatter: Callable[..., Array],
  by_columns: Callable[..., Array],
  x: Float[Array, "rows n"],
  w: Float[Array, "E n d"],
  gates: Float[Array, "T k"],
  routing: Routing,
  *,
  bias: Float[Array, "E d"] | None = None,
  grouped_in: bool = True,
  num_chunks: int = 1,
  precision: Any = None,
) -> Float[Array, "T d"]:
  """Returns out[t] = sum_j gates[t, j] (x w_e + bias_e)[row of choice j]."""

  def rows_out(x, columns, grouped_out=True):
    return scatter2scatter(
      x,
      w,
      routing,
      bias=bias,
      grouped_in=grouped_in,
      grouped_out=grouped_out,
      columns=columns,
      precision=precision,
    )

  if routing.top_k == 1:
    # A token's only row is stored where the token lies: none is expanded.
    return weighted_rows(rows_out(x, None, grouped_out=False), gates, routing)

  def weighted(x, columns):
    return weighted_sum(rows_out(x, columns), gates, routing)

  return by_columns(weighted, x, w.shape[2], num_chunks)


def down_projection_grad(
  scatter2scatter: Callable[..., Array],
  dy: Float[Array, "T d"],
  w: Float[Array, "E n d"],
  h: Float[Array, "S m"],
  gates: Float[Array, " S"],
  routing: Routing,
  *,
  activation: Any,
  precision: Any = None,
) -> tuple[Float[Array, "S m"], Float[Array, "S n"], Float[Array, " S"]]:
  """Returns (dh, weighted_a, dgates), the backward down to the pre-activation.

  da' = dy w_e^T; dgates = <da', a>; dh = (gates da') dact/dh;
  weighted_a = gates a. The gate gradient needs no row of y, since
  <dy, a w> = <dy w^T, a>.
  """
  da = scatter2scatter(
    dy, w, routing, grouped_out=True, transpose_w=True, precision=precision
  )
  return activation_grad(da, h, gates, activation)


def activation_grad(
  da: Float[Array, "S n"],
  h: Float[Array, "S m"],
  gates: Float[Array, " S"],
  activation: Any,
) -> tuple[Float[Array, "S m"], Float[Array, "S n"], Float[Array, " S"]]:
  """Returns (dh, weighted_a, dgates) from the unweighted da'."""
  wide = accumulator_dtype(da.dtype)
  da_wide, gate = da.astype(wide), gates.astype(wide)[:, None]
  a, dh = activation.value_and_vjp(h.astype(wide), gate * da_wide)
  dgates = (da_wide * a).sum(axis=-1)
  return dh.astype(h.dtype), (gate * a).astype(da.dtype), dgates


def up_projection_grad(
  scatter2scatter: Callable[..., Array],
  group_xty: Callable[..., Array],
  by_columns: Callable[..., Array],
  x: Float[Array, "T d"],
  w: Float[Array, "E d m"],
  dh: Float[Array, "S m"],
  routing: Routing,
  *,
  num_chunks: int = 1,
  at_once: bool = False,
  precision: Any = None,
) -> tuple[Float[Array, "T d"], Float[Array, "E d m"]]:
  """Returns (dx, dw) of h = x w_e: dx[t] = sum_j dh w_e^T, dw = x^T dh."""
  del at_once
  if routing.top_k == 1:
    # A token's only row is its sum, and stored where the token lies.
    dx = rows_of_dx(scatter2scatter, w, dh, routing, precision=precision)
  else:

    def summed(dh, columns):
      options = dict(grouped_out=True, columns=columns, precision=precision)
      rows = rows_of_dx(scatter2scatter, w, dh, routing, **options)
      return sum_choices(rows, routing)

    dx = by_columns(summed, dh, x.shape[1], num_chunks)
    # One after the other, so that rows are gone before the product is there.
    dx, dh = lax.optimization_barrier((dx, dh))
  dw = group_xty(x, dh, routing, y_grouped=True, precision=precision)
  return dx, dw


def rows_of_dx(
  scatter2scatter: Callable[..., Array],
  w: Float[Array, "E d m"],
  dh: Float[Array, "S m"],
  routing: Routing,
  **options: Any,
) -> Float[Array, "S _"]:
  """Returns dh w_e^T for each choice: what is summed to dx."""
  return scatter2scatter(
    dh, w, routing, grouped_in=True, transpose_w=True, **options
  )


def by_columns(
  make: Callable[[Array, Columns | None], Array],
  rows: Float[Array, "S _"],
  width: int,
  num_chunks: int,
  *,
  unroll: bool = True,
) -> Float[Array, "T _"]:
  """Returns `make(rows, columns)` of all columns, slice after slice.

  Each slice waits for the one before, so that what it needs is held once.

  Args:
    make: returns the slice `columns`, all of them if None.
    rows: what it is made of.
    width: of all slices together.
    num_chunks: slices.
    unroll: not to loop. In a loop a kernel's schedule would be made anew in
      every turn, and sums be stored two bytes at a time, at columns that the
      compiler does not know. What is no kernel makes copies, though, and those
      heed no barrier.
  """
  if num_chunks == 1:
    return make(rows, None)
  slice_width = width // num_chunks

  @jax.jit  # Lowered once, for all slices.
  def one_slice(rows, index):
    return make(rows, Columns(index, slice_width))

  def fill(index, carry):
    rows, out = carry
    columns, start = one_slice(rows, index), index * slice_width
    out = lax.dynamic_update_slice_in_dim(out, columns, start, axis=1)
    return lax.optimization_barrier((rows, out))

  like = jax.eval_shape(one_slice, rows, 0)
  # Every column is written: zeros here would be a pass over memory for nothing.
  out = lax.empty((like.shape[0], width), like.dtype)
  out = vary_over(out, varying_axes(rows, like))
  return lax.fori_loop(0, num_chunks, fill, (rows, out), unroll=unroll)[1]


def sum_choices(
  rows: Float[Array, "S w"], routing: Routing
) -> Float[Array, "T w"]:
  """Returns out[t] = sum_j rows[grouped row of choice j of t]."""
  choices = take_rows(rows, routing.grouped_ids)
  wide = accumulator_dtype(rows.dtype)
  return jnp.sum(choices, axis=1, dtype=wide).astype(rows.dtype)


def weighted_sum(
  y: Float[Array, "S d"], gates: Float[Array, "T k"], routing: Routing
) -> Float[Array, "T d"]:
  """Returns out[t] = sum_j gates[t, j] y[grouped row of choice j of t].

  Choices that are 'not here' add nothing, whatever their gates hold.
  """
  wide = accumulator_dtype(y.dtype)
  choices = take_rows(y, routing.grouped_ids).astype(wide)
  gates = gates_here(gates, routing)
  return jnp.sum(gates.astype(wide)[:, :, None] * choices, axis=1).astype(
    y.dtype
  )


def weighted_rows(
  y: Float[Array, "T d"], gates: Float[Array, "T 1"], routing: Routing
) -> Float[Array, "T d"]:
  """Returns `weighted_sum` of rows that lie as their tokens do, for k = 1."""
  wide = accumulator_dtype(y.dtype)
  gates = gates_here(gates, routing).astype(wide)
  return (gates * y.astype(wide)).astype(y.dtype)


def gates_here(
  gates: Float[Array, "T k"], routing: Routing
) -> Float[Array, "T k"]:
  """Returns the gates, zero for 'not here'."""
  # What is not here sorts last, so that a number tells it, where another gather
  # would be a kernel of its own. Its gates may be NaN, which no zero stops.
  num_here = jnp.sum(routing.group_sizes, dtype=jnp.int32)
  here = routing.grouped_ids < num_here
  return jnp.where(here, gates, jnp.zeros_like(gates))


def gates_of_rows(
  gates: Float[Array, "T k"], routing: Routing
) -> Float[Array, " S"]:
  """Returns the gate of each grouped row; zero for 'not here'."""
  row_gates = take_rows(gates.reshape(-1), routing.scattered_ids)
  here = routing.expert_ids < routing.num_experts
  return jnp.where(here, row_gates, jnp.zeros_like(row_gates))
