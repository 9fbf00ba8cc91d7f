"""The k rows of each token, weighted and summed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scattermoe_jax.kernels import (
  accumulator_dtype,
  gates_of_rows,
  weighted_sum,
)
from scattermoe_jax.ops import checks
from scattermoe_jax.ops.derivatives import first_derivative_only
from scattermoe_jax.ops.operands import as_operands
from scattermoe_jax.routing import Routing, input_rows, take_rows


def combine(
  y: Float[Array, "S d"], gates: Float[Array, "T k"], routing: Routing
) -> Float[Array, "T d"]:
  """Returns out[t] = sum_j gates[t, j] * y[grouped row of choice j of t].

  Each token gathers its own k rows: no atomics, one fixed order of the sum.
  Choices that are 'not here' add nothing, whatever y and the gates hold there.

  Args:
    y: rows in grouped order, as `parallel_linear(..., grouped_out=True)` gives
      them: rows in scattered order are as many, and would be taken for others.
    gates: the weight of each choice.
    routing: the routing.

  Returns:
    (T, d) in the dtype of y, summed in float32.

  Raises:
    ValueError: if y has not S rows or the gates are not (T, k).
    TypeError: if either is not of a floating-point dtype, or no array.

  Residuals: y (S, d) and gates (T, k) as given, and the ids of `routing`.
  Source: ScatterMoE (Tan et al., 2024, arXiv 2403.08245), the weighted sum.
  """
  checks.check_arrays("combine", routing, y=y, gates=gates)
  checks.check_rows("combine", y, routing, grouped=True, name="y")
  checks.check_gates("combine", gates, routing)
  checks.check_dtypes("combine", y, name="y")
  (y, gates), routing = as_operands((y, gates), routing)
  return _combine(y, gates, routing)


@jax.custom_vjp
def _combine(y, gates, routing):
  return weighted_sum(_rows_here(y, routing), gates, routing)


def _combine_fwd(y, gates, routing):
  return _combine(y, gates, routing), (y, gates, routing)


def _combine_bwd(residuals, dout):
  """Returns dy[row of (t, j)] = gates[t, j] dout[t] and <dout[t], y[row]>."""
  residuals, dout = first_derivative_only("combine", (residuals, dout))
  y, gates, routing = residuals
  wide = accumulator_dtype(y.dtype)
  # A gather by the inverse permutation, where autodiff would scatter and add.
  tokens = input_rows(routing, routing.num_tokens, grouped=False)
  row_gates = gates_of_rows(gates, routing).astype(wide)
  dy = (row_gates[:, None] * take_rows(dout, tokens).astype(wide)).astype(
    y.dtype
  )
  dgates = jnp.einsum(
    "td,tkd->tk",
    dout.astype(wide),
    take_rows(_rows_here(y, routing), routing.grouped_ids).astype(wide),
    precision=jax.lax.Precision.HIGHEST,
  )
  return _rows_here(dy, routing), dgates.astype(gates.dtype), None


_combine.defvjp(_combine_fwd, _combine_bwd)


def _rows_here(rows: Float[Array, "S d"], routing: Routing) -> Array:
  here = routing.expert_ids < routing.num_experts
  return jnp.where(here[:, None], rows, jnp.zeros_like(rows))
