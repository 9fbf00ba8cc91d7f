"""A routed linear layer whose k rows are weighed and summed, as one op."""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax._compat import vary_over, varying_axes
from scattermoe_jax.kernels import accumulator_dtype, choose_backend
from scattermoe_jax.ops import checks
from scattermoe_jax.ops.combine import weigh_choices
from scattermoe_jax.ops.derivatives import first_derivative_only
from scattermoe_jax.ops.parallel_linear import linear_problems
from scattermoe_jax.ops.placement import check_placement
from scattermoe_jax.routing import Routing


def linear_combine(
  x: Float[Array, "S n"],
  gates: Float[Array, "T k"],
  routing: Routing,
  w: Float[Array, "E n d"],
  *,
  precision: lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Float[Array, "T d"]:
  """Returns the weighed sum of each token's k rows, times their experts' w.

    y[t] = sum_j gates[t, j] (x[t k + j] @ w[e])          e = expert j of t

  The output projection of a mixture of attention: x stays in token order.

  Args:
    x: one row per choice, in scattered order.
    gates: the weight of each choice.
    routing: from `route`.
    w: one matrix per expert.
    precision: of the products, as `jax.lax.dot_general` takes it.
    implementation: "mosaic", "triton" or "xla"; None for the first that can.

  Returns:
    (T, d) in the dtype of x.

  Raises:
    ValueError: if shapes disagree.
    TypeError: if dtypes do.
    NotImplementedError: if the named implementation cannot run it.

  Residuals: x (S, n), gates (T, k), w and the ids of `routing`. The expanded
  output (S, d) is not kept: the gate gradient is <dy w^T, x>, of width n.
  Source: ScatterMoE (Tan et al., 2024, arXiv 2403.08245), section 3.3, for the
  layer; SonicMoE (Guo et al., 2025, arXiv 2512.14080), algorithm 3, for the
  gate gradient.
  """
  checks.check_rows("linear_combine", x, routing, grouped=False)
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
  routing = check_placement("linear_combine", backend, routing)
  x, gates, w = vary_over((x, gates, w), varying_axes(x, gates, w, routing))
  return _linear_combine(_Static(backend, precision), x, gates, w, routing)


class _Static(NamedTuple):
  backend: ModuleType
  precision: lax.PrecisionLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_combine(static, x, gates, w, routing):
  # Grouped rows out, and each token gathers its own: no scatter, no atomics.
  y_rows = static.backend.scatter2scatter(
    x, w, routing, grouped_out=True, precision=static.precision
  )
  return weigh_choices(y_rows, gates, routing)


def _fwd(static, x, gates, w, routing):
  y = _linear_combine(static, x, gates, w, routing)
  return y, (x, gates, w, routing)


def _bwd(static, residuals, dy):
  backend, precision = static
  residuals, dy = first_derivative_only("linear_combine", (residuals, dy))
  x, gates, w, routing = residuals
  wide = accumulator_dtype(x.dtype)
  # dx' = dy w^T, before the gates, in token order as x is
  dx_rows = backend.scatter2scatter(
    dy, w, routing, transpose_w=True, precision=precision
  ).astype(wide)
  row_gates = gates.reshape(-1, 1).astype(wide)
  dgates = jnp.sum(dx_rows * x.astype(wide), axis=1).reshape(gates.shape)
  # Whatever a row of x holds that is not here, its gate has no gradient.
  here = routing.expert_ids[routing.grouped_ids] < routing.num_experts
  dgates = jnp.where(here, dgates, jnp.zeros_like(dgates))
  dx = row_gates * dx_rows
  weighted_x = row_gates * x.astype(wide)
  dw = backend.group_xty(
    weighted_x.astype(x.dtype), dy, routing, precision=precision
  )
  return dx.astype(x.dtype), dgates.astype(gates.dtype), dw, None


_linear_combine.defvjp(_fwd, _bwd)
