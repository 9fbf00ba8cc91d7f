"""What the library is measured against: dense products, bytes, other JAX.

A bound is what cannot be beaten; a baseline is what somebody would write
instead. Peers that have to be installed are in `benchmarks.peers`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from benchmarks import timing
from benchmarks.shapes import Shape, normal_array
from scattermoe_jax.routing import Routing, input_rows

_COPY_BYTES = 2 * 2**30


def copy_bandwidth(size: int = _COPY_BYTES) -> float:
  """Returns bytes per second, read and written, of a large addition."""
  array = jnp.zeros((size // 4,), jnp.float32)
  add = jax.jit(lambda a: a + 1)
  taken = timing.time_interleaved({"copy": lambda: add(array)}, samples=10)
  return 2 * array.nbytes / (taken["copy"].ms_median / 1e3)


def composed_mlp(
  x: Float[Array, "T d"],
  gates: Float[Array, "T k"],
  routing: Routing,
  w_in: Float[Array, "E d m"],
  w_out: Float[Array, "E n d"],
) -> Float[Array, "T d"]:
  """Returns the SwiGLU layer as one would write it in JAX today.

  A copy of the rows in grouped order, `jax.lax.ragged_dot` twice, a gather and
  a weighted sum. Autodiff makes its backward.
  """
  rows = input_rows(routing, x.shape[0], grouped=False)
  h = lax.ragged_dot(x[rows], w_in, routing.group_sizes)
  gate, up = jnp.split(h, 2, axis=-1)
  y = lax.ragged_dot(jax.nn.silu(gate) * up, w_out, routing.group_sizes)
  choices = y[routing.grouped_ids].astype(gates.dtype)
  return jnp.sum(gates[:, :, None] * choices, axis=1).astype(x.dtype)


class DenseOperands(NamedTuple):
  """What the dense products of a layer multiply: all rows, one expert."""

  rows: Float[Array, "S d"]
  a: Float[Array, "S n"]
  h: Float[Array, "S m"]
  w_in: Float[Array, "d m"]
  w_out: Float[Array, "n d"]


def dense_operands(shape: Shape) -> DenseOperands:
  """Returns normal data of the sizes of a layer's products."""
  rows, d, n = shape.num_rows, shape.d_model, shape.d_expert
  return DenseOperands(
    normal_array(1, rows, d),
    normal_array(2, rows, n),
    normal_array(3, rows, 2 * n),
    normal_array(4, d, 2 * n),
    normal_array(5, n, d),
  )


def dense_mlp(
  operands: DenseOperands, *, direction: str = "forward"
) -> list[Array]:
  """Returns the dense products of a layer's FLOPs and nothing else.

  The forward's two, and for a backward the four of its gradients as well.
  """
  rows, a, h, w_in, w_out = operands
  products = [rows @ w_in, a @ w_out]
  if direction != "forward":
    products += [rows @ w_out.T, h @ w_in.T, a.T @ rows, rows.T @ h]
  return products
