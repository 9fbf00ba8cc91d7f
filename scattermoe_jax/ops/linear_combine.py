"""A routed linear layer whose k rows are weighted and summed, as one op."""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax.kernels import choose_backend, gates_of_rows
from scattermoe_jax.ops import checks
from scattermoe_jax.ops.activations import get_activation
from scattermoe_jax.ops.derivatives import first_derivative_only
from scattermoe_jax.ops.operands import as_operands
from scattermoe_jax.ops.parallel_linear import linear_problems
from scattermoe_jax.ops.placement import check_placement
from scattermoe_jax.ops.rows import group_rows, ungroup_rows
from scattermoe_jax.routing import Routing, take_rows


def linear_combine(
  x: Float[Array, "S n"],
  gates: Float[Array, "T k"],
  routing: Routing,
  w: Float[Array, "E n d"],
  *,
  grouped_in: bool = False,
  precision: lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Float[Array, "T d"]:
  """Returns the weighted sum of each token's k rows, times their experts' w.

    y[t] = sum_j gates[t, j] (x[t k + j] @ w[e])          e = expert j of t

  The output projection of a mixture of attention.

  Args:
    x: one row per choice, in scattered order, or in grouped order if
      `grouped_in`.
    gates: the weight of each choice.
    routing: from `route`.
    w: one matrix per expert.
    grouped_in: whether x is in grouped order.
    precision: of the products, as `jax.lax.dot_general` takes it.
    implementation: "mosaic", "triton" or "xla"; None for the first that can.

  Returns:
    (T, d) in the dtype of x.

  Raises:
    ValueError: if shapes disagree.
    TypeError: if dtypes do, or what should be an array or a routing is not one.
    NotImplementedError: if the named implementation cannot run it.

  Residuals: x (S, n), gates (T, k), w and the ids of `routing`. The expanded
  output (S, d) is not kept: the gate gradient is <dy w^T, x>, of width n.
  Source: ScatterMoE (Tan et al., 2024, arXiv 2403.08245), section 3.3, for the
  layer; SonicMoE (Guo et al., 2025, arXiv 2512.14080), algorithm 3, for the
  gate gradient.
  """
  checks.check_arrays("linear_combine", routing, x=x, gates=gates, w=w)
  checks.check_rows("linear_combine", x, routing, grouped=grouped_in)
  if jnp.shape(x)[0] != routing.num_rows:
    raise ValueError(
      f"linear_combine: x has {jnp.shape(x)[0]} rows; this routing needs S = "
      f"{routing.num_rows} (one per choice)."
    )
  checks.check_gates("linear_combine", gates, routing)
  checks.check_weights("linear_combine", "w", w, routing, d_in=jnp.shape(x)[1])
  checks.check_dtypes("linear_combine", x, w=w)
  backend = choose_backend(
    linear_problems(routing, w, jnp.result_type(x)), implementation
  )
  (x, gates, w), routing = as_operands((x, gates, w), routing)
  routing = check_placement("linear_combine", backend, routing)
  static = _Static(backend, grouped_in, precision)
  return _linear_combine(static, x, gates, w, routing)


class _Static(NamedTuple):
  backend: ModuleType
  grouped_in: bool
  precision: lax.PrecisionLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_combine(static, x, gates, w, routing):
  backend, grouped_in, precision = static
  return backend.down_projection(
    x, w, gates, routing, grouped_in=grouped_in, precision=precision
  )


def _fwd(static, x, gates, w, routing):
  y = _linear_combine(static, x, gates, w, routing)
  return y, (x, gates, w, routing)


def _bwd(static, residuals, dy):
  backend, grouped_in, precision = static
  residuals, dy = first_derivative_only("linear_combine", (residuals, dy))
  x, gates, w, routing = residuals
  # The second half of an MLP without an activation: dx' = dy w^T before the
  # gates, dgates = <dx', x>, dx = gates dx'. All in grouped order: rows are n
  # wide, and it is dy, as wide as the model, that is gathered and not copied.
  dx, weighted_x, row_dgates = backend.down_projection_grad(
    dy,
    w,
    x if grouped_in else group_rows(x, routing),
    gates_of_rows(gates, routing),
    routing,
    activation=get_activation("identity", gated=False),
    precision=precision,
  )
  dw = backend.group_xty(
    weighted_x, dy, routing, x_grouped=True, precision=precision
  )
  if not grouped_in:
    dx = ungroup_rows(dx, routing)
  # Whatever a row of x holds that is not here, its gate has no gradient.
  here = routing.expert_ids < routing.num_experts
  row_dgates = jnp.where(here, row_dgates, jnp.zeros_like(row_dgates))
  dgates = take_rows(row_dgates, routing.grouped_ids)
  return dx, dgates.astype(gates.dtype), dw, None


_linear_combine.defvjp(_fwd, _bwd)
