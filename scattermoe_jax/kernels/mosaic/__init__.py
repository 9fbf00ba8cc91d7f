"""The Hopper backend: Pallas Mosaic GPU.

`check` asks for the features of JAX that the kernels were measured with, by
name. The kernels themselves are imported where they are called, so that a
machine without them can still ask.

Launches are jitted by what is static of them, their plan: the layers of a model
then share one kernel, which takes more than a second to lower and as long to
compile. (JAX numbers what it lowers, so that equal kernels differ: 0.11.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels import composed
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.contract import Columns, Problem
from scattermoe_jax.kernels.mosaic.lowering import lowers
from scattermoe_jax.kernels.mosaic.padding import (
  TILE_WIDTH,
  pad,
  pad_rows,
  padded,
)
from scattermoe_jax.kernels.mosaic.support import check, missing_feature
from scattermoe_jax.kernels.schedule import places_in_windows
from scattermoe_jax.kernels.tuning import chosen_config
from scattermoe_jax.routing import Routing, take_rows

__all__ = [
  "check",
  "down_projection",
  "down_projection_grad",
  "group_xty",
  "missing_feature",
  "scatter2scatter",
  "up_projection",
  "up_projection_grad",
]


def scatter2scatter(
  x: Float[Array, "rows d"],
  w: Float[Array, "E _ _"],
  routing: Routing,
  *,
  bias: Float[Array, "E n"] | None = None,
  gates: Float[Array, " S"] | None = None,
  grouped_in: bool = False,
  grouped_out: bool = False,
  transpose_w: bool = False,
  columns: Columns | None = None,
  precision=None,
  config: TileConfig | None = None,
) -> Float[Array, "S _"]:
  """Returns y with y[row] = x[row] @ w[expert of row] + bias[expert of row].

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `grouped_in`.
    w: (E, d, n), or (E, n, d) if `transpose_w`.
    routing: the routing.
    bias: (E, n), added to the rows of its expert.
    gates: one for each grouped row, by which it is multiplied before it is
      rounded; of this backend alone.
    grouped_in: whether x is in grouped order.
    grouped_out: whether y is.
    transpose_w: whether to multiply by the transpose of w[e].
    columns: the slice of y that is made; all of it if None.
    precision: unused; operands of 16 bits have one.
    config: the blocks; from the table or the heuristic if None.
  """
  del precision
  slice_index = None
  if columns is not None:
    bias = None if bias is None else columns.of(bias, 1)
    # What would have to be padded is copied: then rather the slice alone.
    if any(size % TILE_WIDTH for size in (columns.width, *w.shape[1:])):
      w = columns.of(w, 1 if transpose_w else 2)
    else:
      slice_index = jnp.asarray(columns.slice_index, jnp.int32)
  d_out = columns.width if columns else w.shape[1 if transpose_w else 2]
  if routing.num_rows == 0:
    return jnp.zeros((0, d_out), x.dtype)
  plan = _plan(
    f"scatter2scatter_{'grouped' if grouped_in else 'gathered'}",
    x,
    w,
    routing,
    config,
    d_out=d_out,
    grouped_in=grouped_in,
    transpose_w=transpose_w,
  )

  return _store_rows(
    x,
    w,
    bias,
    gates,
    routing,
    slice_index,
    plan=plan,
    grouped_out=grouped_out,
    d_out=d_out,
  )


@functools.partial(jax.jit, static_argnames=("plan", "grouped_out", "d_out"))
def _store_rows(
  x, w, bias, gates, routing, slice_index, *, plan, grouped_out, d_out
):
  from scattermoe_jax.kernels.mosaic import epilogues, grouped_matmul

  @jax.custom_batching.sequential_vmap
  def run(x, w, bias, gates, routing, slice_index):
    epilogue = epilogues.StoreRows(
      bias=pad(bias, 1),
      gates=gates,
      scattered_ids=None if grouped_out else routing.scattered_ids,
    )
    x = pad(x, 1)
    x = pad_rows(x) if plan.grouped_in else x
    w = pad(w, 1, 2)
    [y] = grouped_matmul.multiply(x, w, routing, epilogue, plan, slice_index)
    return y[:, :d_out]

  return run(x, w, bias, gates, routing, slice_index)


def up_projection(
  x: Float[Array, "rows d"],
  w: Float[Array, "E d m"],
  routing: Routing,
  *,
  bias: Float[Array, "E m"] | None,
  activation: Any,
  keep_h: bool,
  precision=None,
  config: TileConfig | None = None,
) -> tuple[Float[Array, "S m"] | None, Float[Array, "S n"]]:
  """Returns (h, a): h = x w_e (None unless `keep_h`) and a = activation(h).

  The activation is computed from the sums in float32, before h is rounded.
  """
  halves = 2 if activation.gated else 1
  if not _fuses(routing, activation, w.shape[2], halves * TILE_WIDTH):
    return composed.up_projection(
      scatter2scatter,
      x,
      w,
      routing,
      bias=bias,
      activation=activation,
      keep_h=keep_h,
      precision=precision,
    )
  plan = _plan(
    "up_projection", x, w, routing, config, transpose_w=False, halves=halves
  )
  *h, a = _activate(
    x, w, bias, routing, plan=plan, activation=activation, keep_h=keep_h
  )
  return (h[0] if keep_h else None), a


@functools.partial(jax.jit, static_argnames=("plan", "activation", "keep_h"))
def _activate(x, w, bias, routing, *, plan, activation, keep_h: bool):
  from scattermoe_jax.kernels.mosaic import epilogues, grouped_matmul

  @jax.custom_batching.sequential_vmap
  def run(x, w, bias, routing):
    epilogue = epilogues.Activate(activation, keep_h, bias)
    return grouped_matmul.multiply(
      pad(x, 1), pad(w, 1), routing, epilogue, plan
    )

  return run(x, w, bias, routing)


def down_projection(
  x: Float[Array, "rows n"],
  w: Float[Array, "E n d"],
  gates: Float[Array, "T k"],
  routing: Routing,
  *,
  bias: Float[Array, "E d"] | None = None,
  grouped_in: bool = True,
  num_chunks: int = 1,
  precision=None,
  config: TileConfig | None = None,
) -> Float[Array, "T d"]:
  """Returns out[t] = sum_j gates[t, j] (x w_e + bias_e)[row of choice j]."""
  if routing.top_k != 1:
    return composed.down_projection(
      functools.partial(scatter2scatter, config=config),
      composed.by_columns,
      x,
      w,
      gates,
      routing,
      bias=bias,
      grouped_in=grouped_in,
      num_chunks=num_chunks,
      precision=precision,
    )
  return scatter2scatter(
    x,
    w,
    routing,
    bias=bias,
    gates=composed.gates_of_rows(gates, routing),
    grouped_in=grouped_in,
    config=config,
  )


def down_projection_grad(
  dy: Float[Array, "T d"],
  w: Float[Array, "E n d"],
  h: Float[Array, "S m"],
  gates: Float[Array, " S"],
  routing: Routing,
  *,
  activation: Any,
  precision=None,
  config: TileConfig | None = None,
) -> tuple[Float[Array, "S m"], Float[Array, "S n"], Float[Array, " S"]]:
  """Returns (dh, weighted_a, dgates), the backward down to the pre-activation.

  da' = dy w_e^T; dgates = <da', a>; dh = (gates da') dact/dh;
  weighted_a = gates a.
  """
  if not _fuses(routing, activation, w.shape[1], TILE_WIDTH):
    return composed.down_projection_grad(
      scatter2scatter,
      dy,
      w,
      h,
      gates,
      routing,
      activation=activation,
      precision=precision,
    )
  plan = _plan("down_projection_grad", dy, w, routing, config, transpose_w=True)

  return _differentiate(
    dy, w, h, gates, routing, plan=plan, activation=activation
  )


@functools.partial(jax.jit, static_argnames=("plan", "activation"))
def _differentiate(dy, w, h, gates, routing, *, plan, activation):
  from scattermoe_jax.kernels.mosaic import epilogues, grouped_matmul

  @jax.custom_batching.sequential_vmap
  def run(dy, w, h, gates, routing):
    epilogue = epilogues.Differentiate(activation, pad_rows(h), gates)
    dh, weighted_a, sums = grouped_matmul.multiply(
      pad(dy, 1), pad(w, 2), routing, epilogue, plan
    )
    places = places_in_windows(
      routing.expert_ids, routing.group_sizes, *plan.windows
    )
    # One partial sum for each tile of columns, added from the left: the order
    # of a reduction is the compiler's, and may differ between compilations.
    parts = [
      lax.index_in_dim(sums, tile, axis=1, keepdims=False)
      for tile in range(plan.num_tiles_n)
    ]
    sums = functools.reduce(jnp.add, parts).reshape(-1)
    return dh, weighted_a, take_rows(sums, places)

  return run(dy, w, h, gates, routing)


def group_xty(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  routing: Routing,
  *,
  x_grouped: bool = False,
  y_grouped: bool = False,
  precision=None,
  config: TileConfig | None = None,
) -> Float[Array, "E d n"]:
  """Returns xty[e] = x_e^T y_e over the rows of expert e.

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `x_grouped`.
    y: (T, n) or (S, n) scattered, or (S, n) if `y_grouped`.
    routing: the routing.
    x_grouped: whether x is in grouped order.
    y_grouped: whether y is.
    precision: unused; operands of 16 bits have one.
    config: the blocks; from the table or the heuristic if None.
  """
  del precision
  from scattermoe_jax.kernels.mosaic import grouped_xty

  return grouped_xty.group_xty(
    x, y, routing, x_grouped=x_grouped, y_grouped=y_grouped, config=config
  )


def up_projection_grad(
  x: Float[Array, "T d"],
  w: Float[Array, "E d m"],
  dh: Float[Array, "S m"],
  routing: Routing,
  *,
  num_chunks: int = 1,
  at_once: bool = False,
  precision=None,
) -> tuple[Float[Array, "T d"], Float[Array, "E d m"]]:
  """Returns (dx, dw) of h = x w_e: dx[t] = sum_j dh w_e^T, dw = x^T dh.

  Args:
    x: tokens.
    w: as `up_projection` takes it.
    dh: grouped rows, zero where they are of no group.
    routing: the routing.
    num_chunks: in how many slices of columns the rows of dx are made.
    at_once: whether dw is made by the kernel that sums them, if that is faster.
    precision: unused; operands of 16 bits have one.
  """
  from scattermoe_jax.kernels.mosaic import grouped_xty

  if at_once and routing.top_k > 1:

    def rows(dh, columns):
      return composed.rows_of_dx(
        scatter2scatter, w, dh, routing, grouped_out=True, columns=columns
      )

    both = grouped_xty.group_xty_and_sum(
      x, dh, rows, routing, num_chunks=num_chunks, y_grouped=True
    )
    if both is not None:
      dw, dx = both
      return dx, dw
  return composed.up_projection_grad(
    scatter2scatter,
    group_xty,
    composed.by_columns,
    x,
    w,
    dh,
    routing,
    num_chunks=num_chunks,
    precision=precision,
  )


def _fuses(routing: Routing, activation, width: int, multiple: int) -> bool:
  """Returns whether a fused kernel can run; else the composed form does."""
  fits = routing.num_rows > 0 and width % multiple == 0
  return fits and lowers(activation.value_and_slope)


def _plan(
  op: str, x, w, routing: Routing, config, *, transpose_w, d_out=None, **fields
):
  """Returns the launch plan of a product, its widths padded."""
  from scattermoe_jax.kernels.mosaic.matmul_tiles import Plan

  d_in, columns = w.shape[1:][::-1] if transpose_w else w.shape[1:]
  d_out = d_out or columns
  problem = Problem(
    routing.num_rows,
    routing.num_experts,
    d_in,
    d_out,
    str(x.dtype),
    current_device(),
  )
  return Plan(
    num_rows=routing.num_rows,
    num_experts=routing.num_experts,
    d_in=padded(d_in),
    d_out=padded(d_out),
    dtype=x.dtype,
    config=chosen_config(op, problem, config),
    transpose_w=transpose_w,
    **fields,
  )
