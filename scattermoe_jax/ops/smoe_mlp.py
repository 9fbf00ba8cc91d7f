"""The sparse MLP as one differentiable op, with a dense MLP's residuals."""

import dataclasses
import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import custom_vjp_primal_tree_values
from jax.tree_util import register_static
from jaxtyping import Array, Float

from scattermoe_jax._compat import varying_axes
from scattermoe_jax.kernels import (
  accumulator_dtype,
  choose_backend,
  gates_of_rows,
)
from scattermoe_jax.ops import checks
from scattermoe_jax.ops.activations import Activation, get_activation
from scattermoe_jax.ops.derivatives import first_derivative_only
from scattermoe_jax.ops.operands import as_operands
from scattermoe_jax.ops.parallel_linear import bias_grad, linear_problems
from scattermoe_jax.ops.placement import check_placement
from scattermoe_jax.routing import Routing, take_rows


def smoe_mlp(
  x: Float[Array, "T d"],
  gates: Float[Array, "T k"],
  routing: Routing,
  w_in: Float[Array, "E d m"],
  w_out: Float[Array, "E n d"],
  *,
  bias_in: Float[Array, "E m"] | None = None,
  bias_out: Float[Array, "E d"] | None = None,
  activation: str | Activation = "silu",
  num_chunks: int = 1,
  precision: lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Float[Array, "T d"]:
  """Returns the weighted sum of each token's k experts, each a two-layer MLP.

    h = x w_in[e] + bias_in[e]          a = f(h), or f(h_gate) h_up if m = 2n
    y[t] = sum_j gates[t, j] (a w_out[e] + bias_out[e])     e = expert j of t

  Args:
    x: tokens.
    gates: the weight of each choice.
    routing: from `route`.
    w_in: (E, d, n), or (E, d, 2n) with the gate half first: `w_gate_up`.
    w_out: (E, n, d).
    bias_in: added to h.
    bias_out: added to each expert's output, inside the weighted sum.
    activation: a name in `ACTIVATIONS`, or an `Activation`.
    num_chunks: in how many slices of its d columns the expanded (S, d) array
      is made and summed, once forward and once backward: the peak of memory
      falls, the products stay the same. From four on mosaic may hold a slice
      beside dw_in, to be faster: then four can take more than two or three.
      Of no effect for k = 1, where each row is stored as its token lies.
    precision: of the products, as `jax.lax.dot_general` takes it.
    implementation: "mosaic", "triton" or "xla"; None for the first that can.

  Returns:
    (T, d) in the dtype of x.

  Raises:
    ValueError: if shapes disagree, the activation is unknown or `num_chunks`
      does not divide d.
    TypeError: if dtypes disagree, or what should be an array or a routing is
      none.
    NotImplementedError: if the named implementation cannot run it.

  Residuals: x (T, d), the pre-activation h (S, m), gates (T, k), the ids of
  `routing` and the weights. Neither the grouped x, nor a, nor any row of y is
  kept: x is gathered again, a recomputed from h, and the gate gradient is
  <dy w_out^T, a>. `jax.checkpoint` policies see h as "smoe_h".
  Source: ScatterMoE (Tan et al., 2024, arXiv 2403.08245), the SMoE MLP; what is
  kept, SonicMoE (Guo et al., 2025, arXiv 2512.14080), algorithms 2 and 3.
  """
  checks.check_arrays(
    "smoe_mlp",
    routing,
    x=x,
    gates=gates,
    w_in=w_in,
    w_out=w_out,
    optional={"bias_in": bias_in, "bias_out": bias_out},
  )
  checks.check_tokens("smoe_mlp", x, routing)
  checks.check_gates("smoe_mlp", gates, routing)
  d = jnp.shape(x)[1]
  checks.check_weights("smoe_mlp", "w_in", w_in, routing, d_in=d)
  checks.check_weights("smoe_mlp", "w_out", w_out, routing)
  gated = checks.check_mlp_widths("smoe_mlp", w_in, w_out, d)
  checks.check_num_chunks("smoe_mlp", num_chunks, d)
  checks.check_bias("smoe_mlp", "bias_in", bias_in, w_in)
  checks.check_bias("smoe_mlp", "bias_out", bias_out, w_out)
  checks.check_dtypes(
    "smoe_mlp",
    x,
    w_in=w_in,
    w_out=w_out,
    bias_in=bias_in,
    bias_out=bias_out,
  )
  dtype = jnp.result_type(x)
  backend = choose_backend(
    linear_problems(routing, w_in, dtype)
    + linear_problems(routing, w_out, dtype),
    implementation,
  )
  activation = get_activation(activation, gated=gated, function="smoe_mlp")
  static = _Static(backend, activation, num_chunks, precision)
  operands = (x, gates, w_in, w_out, bias_in, bias_out)
  operands, routing = as_operands(operands, routing)
  routing = check_placement("smoe_mlp", backend, routing)
  return _smoe_mlp(static, *operands, routing)


class _Static(NamedTuple):
  backend: ModuleType
  activation: Activation
  num_chunks: int
  precision: lax.PrecisionLike


@register_static
@dataclasses.dataclass(frozen=True)
class _Differentiated:
  """Which operands are: known while tracing, and part of no array."""

  x: bool
  w_in: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _smoe_mlp(static, x, gates, w_in, w_out, bias_in, bias_out, routing):
  return _forward(
    static, x, gates, w_in, w_out, bias_in, bias_out, routing, keep_h=False
  )[0]


def _forward(
  static, x, gates, w_in, w_out, bias_in, bias_out, routing, *, keep_h
):
  backend, activation, num_chunks, precision = static
  h, a = backend.up_projection(
    x,
    w_in,
    routing,
    bias=bias_in,
    activation=activation,
    keep_h=keep_h,
    precision=precision,
  )
  y = backend.down_projection(
    a,
    w_out,
    gates,
    routing,
    bias=bias_out,
    num_chunks=num_chunks,
    precision=precision,
  )
  return y, h


def _fwd(static, *primals):
  x, _, w_in, *_ = primals
  differentiated = _Differentiated(x.perturbed, w_in.perturbed)
  primals = custom_vjp_primal_tree_values(primals)
  y, h = _forward(static, *primals, keep_h=True)
  h = checkpoint_name(h, "smoe_h")
  return y, (differentiated, h, *primals)


def _bwd(static, residuals, dy):
  backend, activation, num_chunks, precision = static
  residuals, dy = first_derivative_only("smoe_mlp", (residuals, dy))
  differentiated, h, *primals = residuals
  x, gates, w_in, w_out, bias_in, bias_out, routing = primals
  # What the backward makes of gates is not made, and held, in the forward.
  gates, dy = lax.optimization_barrier((gates, dy))
  row_gates = gates_of_rows(gates, routing)
  # da' = dy w_out^T; dgates = <da', a>; dh = (gates da') f'(h)
  dh, weighted_a, row_dgates = backend.down_projection_grad(
    dy,
    w_out,
    h,
    row_gates,
    routing,
    activation=activation,
    precision=precision,
  )
  dgates = take_rows(row_dgates, routing.grouped_ids)
  # One after the other, so that memory serves twice: weighted_a is gone before
  # rows of dx are there, and they before the larger dw.
  dw_out = backend.group_xty(
    weighted_a, dy, routing, x_grouped=True, precision=precision
  )
  dw_out, dh = lax.optimization_barrier((dw_out, dh))

  # Made at once XLA can drop neither: so only where both are wanted. And not on
  # a mesh, where rows may be of other devices' experts, and the product too
  # short to sum all of them beside it.
  both_wanted = differentiated.x and differentiated.w_in
  on_mesh = varying_axes(x, routing)
  dx, dw_in = backend.up_projection_grad(
    x,
    w_in,
    dh,
    routing,
    num_chunks=num_chunks,
    at_once=(
      both_wanted
      and not on_mesh
      and _outgrow(routing.num_rows * x.shape[1], w_in.size, num_chunks)
    ),
    precision=precision,
  )
  dbias_in = dbias_out = None
  if bias_in is not None:
    # Rows of dx are gone by then.
    dx, dh = lax.optimization_barrier((dx, dh))
    dbias_in = bias_grad(
      backend, dh, routing, grouped=True, precision=precision
    )
  if bias_out is not None:
    dbias_out = _weighted_bias_grad(backend, dy, row_gates, routing, precision)
    dgates += _bias_gate_grad(dy, bias_out, routing, precision)
  return (
    dx,
    dgates.astype(gates.dtype),
    dw_in,
    dw_out,
    dbias_in,
    dbias_out,
    None,
  )


_smoe_mlp.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _outgrow(rows: int, dw: int, num_chunks: int) -> bool:
  """Returns whether rows of dx stay while dw_in is made, to be summed beside.

  Rows that are gone by then leave dw_in their memory. So it costs none to keep
  a slice that is larger than dw_in; a smaller one is held besides. Of four or
  more slices that is at most a quarter of what slices save.

  Args:
    rows: numbers in all slices of the rows.
    dw: numbers in dw_in.
    num_chunks: slices.
  """
  return rows > dw and (rows > num_chunks * dw or num_chunks >= 4)


def _weighted_bias_grad(backend, dy, row_gates, routing, precision):
  """Returns (E, d): sum of gates * dy over the rows of each expert."""
  weights = jnp.broadcast_to(
    row_gates.astype(dy.dtype)[:, None], (routing.num_rows, 8)
  )
  sums = backend.group_xty(
    weights, dy, routing, x_grouped=True, precision=precision
  )
  return sums[:, 0]


def _bias_gate_grad(dy, bias, routing, precision):
  """Returns (T, k): <dy[t], bias[expert j of t]>; zero for 'not here'."""
  wide = accumulator_dtype(dy.dtype)
  products = jnp.einsum(
    "td,ed->te",
    dy,
    bias,
    precision=precision,
    preferred_element_type=wide,
  )
  experts = take_rows(routing.expert_ids, routing.grouped_ids)
  return jnp.take_along_axis(
    products, experts, axis=1, mode="fill", fill_value=0
  )
