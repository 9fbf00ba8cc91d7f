"""What an op may be given: arrays of NumPy are as good as JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import combine, parallel_linear, route, smoe_mlp
from scattermoe_jax.ops import linear_combine

T, k, E, d, n = 8, 2, 3, 6, 5
SHAPES = {
  parallel_linear: {"x": (T, d), "w": (E, d, n), "bias": (E, n)},
  smoe_mlp: {
    "x": (T, d),
    "gates": (T, k),
    "w_in": (E, d, 2 * n),
    "w_out": (E, n, d),
    "bias_in": (E, 2 * n),
    "bias_out": (E, d),
  },
  linear_combine: {"x": (T * k, n), "gates": (T, k), "w": (E, n, d)},
  combine: {"y": (T * k, d), "gates": (T, k)},
}


@pytest.mark.parametrize("op", SHAPES, ids=lambda op: op.__name__)
def test_numpy_arrays_are_taken_without_jit(op, unchecked):
  rng = np.random.default_rng(0)
  operands = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in SHAPES[op].items()
  }
  routing = route(rng.integers(0, E, (T, k)).astype(np.int32), E)

  def value_and_grads(operands, routing):
    y = op(routing=routing, **operands)
    loss = lambda operands: jnp.sum(op(routing=routing, **operands) ** 2)
    return y, jax.grad(loss)(operands)

  expected = value_and_grads(jax.tree.map(jnp.asarray, operands), routing)
  got = value_and_grads(operands, type(routing)(*map(np.asarray, routing)))
  jax.tree.map(np.testing.assert_array_equal, got, expected)
