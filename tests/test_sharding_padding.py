"""Tokens that the devices do not divide, and what a model does around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from scattermoe_jax import sharding
from scattermoe_jax.sharding import MeshAxes
from tests.test_sharding import assert_equal

NUM_EXPERTS, TOP_K, D_MODEL, D_EXPERT = 4, 2, 8, 4
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def mesh_of_four(kind=AUTO):
  devices = jax.devices()[:4]
  return jax.make_mesh((4,), ("a",), axis_types=(kind,), devices=devices)


def mlp(x, gates, ids, w, w_in, w_out, axes):
  del w
  return sharding.smoe_mlp(x, gates, ids, w_in, w_out, axes=axes)


def linear(x, gates, ids, w, w_in, w_out, axes):
  del w_in, w_out
  y = sharding.parallel_linear(x, w, ids, axes=axes)
  return jnp.einsum("tkd,tk->td", y.reshape(*gates.shape, D_MODEL), gates)


def example(batch, length):
  """Returns the expert ids, and what a loss is differentiated by."""
  e, d, n = NUM_EXPERTS, D_MODEL, D_EXPERT
  ids = np.arange(batch * length)[:, None] + np.arange(TOP_K)
  return jnp.asarray(ids % e, jnp.int32), {
    "x": normal(0, batch, length, d),
    "before": normal(1, d, d),
    "gates": normal(2, batch, length, TOP_K),
    "w": normal(3, e, d, d),
    "w_in": normal(4, e, d, 2, n),
    "w_out": normal(5, e, n, d),
  }


def loss(op, ids, given, axes):
  """Returns a weighted sum of `op` between two reshapes, as in a model."""
  x, gates = given["x"], given["gates"]
  tokens = (x @ given["before"]).reshape(-1, D_MODEL)
  weights = given["w"], given["w_in"], given["w_out"]
  y = op(tokens, gates.reshape(-1, TOP_K), ids, *weights, axes)
  return jnp.sum(y.reshape(x.shape) * normal(6, *x.shape))


def gradients(op, ids, given, axes):
  """Returns the loss, and its gradients by name."""
  value, grads = jax.value_and_grad(loss, argnums=2)(op, ids, given, axes)
  return {"loss": value, **grads}


jitted_gradients = jax.jit(gradients, static_argnames=("op", "axes"))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)
@pytest.mark.parametrize("batch, length", [(2, 3), (2, 7), (2, 0)])
@pytest.mark.parametrize(
  "op, axes",
  [
    (mlp, MeshAxes(data="a")),
    (mlp, MeshAxes(expert="a")),
    (linear, MeshAxes(data="a")),
  ],
  ids=["mlp-data", "mlp-expert", "linear-data"],
)
def test_gradients_before_an_op_equal_one_device(batch, length, op, axes, kind):
  ids, given = example(batch, length)
  want = jitted_gradients(op, ids, given, MeshAxes())
  with jax.set_mesh(mesh_of_four(kind)):
    got = jitted_gradients(op, ids, given, axes)
  assert_equal(got, want, 1e-5)


def test_an_op_outside_jit_equals_one_device():
  ids, given = example(2, 3)
  want = gradients(mlp, ids, given, MeshAxes())
  with jax.set_mesh(mesh_of_four()):
    got = gradients(mlp, ids, given, MeshAxes(data="a"))
  assert_equal(got, want, 1e-5)
