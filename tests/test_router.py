"""Routers and their losses, against loops in NumPy float64."""

import warnings
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import nn as smnn
from scattermoe_jax.nn.router import Scoring
from tests.accuracy import assert_accurate

T, E, K, D = 24, 8, 3, 10


def logits(seed=0, shape=(T, E)):
  return np.random.default_rng(seed).normal(size=shape)


def softmax(z):
  p = np.exp(z - z.max())
  return p / p.sum()


def sigmoid(z):
  return 1 / (1 + np.exp(-z))


def largest(values, k):
  return sorted(range(len(values)), key=lambda e: -values[e])[:k]


def slow_softmax_top_k(z, *, renormalize):
  rows = []
  for row in z:
    probs = softmax(row)
    ids = largest(probs, K)
    gates = probs[ids]
    rows.append((gates / gates.sum() if renormalize else gates, ids, probs))
  return tuple(np.array(column) for column in zip(*rows, strict=True))


def slow_top_k_softmax(z):
  rows = []
  for row in z:
    ids = largest(row, K)
    rows.append((softmax(row[ids]), ids, softmax(row)))
  return tuple(np.array(column) for column in zip(*rows, strict=True))


def slow_sigmoid(z, bias, num_groups, top_groups, *, renormalize, scale):
  size = E // num_groups
  rows = []
  for row in z:
    scores = sigmoid(row)
    biased = scores + bias
    groups = [biased[g * size : (g + 1) * size] for g in range(num_groups)]
    best = largest([sum(sorted(g)[-2:]) for g in groups], top_groups)
    is_open = [e for e in range(E) if e // size in best]
    ids = sorted(is_open, key=lambda e: -biased[e])[:K]
    gates = scores[ids]
    if renormalize:
      gates = gates / gates.sum()
    rows.append((gates * scale, ids, scores / scores.sum()))
  return tuple(np.array(column) for column in zip(*rows, strict=True))


def assert_routed(got, expected):
  for name, a, b in zip(("gates", "ids", "probs"), got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("renormalize", [False, True])
def test_softmax_then_top_k_equals_its_definition(x64, renormalize):
  z = logits()
  got = smnn.softmax_then_top_k(jnp.asarray(z), K, renormalize=renormalize)
  assert_routed(got, slow_softmax_top_k(z, renormalize=renormalize))


def test_top_k_then_softmax_equals_its_definition(x64):
  z = logits()
  got = smnn.top_k_then_softmax(jnp.asarray(z), K)
  assert_routed(got, slow_top_k_softmax(z))
  renormalized = smnn.softmax_then_top_k(jnp.asarray(z), K, renormalize=True)
  assert_routed(got, renormalized)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1), (8, 3)])
def test_sigmoid_top_k_equals_its_definition(x64, groups, renormalize):
  # Biases below -1 make every ranking negative: a closed group masked with
  # zero would then win.
  z, bias = logits(), logits(1, (E,)) - 1.5
  got = smnn.sigmoid_top_k(
    jnp.asarray(z),
    K,
    selection_bias=jnp.asarray(bias),
    num_groups=groups[0],
    top_groups=groups[1],
    renormalize=renormalize,
    scale=2.5,
  )
  expected = slow_sigmoid(z, bias, *groups, renormalize=renormalize, scale=2.5)
  assert_routed(got, expected)


def test_selection_bias_has_no_gradient(x64):
  def total_gate(bias):
    gates, _, _ = smnn.sigmoid_top_k(
      jnp.asarray(logits()), K, selection_bias=bias
    )
    return jnp.sum(gates**2)

  assert not np.any(jax.grad(total_gate)(jnp.asarray(logits(1, (E,)))))


