"""The Pallas-Triton backend: GPUs from Ampere on, any shape by masks.

Deprecated upstream since JAX 0.11: where JAX no longer has it, `check` says so
and the next backend runs. Only `launch` touches its API.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from scattermoe_jax._compat import current_device, has_pallas_triton
from scattermoe_jax.kernels import composed
from scattermoe_jax.kernels.contract import Columns, Problem
from scattermoe_jax.kernels.triton.group_xty import multiply_groups
from scattermoe_jax.kernels.triton.scatter2scatter import multiply_tiles
from scattermoe_jax.kernels.triton.tiles import (
  TritonConfig,
  group_xty_config,
  scatter2scatter_config,
)
from scattermoe_jax.routing import Routing, group_offsets, input_rows

_DTYPES = ("bfloat16", "float16", "float32")


def check(problem: Problem) -> str | None:
  """Returns why `problem` cannot run here, or None."""
  device = problem.device
  if device.platform != "gpu":
    return f"it is for NVIDIA GPUs, and this is a {device.platform}"
  if device.capability is None:
    return f"the compute capability of {device.kind} is unknown"
  if device.capability < (8, 0):
    major, minor = device.capability
    return (
      f"compute capability {major}.{minor} ({device.kind}) is below 8.0, "
      "Ampere, the first with asynchronous copies"
    )
  if problem.dtype not in _DTYPES:
    return f"dtype {problem.dtype} is not one of {', '.join(_DTYPES)}"
  if not has_pallas_triton():
    return "this JAX has no Pallas-Triton any more; 0.7.2 to 0.12 have it"
  return None


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
  precision: Any = None,
  config: TritonConfig | None = None,
  interpret: bool = False,
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
    config: blocks; by shape and device if None.
    interpret: whether to run in Pallas' interpreter, on any device.
  """
  num_rows, num_experts = routing.num_rows, routing.num_experts
  d_in, d_out = x.shape[1], w.shape[1 if transpose_w else 2]
  slice_index = None
  if columns is not None:
    slice_index = jnp.asarray(columns.slice_index, jnp.int32)
    d_out = columns.width
    bias = None if bias is None else columns.of(bias, 1)
  if num_rows == 0:
    return jnp.zeros((0, d_out), x.dtype)
  if config is None:
    device = current_device()
    config = scatter2scatter_config(
      num_rows,
      num_experts,
      d_in,
      d_out,
      x.dtype.itemsize,
      capability=device.capability or (8, 0),
      num_cores=device.num_cores or 108,
      grouped_in=grouped_in,
    )

  @sequential_vmap
  def multiply(x, w, bias, routing, slice_index):
    return multiply_tiles(
      x,
      w,
      bias,
      routing,
      slice_index,
      d_out=d_out,
      grouped_in=grouped_in,
      grouped_out=grouped_out,
      transpose_w=transpose_w,
      precision=precision,
      config=config,
      interpret=interpret,
    )

  y = multiply(x, w, bias, routing, slice_index)
  if config.split_k > 1:
    y = jnp.sum(y, axis=-3).astype(x.dtype)
  return y


def group_xty(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  routing: Routing,
  *,
  x_grouped: bool = False,
  y_grouped: bool = False,
  precision: lax.PrecisionLike = None,
  config: TritonConfig | None = None,
  interpret: bool = False,
) -> Float[Array, "E d n"]:
  """Returns xty[e] = x_e^T y_e over the rows of expert e.

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `x_grouped`.
    y: (T, n) or (S, n) scattered, or (S, n) if `y_grouped`.
    routing: the routing.
    x_grouped: whether x is in grouped order.
    y_grouped: whether y is.
    precision: of the products, as `jax.lax.dot_general` takes it.
    config: blocks; by shape and device if None.
    interpret: whether to run in Pallas' interpreter, on any device.
  """
  if routing.num_rows == 0:
    return jnp.zeros((routing.num_experts, x.shape[1], y.shape[1]), x.dtype)
  if config is None:
    config = group_xty_config(
      x.shape[1],
      y.shape[1],
      x.dtype.itemsize,
      capability=current_device().capability or (8, 0),
      is_gathered=not (x_grouped and y_grouped),
    )

  @sequential_vmap
  def multiply(x, y, routing):
    def rows(operand, grouped):
      if grouped:
        return None
      return input_rows(routing, operand.shape[0], grouped=False)

    return multiply_groups(
      x,
      y,
      rows(x, x_grouped),
      rows(y, y_grouped),
      group_offsets(routing),
      precision=precision,
      config=config,
      interpret=interpret,
    )

  return multiply(x, y, routing)


(
  up_projection,
  down_projection,
  down_projection_grad,
  up_projection_grad,
) = composed.fused_forms(scatter2scatter, group_xty)
