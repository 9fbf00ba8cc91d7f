"""ParallelLinear: rows to their experts' matrices, without grouped copies."""

import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels import Problem, choose_backend, sum_choices
from scattermoe_jax.ops import checks
from scattermoe_jax.ops.derivatives import first_derivative_only
from scattermoe_jax.ops.operands import as_operands
from scattermoe_jax.ops.placement import check_placement
from scattermoe_jax.routing import Routing


def parallel_linear(
  x: Float[Array, "rows d"],
  w: Float[Array, "E d n"],
  routing: Routing,
  *,
  bias: Float[Array, "E n"] | None = None,
  grouped_in: bool = False,
  grouped_out: bool = False,
  precision: lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Float[Array, "S n"]:
  """Returns each row times its expert's matrix, plus its expert's bias.

    y[row] = x[row of x] @ w[expert of row] + bias[expert of row]

  Args:
    x: (T, d), where the k choices of a token share a row, or (S, d).
    w: one matrix per expert.
    routing: from `route`.
    bias: one bias per expert.
    grouped_in: whether x is in grouped order rather than in scattered order.
    grouped_out: whether y is to be. `combine` needs it: it takes grouped rows,
      and cannot tell scattered ones from them.
    precision: of the products, as `jax.lax.dot_general` takes it; decides TF32
      for float32 on GPUs.
    implementation: "mosaic", "triton" or "xla"; None for the first that can.

  Returns:
    (S, n) in the dtype of x, accumulated in float32. Rows of no group are zero.

  Raises:
    ValueError: if shapes disagree.
    TypeError: if dtypes do, or what should be an array or a routing is not one.
    NotImplementedError: if the named implementation cannot run it.

  Residuals: x and w as given, and the ids of `routing`.
  Source: ScatterMoE (Tan et al., 2024, arXiv 2403.08245), ParallelLinear.

  Example:
    >>> routing = route(jnp.array([[1, 0], [0, 2]]), 3)
    >>> x, w = jnp.ones((2, 4)), jnp.ones((3, 4, 5))
    >>> parallel_linear(x, w, routing).shape
    (4, 5)
  """
  checks.check_arrays(
    "parallel_linear", routing, x=x, w=w, optional={"bias": bias}
  )
  checks.check_rows("parallel_linear", x, routing, grouped=grouped_in)
  checks.check_weights("parallel_linear", "w", w, routing, d_in=jnp.shape(x)[1])
  checks.check_bias("parallel_linear", "bias", bias, w)
  checks.check_dtypes("parallel_linear", x, w=w, bias=bias)
  backend = choose_backend(
    linear_problems(routing, w, jnp.result_type(x)), implementation
  )
  static = _Static(backend, grouped_in, grouped_out, precision)
  (x, w, bias), routing = as_operands((x, w, bias), routing)
  routing = check_placement("parallel_linear", backend, routing)
  return _parallel_linear(static, x, w, bias, routing)


def linear_problems(routing: Routing, w, dtype) -> tuple[Problem, Problem]:
  """Returns the products of a linear layer's forward and its input gradient."""
  _, d_in, d_out = w.shape
  forward = Problem(
    routing.num_rows,
    routing.num_experts,
    d_in,
    d_out,
    str(jnp.dtype(dtype)),
    current_device(),
  )
  return forward, forward._replace(d_in=d_out, d_out=d_in)


def bias_grad(backend, dy, routing: Routing, *, grouped: bool, precision):
  """Returns (E, n), the sum of dy over the rows of each expert.

  A product with ones: deterministic, where a segment sum would use atomics.
  Eight columns of ones, as kernels want rows of 16 bytes.
  """
  ones = jnp.ones((routing.num_rows, 8), dy.dtype)
  sums = backend.group_xty(
    ones, dy, routing, x_grouped=True, y_grouped=grouped, precision=precision
  )
  return sums[:, 0]


class _Static(NamedTuple):
  backend: ModuleType
  grouped_in: bool
  grouped_out: bool
  precision: lax.PrecisionLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _parallel_linear(static, x, w, bias, routing):
  backend, grouped_in, grouped_out, precision = static
  return backend.scatter2scatter(
    x,
    w,
    routing,
    bias=bias,
    grouped_in=grouped_in,
    grouped_out=grouped_out,
    precision=precision,
  )


def _fwd(static, x, w, bias, routing):
  return _parallel_linear(static, x, w, bias, routing), (x, w, bias, routing)


def _bwd(static, residuals, dy):
  """Returns the gradients, each a product of scattered or grouped rows.

  dx[t] = sum_j dy[row] w[e]^T     over the rows, and experts e, of t
  dw[e] = x_e^T dy_e               dbias[e] = sum of dy_e, over the rows of e
  """
  backend, grouped_in, grouped_out, precision = static
  residuals, dy = first_derivative_only("parallel_linear", (residuals, dy))
  x, w, bias, routing = residuals
  shares_rows = x.shape[0] != routing.num_rows
  dx = backend.scatter2scatter(
    dy,
    w,
    routing,
    grouped_in=grouped_out,
    grouped_out=grouped_in or shares_rows,
    transpose_w=True,
    precision=precision,
  )
  if shares_rows:
    dx = sum_choices(dx, routing)
  dw = backend.group_xty(
    x,
    dy,
    routing,
    x_grouped=grouped_in,
    y_grouped=grouped_out,
    precision=precision,
  )
  dbias = None
  if bias is not None:
    dbias = bias_grad(
      backend, dy, routing, grouped=grouped_out, precision=precision
    )
  return dx, dw, dbias, None


_parallel_linear.defvjp(_fwd, _bwd)