@pytest.mark.parametrize("z", [-45.0, -200.0])
def test_sigmoids_that_underflow_give_no_nan(z):
  # The square of the first is no float32, nor is the second.
  def total(z):
    gates, _, probs = smnn.sigmoid_top_k(z, K)
    return jnp.sum(gates) + jnp.sum(probs)

  value, dz = jax.value_and_grad(total)(jnp.full((T, E), z))
  assert 0 <= value < 2 * T
  assert np.all(np.isfinite(dz))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_groups": 3}, "num_groups = 3 must divide E = 8"),
    ({"num_groups": 4, "top_groups": 5}, r"lie in \[1, num_groups\], got 5"),
    ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
    ({"num_groups": 4, "top_groups": 0}, "top_groups must be at least 1, got"),
    ({"num_groups": 4, "top_groups": 1}, "k = 3 experts .* leave only 2 open"),
  ],
)
def test_sigmoid_top_k_refuses_groups_that_cannot_be(
  options, message, unchecked
):
  with pytest.raises(ValueError, match=message):
    smnn.sigmoid_top_k(jnp.asarray(logits(), jnp.float32), K, **options)


def test_update_selection_bias_lifts_the_idle():
  bias = jnp.zeros((2, 4))
  load = jnp.array([[0, 4, 2, 2], [5, 1, 1, 1]])
  new = smnn.update_selection_bias(bias, load, rate=0.5)
  np.testing.assert_array_equal(
    new, [[0.5, -0.5, 0.0, 0.0], [-0.5, 0.5, 0.5, 0.5]]
  )


