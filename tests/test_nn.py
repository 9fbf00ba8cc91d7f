"""The Flax modules: their arithmetic, dtypes, masks and transformations."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import scattermoe_jax as sm
from scattermoe_jax import nn as smnn
from tests import oracle
from tests.accuracy import assert_accurate

B, L, D, N, E, K = 2, 9, 12, 16, 6, 2
T = B * L
NORMAL = nn.initializers.normal(0.5)


def tokens(seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), (B, L, D)).astype(dtype)


def block(**fields):
  fields = {"num_experts": E, "top_k": K, "d_expert": N, **fields}
  return smnn.SMoEBlock(**fields)


def choices(seed=1):
  rng = np.random.default_rng(seed)
  ids = np.argsort(rng.normal(size=(T, E)))[:, :K]
  return jnp.asarray(rng.uniform(size=(T, K)), jnp.float32), ids


def assert_close(got, expected, limit):
  """Asserts that no entry is off by `limit` of the largest one."""
  error = np.abs(np.float64(got) - np.float64(expected)).max()
  assert error <= limit * np.abs(np.float64(expected)).max()


def assert_same_tree(got, expected, limit=1e-5):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert_close(a, b, limit)


def initialized(module, *args):
  """Returns (output, variables), the latter random, not by the initializers.

  Compiles the forward alone, where `init` would compile the draws as well.
  """
  variables = randomized(module, *args)
  return jax.jit(module.apply)(variables, *args), variables


def randomized(module, *args):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  return jax.tree.map(
    lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes
  )


@pytest.mark.parametrize("use_bias", [False, True])
def test_parallel_linear_multiplies_by_its_parameters(use_bias):
  layer = smnn.ParallelLinear(N, E, use_bias=use_bias, bias_init=NORMAL)
  _, ids = choices()
  routing = sm.route(jnp.asarray(ids), E)
  x = tokens().reshape(T, D)
  y, variables = initialized(layer, x, routing)
  params = variables["params"]
  shapes = {"kernel": (E, D, N), "bias": (E, N)}
  expected_shapes = shapes if use_bias else {"kernel": shapes["kernel"]}
  assert jax.tree.map(jnp.shape, params) == expected_shapes
  bias = params.get("bias")
  expected = oracle.scatter2scatter(x, params["kernel"], ids, bias=bias)
  baseline = sm.parallel_linear(x, params["kernel"], routing, bias=bias)
  assert_accurate(y, expected, baseline)
  grouped = jax.jit(lambda *args: layer.apply(*args, grouped_out=True))(
    variables, x, routing
  )
  np.testing.assert_array_equal(grouped, y[routing.scattered_ids])


@pytest.mark.parametrize(
  ("gated", "use_bias"), [(True, False), (True, True), (False, True)]
)
def test_smoe_mlp_computes_the_weighted_sum(gated, use_bias):
  layer = smnn.SMoEMLP(
    E, N, activation="gelu", gated=gated, use_bias=use_bias, bias_init=NORMAL
  )
  gates, ids = choices()
  x = tokens()
  batch = (x, gates.reshape(B, L, K), jnp.asarray(ids).reshape(B, L, K))
  y, variables = initialized(layer, *batch)
  params = dict(variables["params"])
  names = {"w_gate_up" if gated else "w_in", "w_out"}
  names |= {"bias_in", "bias_out"} if use_bias else set()
  assert set(params) == names
  w_in = params.pop("w_gate_up" if gated else "w_in")
  assert w_in.shape == (E, D, 2 * N if gated else N)
  arrays = (x.reshape(T, D), gates)
  weights = (w_in, params.pop("w_out"))
  expected = oracle.smoe_mlp(
    *arrays, ids, *weights, activation="gelu", **params
  )
  routing = sm.route(jnp.asarray(ids), E)
  baseline = sm.smoe_mlp(
    *arrays, routing, *weights, activation="gelu", **params
  )
  assert_accurate(y.reshape(T, D), expected, baseline)
  np.testing.assert_array_equal(
    jax.jit(layer.apply)(variables, *batch[:2], routing),
    y,
    err_msg="routing given",
  )


def test_initializers_scale_by_the_fan_in_of_one_expert():
  # A fan-in that counted the experts' axis would be E times too large.
  layer = smnn.SMoEMLP(64, 128)
  x = jnp.zeros((1, 256))
  params = layer.init(
    jax.random.key(0), x, jnp.zeros((1, 1)), jnp.zeros((1, 1), jnp.int32)
  )["params"]
  np.testing.assert_allclose(jnp.std(params["w_gate_up"]), 256**-0.5, rtol=0.02)
  np.testing.assert_allclose(jnp.std(params["w_out"]), 128**-0.5, rtol=0.02)


@pytest.mark.parametrize("shared_gate", [False, True])
def test_block_adds_shared_experts_to_routed_ones(shared_gate):
  x = tokens()
  module = block(
    num_shared_experts=2,
    shared_gate=shared_gate,
    use_output_bias=True,
    bias_init=NORMAL,
  )
  (y, metrics), variables = initialized(module, x)
  params = variables["params"]
  routed = smnn.Router(E, K).apply(
    {"params": params["router"]}, x.reshape(T, D)
  )
  experts = smnn.SMoEMLP(E, N).apply(
    {"params": params["experts"]},
    x.reshape(T, D),
    routed.gates,
    routed.expert_ids,
  )
  w_in, w_out = params["shared"]["w_gate_up"], params["shared"]["w_out"]
  assert w_out.shape == (2 * N, D)
  # One expert, taken by all with gate 1, is a dense MLP.
  shared = oracle.smoe_mlp(
    x.reshape(T, D),
    np.ones((T, 1)),
    np.zeros((T, 1), int),
    w_in[None],
    w_out[None],
  )
  if shared_gate:
    logits = oracle.f64(x.reshape(T, D)) @ oracle.f64(
      params["shared_gate"]["kernel"]
    )
    shared = shared / (1 + np.exp(-logits))
  expected = oracle.f64(experts) + shared + oracle.f64(params["output_bias"])
  assert_close(y.reshape(T, D), expected, 1e-6)
  assert metrics.tokens_per_expert.sum() == T * K
  np.testing.assert_array_equal(
    metrics.tokens_per_expert,
    np.bincount(np.ravel(routed.expert_ids), minlength=E),
  )
  np.testing.assert_allclose(
    metrics.load_balancing_loss,
    E * np.sum(metrics.tokens_per_expert / T * np.mean(routed.probs, axis=0)),
    rtol=1e-6,
  )


def test_masked_tokens_change_nothing_and_get_nothing():
  x = tokens()
  real = np.arange(T).reshape(B, L) % 4 != 1
  module = block(num_shared_experts=1, use_output_bias=True, bias_init=NORMAL)
  variables = randomized(module, x)

  def run(params, x, mask):
    y, metrics = module.apply({"params": params}, x, mask=mask)
    losses = metrics.load_balancing_loss + metrics.router_z_loss
    return jnp.sum(y**2) + losses, (y, metrics)

  step = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
  (dparams, dx), (y, metrics) = step(variables["params"], x, jnp.asarray(real))
  assert not np.any(np.asarray(y)[~real])
  assert not np.any(np.asarray(dx)[~real])
  assert metrics.tokens_per_expert.sum() == K * real.sum()
  # As if the masked tokens had never been there.
  few = x[jnp.asarray(real)][None]
  (dparams_few, dx_few), (y_few, metrics_few) = step(
    variables["params"], few, jnp.ones(few.shape[:2], bool)
  )
  assert_close(y[jnp.asarray(real)], y_few[0], 1e-5)
  assert_same_tree(
    (dparams, dx[jnp.asarray(real)][None], metrics),
    (dparams_few, dx_few, metrics_few),
  )


def test_masked_tokens_may_hold_anything():
  x = tokens()
  real = jnp.asarray(np.arange(T).reshape(B, L) % 4 != 1)
  module = block(
    num_shared_experts=1,
    shared_gate=True,
    use_bias=True,
    use_output_bias=True,
    bias_init=NORMAL,
  )
  variables = randomized(module, x)

  def run(params, x):
    y, metrics = module.apply({"params": params}, x, mask=real)
    losses = metrics.load_balancing_loss + metrics.router_z_loss
    return jnp.sum(y**2) + losses, (y, metrics)

  step = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
  clean = step(variables["params"], x)
  for padding in (jnp.nan, jnp.inf, 1e38):
    dirty = jnp.where(real[:, :, None], x, padding)
    got = step(variables["params"], dirty)
    jax.tree.map(np.testing.assert_array_equal, got, clean)
    assert not np.any(got[1][0][~real])


def test_float32_parameters_compute_in_bfloat16():
  x = tokens(dtype=jnp.bfloat16)
  module = block(dtype=jnp.bfloat16, num_shared_experts=1)
  (y, metrics), variables = initialized(module, x)
  assert y.dtype == jnp.bfloat16
  assert metrics.load_balancing_loss.dtype == jnp.float32
  grads = jax.jit(
    jax.grad(
      lambda p: module.apply({"params": p}, x)[0].astype(jnp.float32).sum()
    )
  )(variables["params"])
  for leaf in jax.tree.leaves((variables, grads)):
    assert leaf.dtype == jnp.float32
  exact = jax.jit(block(num_shared_experts=1).apply)(
    variables, x.astype(jnp.float32)
  )
  scale = np.abs(exact[0]).max()
  assert np.abs(y.astype(np.float32) - exact[0]).max() < 0.02 * scale


def test_dtype_none_promotes_as_dense_does():
  x, key = tokens(dtype=jnp.bfloat16), jax.random.key(0)
  with jax.numpy_dtype_promotion("standard"):
    y = jax.eval_shape(block().init_with_output, key, x)[0][0]
    dense = jax.eval_shape(nn.Dense(4).init_with_output, key, x)[0]
  assert y.dtype == dense.dtype == jnp.float32


def test_bad_input_is_named(unchecked):
  layer = smnn.SMoEMLP(E, N)
  x, gates = jnp.ones((T, D)), jnp.ones((T, K))
  with pytest.raises(TypeError, match="expert_ids must be integers"):
    layer.init(jax.random.key(0), x, gates, gates)
  ids = jnp.zeros((T, K), jnp.int32)
  with pytest.raises(ValueError, match="activation must be one of"):
    smnn.SMoEMLP(E, N, activation="tan").init(jax.random.key(0), x, gates, ids)
  variables = layer.init(jax.random.key(0), x, gates, ids)
  with pytest.raises(flax.errors.ScopeParamShapeError):
    layer.apply(variables, jnp.ones((T, D + 1)), gates, ids)


def test_shared_experts_of_width_zero_are_none():
  module = block(num_shared_experts=2, d_shared=0)
  assert "shared" not in randomized(module, tokens())["params"]


def test_no_tokens_give_an_empty_result():
  module = block(num_shared_experts=1)
  variables = randomized(module, tokens())
  y, metrics = module.apply(variables, jnp.zeros((0, L, D)))
  assert y.shape == (0, L, D)
  assert metrics.load_balancing_loss == 0
  assert not np.any(metrics.tokens_per_expert)
