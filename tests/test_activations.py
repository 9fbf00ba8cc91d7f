"""Values against NumPy, slopes against JAX's own differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax.ops.activations import (
  ACTIVATIONS,
  Activation,
  clamped_swiglu,
  get_activation,
)
from tests import oracle, plain
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.optimised

FORMS = [
  (name, gated)
  for name in ACTIVATIONS
  for gated in (False, True)
  if gated or name != "clamped_swiglu"
]


def pre_activations(dtype=jnp.float64):
  # From far in one tail to far in the other, and past the clamps.
  h = np.linspace(-12, 12, 240).reshape(10, 24) + 1e-3
  return jnp.asarray(np.random.default_rng(0).permutation(h, axis=1), dtype)


@pytest.mark.parametrize(("name", "gated"), FORMS)
def test_value_equals_numpy(name, gated, x64):
  h = pre_activations()
  got = jax.jit(get_activation(name, gated=gated).apply)(h)
  truth = oracle.activate(np.asarray(h), name, gated)
  assert_accurate(got, truth, None)


@pytest.mark.parametrize(("name", "gated"), FORMS)
def test_slope_equals_autodiff(name, gated, x64):
  h = pre_activations()
  da = jnp.cos(pre_activations()[:, : 12 if gated else 24])

  @jax.jit
  def both(h, da):
    truth, vjp = jax.vjp(lambda h: plain.activate(h, name, gated), h)
    ours = get_activation(name, gated=gated).value_and_vjp(h, da)
    return ours, (truth, *vjp(da))

  for got, expected in zip(*both(h, da), strict=True):
    assert_accurate(got, expected, None)


@pytest.mark.parametrize(("name", "gated"), FORMS)
def test_tails_are_finite(name, gated):
  h = jnp.asarray([[-1e4, 1e4, 0.0, -80.0, 88.0, 1e-30]], jnp.float32)
  da = jnp.ones((1, 3 if gated else 6), jnp.float32)
  a, dh = jax.jit(get_activation(name, gated=gated).value_and_vjp)(h, da)
  assert np.all(np.isfinite(a)) and np.all(np.isfinite(dh))


@pytest.mark.parametrize(("name", "gated"), FORMS)
def test_exponential_ones_have_no_other_function(name, gated):
  # Of these a kernel approximates whatever is not arithmetic.
  activation = get_activation(name, gated=gated)
  jaxpr = jax.make_jaxpr(activation.value_and_slope)(jnp.zeros(3))
  functions = {str(eqn.primitive) for eqn in jaxpr.eqns} & {
    "exp", "logistic", "tanh", "erf", "log", "log1p", "expm1", "sin", "cos",
  }  # fmt: skip
  assert activation.is_exponential == (functions == {"logistic"})


def test_narrow_dtypes_are_computed_in_float32():
  h = pre_activations(jnp.float32).astype(jnp.bfloat16)
  got = get_activation("gelu_tanh", gated=True).apply(h)
  assert got.dtype == jnp.bfloat16
  truth = oracle.activate(oracle.f64(h), "gelu_tanh", True)
  assert_accurate(got, truth, None)


def test_gradients_are_zero_where_clamped():
  limit = 7.0
  h = jnp.asarray([[8.0, -8.0, 1.0, 1.0, 2.0, 9.0, -9.0, 2.0]], jnp.float32)
  _, dh = clamped_swiglu(limit=limit).value_and_vjp(h, jnp.ones((1, 4)))
  dg, du = np.split(np.asarray(dh), 2, axis=-1)
  # g is clamped from above only, u on both sides.
  np.testing.assert_array_equal(dg[0] == 0, [True, False, False, False])
  np.testing.assert_array_equal(du[0] == 0, [False, True, True, False])


def test_equal_activations_are_one_static_argument():
  assert clamped_swiglu() == clamped_swiglu()
  assert hash(clamped_swiglu()) == hash(clamped_swiglu())
  assert clamped_swiglu(limit=5.0) != clamped_swiglu()
  assert get_activation("silu", gated=True) is get_activation(
    "silu", gated=True
  )


def test_an_activation_of_the_users_own():
  softplus = Activation(
    "softplus", lambda z: (jnp.logaddexp(z, 0.0), jax.nn.sigmoid(z))
  )
  assert get_activation(softplus, gated=False) is softplus


@pytest.mark.parametrize(
  "function",
  [jax.nn.relu, lambda z: (z,), lambda z: (z[0], z), lambda z: [z, z]],
  ids=["array", "one", "shape", "list"],
)
def test_a_function_that_returns_no_pair_is_refused(function):
  mine = Activation("mine", function, gated=True)
  with pytest.raises(
    TypeError, match=r"smoe_mlp: .* 'mine' must return the pair .* jax\.jvp"
  ):
    get_activation(mine, gated=True, function="smoe_mlp")


def test_a_slope_may_be_a_number():
  twice = Activation("twice", lambda z: (2 * z, 2.0))
  assert get_activation(twice, gated=False) is twice


@pytest.mark.parametrize("unknown", ["swish", jax.nn.relu], ids=["str", "fn"])
def test_an_unknown_activation_is_named(unknown, unchecked):
  with pytest.raises(
    ValueError, match=r"must be one of \('silu', .*an Activation, got .*"
  ):
    get_activation(unknown, gated=False)


def test_a_gate_too_many_or_too_few_is_explained():
  with pytest.raises(
    ValueError, match="'clamped_swiglu' needs w_in of width 2n: .* a plain one"
  ):
    get_activation("clamped_swiglu", gated=False)
  plain_form = get_activation("relu", gated=False)
  with pytest.raises(
    ValueError, match="'relu' needs w_in of width n: .* a gated one"
  ):
    get_activation(plain_form, gated=True)


@pytest.mark.parametrize("field", ["limit", "up_offset"])
def test_what_a_gate_alone_has_is_refused_without_one(field):
  with pytest.raises(ValueError, match=f"{field} = 1.0 .*for gated = True"):
    Activation("mine", lambda z: (z, z), **{field: 1.0})