def test_load_balancing_loss_is_k_at_perfect_balance(x64):
  probs = jnp.full((T, E), 1 / E)
  even = jnp.full((E,), T * K // E)
  np.testing.assert_allclose(smnn.load_balancing_loss(probs, even), K)


def test_load_balancing_loss_equals_its_definition(x64):
  z = logits()
  _, ids, probs = slow_softmax_top_k(z, renormalize=False)
  mask = np.arange(T) % 3 != 0
  f, p = np.zeros(E), np.zeros(E)
  for t in np.flatnonzero(mask):
    for e in ids[t]:
      f[e] += 1 / mask.sum()
    p += probs[t] / mask.sum()
  counts = jnp.asarray(f * mask.sum())
  got = smnn.load_balancing_loss(
    jnp.asarray(probs), counts, mask=jnp.asarray(mask)
  )
  np.testing.assert_allclose(got, E * np.sum(f * p), rtol=1e-12)


@pytest.mark.parametrize("num_real", [1, 5])
def test_z_loss_equals_its_definition(num_real, x64):
  z, mask = logits(), np.arange(T) < num_real
  squares = np.log(np.exp(z).sum(axis=1)) ** 2
  np.testing.assert_allclose(
    smnn.router_z_loss(jnp.asarray(z)), squares.mean(), rtol=1e-12
  )
  np.testing.assert_allclose(
    smnn.router_z_loss(jnp.asarray(z), mask=jnp.asarray(mask)),
    squares[mask].mean(),
    rtol=1e-12,
  )
  zeros = jnp.zeros((T, E))
  np.testing.assert_allclose(smnn.router_z_loss(zeros), np.log(E) ** 2)


def test_losses_of_no_token_are_zero_with_zero_gradients():
  none = jnp.zeros((T,), bool)

  def losses(z):
    probs = jax.nn.softmax(z)
    counts = jnp.zeros((E,), jnp.int32)
    balance = smnn.load_balancing_loss(probs, counts, mask=none)
    return balance + smnn.router_z_loss(z, mask=none)

  value, dz = jax.value_and_grad(losses)(jnp.asarray(logits(), jnp.float32))
  assert value == 0 and not np.any(dz)

  no_rows = jnp.zeros((0, E))
  assert smnn.router_z_loss(no_rows) == 0
  assert smnn.load_balancing_loss(no_rows, jnp.zeros((E,))) == 0


def test_counts_of_a_balancing_loss_carry_no_gradient():
  probs = jax.nn.softmax(jnp.asarray(logits(), jnp.float32))
  of_counts = lambda counts: smnn.load_balancing_loss(probs, counts)
  counts = jnp.full((E,), T / E)
  assert of_counts(counts) > 0
  assert not np.any(jax.grad(of_counts)(counts))


RULE_FUNCTIONS = {
  "softmax_then_top_k": lambda z, k: smnn.softmax_then_top_k(
    z, k, renormalize=True
  ),
  "top_k_then_softmax": smnn.top_k_then_softmax,
  "sigmoid_top_k": smnn.sigmoid_top_k,
}


@pytest.mark.parametrize(
  ("z", "k", "error", "message"),
  [
    (
      np.ones((2, T, E)),
      K,
      ValueError,
      r"logits must have shape \(T, E\), got \(2,",
    ),
    (np.ones((T, E), int), K, TypeError, "logits must be of a floating-point"),
    (None, K, TypeError, "logits must be an array, got None"),
    (np.ones((T, E)), 9, ValueError, r"k must lie in \[1, E = 8\], got 9"),
    (np.ones((T, E)), 0, ValueError, "k must be at least 1, got 0"),
    (np.ones((T, E)), 2.0, TypeError, "k must be a static int, got 2.0"),
  ],
)
@pytest.mark.parametrize("name", RULE_FUNCTIONS)
def test_rules_refuse_what_are_no_logits(name, z, k, error, message, unchecked):
  with pytest.raises(error, match=f"^{name}: {message}"):
    RULE_FUNCTIONS[name](z if z is None else jnp.asarray(z), k)


PROBS, LOAD = jnp.ones((T, E)), jnp.ones((E,))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: smnn.router_z_loss(PROBS[None]),
      r"router_z_loss: logits must have shape \(T, E\), got \(1, 24, 8\); ",
    ),
    (
      lambda: smnn.load_balancing_loss(PROBS[None], LOAD),
      r"load_balancing_loss: probs must have shape \(T, E\), got \(1, 24, 8",
    ),
    (
      lambda: smnn.load_balancing_loss(PROBS, LOAD[:1]),
      r"load_balancing_loss: tokens_per_expert must have shape \(8,\), got",
    ),
    (
      lambda: smnn.update_selection_bias(LOAD, PROBS),
      r"update_selection_bias: tokens_per_expert must have shape \(8,\), got",
    ),
    (
      lambda: smnn.sigmoid_top_k(PROBS, K, selection_bias=LOAD[:1]),
      r"sigmoid_top_k: selection_bias must have shape \(8,\), got \(1,\)",
    ),
  ],
)
def test_losses_and_biases_are_of_one_layer(call, message, unchecked):
  with pytest.raises(ValueError, match=f"^{message}"):
    call()


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_no_tokens_have_a_gradient(groups):
  # In JAX 0.7 lax.top_k of no rows has none.
  def total(z):
    gates = [rule(z, K)[0] for rule in RULE_FUNCTIONS.values()]
    gates.append(
      smnn.sigmoid_top_k(z, K, num_groups=groups[0], top_groups=groups[1])[0]
    )
    return sum(jnp.sum(g) for g in gates)

  assert jax.grad(total)(jnp.ones((0, E))).shape == (0, E)


RULES = {
  "softmax_top_k": lambda z: slow_softmax_top_k(z, renormalize=False),
  "softmax_top_k_renormalized": lambda z: slow_softmax_top_k(
    z, renormalize=True
  ),
  "top_k_softmax": slow_top_k_softmax,
  "sigmoid": lambda z: slow_sigmoid(
    z, 0, 1, 1, renormalize=True, scale=1
  ),
}  # fmt: skip


@pytest.mark.parametrize("scoring", RULES)
def test_router_applies_its_rule_to_its_logits(x64, scoring):
  router = smnn.Router(
    E, K, scoring, use_bias=True, scale=2.0,
    bias_init=jax.nn.initializers.normal(1.0), param_dtype=jnp.float64,
  )  # fmt: skip
  x = jnp.asarray(logits(2, (T, D)))
  out, params = router.init_with_output(jax.random.key(0), x)
  kernel, bias = params["params"]["kernel"], params["params"]["bias"]
  z = np.asarray(x) @ np.asarray(kernel) + np.asarray(bias)
  assert_accurate(out.logits, z, x @ kernel + bias[None])
  gates, ids, probs = RULES[scoring](z)
  assert_routed((out.gates, out.expert_ids, out.probs), (2 * gates, ids, probs))


