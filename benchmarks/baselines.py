"""What the library is measured against: dense products, bytes, other JAX.

A bound is what cannot be beaten; a baseline is what somebody would write
instead. Peers that have to be installed are in `benchmarks.peers`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from benchmarks import timing
from benchmarks.shapes import normal
from scattermoe_jax.routing import Routing, input_rows

_COPY_BYTES = 2 * 2**30


def dense_product(
  m: int, k: int, n: int, *, contract_rows: bool = False
) -> Callable[[], Array]:
  """Returns a call of `jnp.dot` of (m, k) and (k, n), in bfloat16.

  Args:
    m: rows.
    k: contraction.
    n: columns.
    contract_rows: whether the first operand is (k, m), as in a weight
      gradient.
  """
  a = normal(1, *((k, m) if contract_rows else (m, k)))
  b = normal(2, k, n)
  product = jax.jit(lambda a, b: jnp.dot(a.T if contract_rows else a, b))
  return lambda: product(a, b)


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
  a weighed sum. Autodiff makes its backward.
  """
  rows = input_rows(routing, x.shape[0], grouped=False)
  h = lax.ragged_dot(x[rows], w_in, routing.group_sizes)
  gate, up = jnp.split(h, 2, axis=-1)
  y = lax.ragged_dot(jax.nn.silu(gate) * up, w_out, routing.group_sizes)
  choices = y[routing.grouped_ids].astype(gates.dtype)
  return jnp.sum(gates[:, :, None] * choices, axis=1).astype(x.dtype)


def dense_mlp_calls(shape, *, backward: bool) -> list[Callable[[], Array]]:
  """Returns the dense products of a layer's FLOPs, each a call.

  The forward's two, and for a backward the four of its gradients as well.
  """
  rows, d, n = shape.num_rows, shape.d_model, shape.d_expert
  calls = [dense_product(rows, d, 2 * n), dense_product(rows, n, d)]
  if backward:
    calls += [
      dense_product(rows, d, n),
      dense_product(rows, 2 * n, d),
      dense_product(n, rows, d, contract_rows=True),
      dense_product(d, rows, 2 * n, contract_rows=True),
    ]
  return calls