def test_router_logits_are_float32_whatever_the_dtype():
  x = jnp.asarray(logits(2, (T, D)), jnp.bfloat16)
  router = smnn.Router(E, K, param_dtype=jnp.bfloat16)
  out, params = router.init_with_output(jax.random.key(0), x)
  kernel = params["params"]["kernel"]
  assert kernel.dtype == jnp.bfloat16
  assert all(a.dtype == jnp.float32 for a in (out.logits, out.gates, out.probs))
  # The operands are rounded, their product is not.
  exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
  wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
  assert_accurate(out.logits, exact, jnp.matmul(*wide, precision="highest"))


def test_router_asks_for_exact_products():
  router, x = smnn.Router(E, K), jnp.ones((T, D))
  params = router.init(jax.random.key(0), x)
  text = jax.jit(router.apply).lower(params, x).as_text()
  (product,) = [line for line in text.splitlines() if "dot_general" in line]
  assert "precision = [HIGHEST, HIGHEST]" in product


def test_router_adds_its_selection_bias_to_the_choice_alone():
  x = jnp.asarray(logits(2, (T, D)), jnp.float32)
  router = smnn.Router(E, K, "sigmoid", use_selection_bias=True)
  variables = router.init(jax.random.key(0), x)
  state = variables["router_state"]["selection_bias"]
  assert state.shape == (E,) and not np.any(state)
  favoured = {"selection_bias": state.at[5].set(10.0)}
  out = router.apply({**variables, "router_state": favoured}, x)
  assert np.all(out.expert_ids[:, 0] == 5)
  scores = jax.nn.sigmoid(jnp.take_along_axis(out.logits, out.expert_ids, 1))
  np.testing.assert_allclose(
    out.gates, scores / scores.sum(axis=1, keepdims=True), rtol=1e-6
  )


def test_jitter_scales_the_input_in_training_alone():
  x = jnp.ones((T, D))
  router = smnn.Router(E, K, jitter=0.1, kernel_init=jax.nn.initializers.ones)
  params = router.init(jax.random.key(0), x)
  calm = router.apply(params, x)
  np.testing.assert_allclose(calm.logits, D)
  noisy = router.apply(
    params, x, deterministic=False, rngs={"router": jax.random.key(1)}
  )
  assert np.all(np.abs(noisy.logits - D) <= 0.1 * D)
  assert noisy.logits.min() < D < noisy.logits.max()
  assert len(np.unique(noisy.logits[:, 0])) == T


def test_jitter_keeps_float64(x64):
  x = jnp.asarray(logits(2, (T, D)))
  router = smnn.Router(E, K, jitter=0.1)
  rngs = {name: jax.random.key(0) for name in ("params", "router")}
  out, _ = router.init_with_output(rngs, x, deterministic=False)
  assert out.logits.dtype == jnp.float64


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"top_k": 9}, r"top_k must lie in \[1, num_experts = 8\], got 9"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"scoring": "best"}, "scoring must be one of .*got 'best'"),
    ({"num_groups": 2}, "need scoring='sigmoid'"),
    ({"use_selection_bias": True}, "need scoring='sigmoid'"),
  ],
)
def test_router_refuses_fields_that_cannot_be(unchecked, fields, message):
  router = smnn.Router(**{"num_experts": E, "top_k": K, **fields})
  with pytest.raises(ValueError, match=message):
    router.init(jax.random.key(0), jnp.ones((T, D)))


@pytest.mark.parametrize(
  "scoring, renormalize",
  [*((scoring, True) for scoring in get_args(Scoring)), ("sigmoid", False)],
)
def test_a_single_gate_that_is_always_one_is_warned_of(scoring, renormalize):
  router = smnn.Router(E, 1, scoring=scoring, renormalize=renormalize)
  x = jnp.asarray(logits(0, (T, D)), jnp.float32)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out, _ = router.init_with_output(jax.random.key(0), x)
  assert bool(caught) == bool(np.all(out.gates == 1))
