"""The language model: what each config field does, caches, masks, sampling."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax.models import (
  ModelConfig,
  Transformer,
  init_cache,
)
from scattermoe_jax.models.sampling import choose_token, sample
from scattermoe_jax.models.training import (
  count_active_params,
  count_params,
)
from scattermoe_jax.nn import RopeScaling
from tests.accuracy import assert_accurate

TINY = ModelConfig(
  vocab_size=19,
  d_model=16,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  num_experts=4,
  d_expert=8,
  attention_experts=3,
  attention_top_k=2,
  d_ff=8,
)
# The families that the fields were made for, in small.
FAMILIES = {
  "qwen3": {
    "scoring": "softmax_top_k_renormalized",
    "qk_norm": "head",
    "dense_layers": (1,),
    "tie_embeddings": False,
  },
  "olmoe": {"scoring": "softmax_top_k", "qk_norm": "vector", "clip_qkv": 0.5},
  "gpt-oss": {
    "attention_bias": True,
    "attention_sinks": True,
    "sliding_window": 3,
    "sliding_layers": (0,),
    "rope_scaling": RopeScaling(4.0, 8, truncate=False),
    "activation": "clamped_swiglu",
    "expert_bias": True,
    "router_bias": True,
  },
  "deepseek": {
    "scoring": "sigmoid",
    "selection_bias": True,
    "num_groups": 2,
    "top_groups": 1,
    "routed_scale": 2.5,
    "d_shared": 8,
  },
  "jetmoe": {"attention": "moa", "block_bias": True},
}


def config_of(family: str, **fields) -> ModelConfig:
  return dataclasses.replace(TINY, **FAMILIES[family], **fields)


@functools.cache
def shapes_of(model: Transformer):
  ids = jnp.zeros((1, 4), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), ids)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model: Transformer, variables, ids):
  return model.apply(variables, ids).logits


def random_variables(model: Transformer, seed: int = 0):
  """Returns variables with no zeros or ones left, so that each one matters."""
  leaves, tree = jax.tree.flatten(shapes_of(model))
  random = np.random.default_rng(seed)
  return tree.unflatten(
    jnp.asarray(random.normal(size=s.shape) * 0.4, s.dtype) for s in leaves
  )


def random_ids(*shape, seed=1):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.integers(0, TINY.vocab_size, shape), jnp.int32)


# Computed in float64 and rounded to float32 at the end, two ways to the same
# logits may differ in the last place only.
DOUBLE = {"dtype": "float64", "param_dtype": "float64"}


def assert_equal(got, want, *, err_msg):
  assert_accurate(got, want, None, err_msg=err_msg)


@pytest.fixture(params=FAMILIES)
def family(request, x64):
  """Returns (apply, variables) of a small model of each family, in float64."""
  config = config_of(request.param, **DOUBLE)
  model = Transformer(config)
  variables = random_variables(model)
  return config, functools.partial(jax.jit(model.apply), variables)


def test_families_are_causal_packed_and_cached(family):
  # One test, as every new shape compiles: all calls but the cache's share one.
  config, apply = family
  ids = random_ids(2, 8)
  ones = jnp.ones_like(ids)
  full = apply(ids, segment_ids=ones).logits
  assert full.std() > 0.1

  later = ids.at[:, 5].set((ids[:, 5] + 1) % TINY.vocab_size)
  changed = apply(later, segment_ids=ones).logits
  assert_equal(changed[:, :5], full[:, :5], err_msg="a token sees later ones")
  assert np.abs(changed - full)[:, 5:].max(axis=-1).min() > 1e-4

  segment_ids = ones.at[:, 5:].set(2)
  packed = apply(ids, segment_ids=segment_ids).logits
  moved = jnp.concatenate([ids[:, 5:], ids[:, :5]], axis=1)
  alone = apply(moved, segment_ids=ones).logits
  assert_equal(packed[:, :5], full[:, :5], err_msg="first of two packed texts")
  assert_equal(
    packed[:, 5:], alone[:, :3], err_msg="second of two packed texts"
  )

  logits, cache = [], init_cache(config, 2, 10)
  for i in range(0, 8, 2):
    output = apply(ids[:, i : i + 2], cache=cache)
    logits.append(output.logits)
    cache = output.cache
  assert int(cache[0].length) == 8
  assert_equal(np.concatenate(logits, axis=1), full, err_msg="cache")


# In float32: on JAX 0.7, attention of fully masked rows is NaN in float64.
@pytest.mark.parametrize("name", ["deepseek", "jetmoe"])
def test_padding_is_not_seen_and_costs_nothing(name):
  config = config_of(name)
  model = Transformer(config)
  apply = functools.partial(jax.jit(model.apply), random_variables(model))
  ids = random_ids(2, 8)
  ones = jnp.ones_like(ids)
  full = apply(ids, segment_ids=ones).logits
  padded = apply(ids, segment_ids=ones.at[:, 6:].set(0))
  np.testing.assert_allclose(padded.logits[:, :6], full[:, :6], rtol=1e-4)
  assert bool(jnp.isfinite(padded.logits).all())
  for metrics, top_k in zip(
    padded.metrics, (config.top_k, config.attention_top_k), strict=True
  ):
    if metrics is not None:
      rows = metrics.tokens_per_expert.sum(axis=1)
      np.testing.assert_array_equal(rows, 2 * 6 * top_k)


# One value other than TINY's for each field, with what the field acts on.
OTHER_VALUES = {
  "vocab_size": 23,
  "d_model": 20,
  "num_layers": 2,
  "attention": "moa",
  "num_heads": 2,
  "num_kv_heads": 4,
  "head_dim": 6,
  "attention_bias": True,
  "attention_sinks": True,
  "attention_scale": 1.5,
  "qk_norm": "head",
  "clip_qkv": 0.1,
  "sliding_window": 2,
  "rope_theta": 50.0,
  "rope_scaling": RopeScaling(4.0, 8),
  "ffn": "dense",
  "dense_layers": (0,),
  "num_experts": 5,
  "top_k": 3,
  "d_expert": 6,
  "activation": "gelu",
  "gated": False,
  "expert_bias": True,
  "d_shared": 4,
  "scoring": "softmax_top_k",
  "router_bias": True,
  "routed_scale": 2.0,
  "block_bias": True,
  "embedding_multiplier": 3.0,
  "residual_multiplier": 0.5,
  "logits_divisor": 2.0,
  "tie_embeddings": False,
  "norm_eps": 0.1,
  "final_norm_eps": 0.1,
  "dtype": "bfloat16",
}
# Fields that act only beside another, and those that change no result.
WITH = {
  "attention_experts": ({"attention": "moa"}, 4),
  "attention_top_k": ({"attention": "moa"}, 3),
  "attention_scoring": ({"attention": "moa"}, "softmax_top_k"),
  "sliding_layers": ({"sliding_window": 2}, ()),
  "d_ff": ({"ffn": "dense"}, 12),
  "shared_gate": ({"d_shared": 4}, True),
  "num_groups": ({"scoring": "sigmoid"}, 2),
  "top_groups": ({"scoring": "sigmoid", "num_groups": 2}, 2),
  "selection_bias": ({"scoring": "sigmoid"}, True),
}
NEUTRAL = {"param_dtype", "remat", "implementation", "router_jitter"}


def test_every_config_field_is_tested():
  fields = {field.name for field in dataclasses.fields(ModelConfig)}
  assert fields == OTHER_VALUES.keys() | WITH.keys() | NEUTRAL


def test_every_config_field_acts():
  ids = random_ids(1, 6)

  @functools.cache
  def logits(config):
    # Not jitted: the operations that configs share are compiled once.
    model = Transformer(config)
    return model.apply(random_variables(model), ids).logits

  cases = {name: ({}, value) for name, value in OTHER_VALUES.items()} | WITH
  for name, (others, value) in cases.items():
    base = dataclasses.replace(TINY, num_layers=1, **others)
    changes = {name: value}
    if name == "attention_top_k":
      changes["num_heads"] = value * TINY.num_kv_heads
    changed = dataclasses.replace(base, **changes)
    if shapes_of(Transformer(base)) == shapes_of(Transformer(changed)):
      difference = float(jnp.abs(logits(changed) - logits(base)).max())
      assert difference > 1e-3, f"{name} does nothing"


def test_remat_and_dtypes_leave_the_function():
  config = dataclasses.replace(TINY, num_layers=1)
  variables = random_variables(Transformer(config))
  ids = random_ids(1, 6)
  logits = logits_of(Transformer(config), variables, ids)
  remat = Transformer(dataclasses.replace(config, remat=True))

  def loss(params, model):
    return jnp.square(model.apply({"params": params}, ids).logits).mean()

  grad = jax.jit(jax.grad(loss), static_argnums=1)
  grads = grad(variables["params"], Transformer(config))
  again = grad(variables["params"], remat)
  for a, b in zip(*map(jax.tree.leaves, (grads, again)), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4)
  half = dataclasses.replace(config, dtype="bfloat16")
  rounded = logits_of(Transformer(half), variables, ids)
  assert rounded.dtype == jnp.float32
  correlation = np.corrcoef(np.ravel(rounded), np.ravel(logits))[0, 1]
  assert correlation > 0.98
  narrow = dataclasses.replace(half, param_dtype="bfloat16")
  shapes = shapes_of(Transformer(narrow))
  assert {s.dtype for s in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("name", ["qwen3", "jetmoe"])
def test_every_intermediate_can_be_captured(name):
  model = Transformer(config_of(name))
  variables, ids = random_variables(model), random_ids(1, 6)

  @jax.jit
  def run(variables):
    return model.apply(variables, ids, capture_intermediates=lambda *_: True)

  output, state = run(variables)
  captured = state["intermediates"]["__call__"][0]
  np.testing.assert_array_equal(captured.logits, output.logits)


@pytest.mark.parametrize("routed", ["ffn", "attention"])
def test_jitter_needs_a_key_and_changes_training_only(routed):
  config = dataclasses.replace(TINY, num_layers=1, router_jitter=0.5)
  if routed == "attention":
    config = dataclasses.replace(config, ffn="dense", attention="moa")
  model = Transformer(config)
  variables = random_variables(model)
  ids = random_ids(1, 6)
  calm = logits_of(model, variables, ids)

  @jax.jit
  def train(seed):
    rngs = {"router": jax.random.key(seed)}
    return model.apply(variables, ids, deterministic=False, rngs=rngs).logits

  noisy = [train(seed) for seed in (0, 1)]
  assert not np.allclose(noisy[0], calm)
  assert not np.allclose(noisy[0], noisy[1])


@pytest.mark.parametrize("attention", ["mha", "moa"])
def test_dense_twin_has_as_many_active_params_but_for_routers(attention):
  config = dataclasses.replace(TINY, attention=attention)

  def counts(config):
    model = Transformer(config)
    params = shapes_of(model)["params"]
    return count_active_params(params, model), count_params(params)

  active, total = counts(config)
  twin_active, twin_total = counts(config.dense_twin())
  routers = config.d_model * config.num_experts * config.num_layers
  if attention == "moa":
    routers += config.d_model * config.attention_experts * config.num_layers
  assert twin_active == twin_total == active - routers
  assert total > active
  assert config.dense_twin().dense_twin() == config.dense_twin()


def test_config_survives_json(unchecked):
  config = dataclasses.replace(TINY, **FAMILIES["gpt-oss"])
  text = json.dumps(config.to_dict())
  assert ModelConfig.from_dict(json.loads(text)) == config
  named = dataclasses.replace(TINY, dtype="bfloat16")
  assert dataclasses.replace(TINY, dtype=jnp.bfloat16) == named
  with pytest.raises(ValueError, match=r"unknown fields \['d_modell'\]"):
    ModelConfig.from_dict({"d_modell": 3})


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"attention": "mla"}, r"attention must be one of .* got 'mla'"),
    ({"ffn": "mlp"}, r"ffn must be one of"),
    ({"qk_norm": "whole"}, r"qk_norm must be one of"),
    ({"activation": "swish"}, r"activation must be one of .* got 'swish'"),
    ({"num_heads": 3}, r"num_heads = 3 is not a multiple of num_kv_heads = 2"),
    ({"head_dim": 5}, r"head_dim = 5 must be even"),
    ({"attention": "moa", "num_heads": 2}, r"= 4 query heads, got num_heads"),
    ({"attention": "moa", "qk_norm": "head"}, r"qk_norm needs attention="),
    ({"top_k": 5}, r"top_k = 5 is above num_experts = 4"),
    ({"num_layers": 0}, r"num_layers must be at least 1, got 0"),
    ({"num_experts": 0}, r"num_experts must be at least 1, got 0"),
    ({"ffn": "dense", "d_ff": 0}, r"d_ff must be at least 1, got 0"),
    (
      {"attention": "moa", "attention_experts": 0},
      r"attention_experts must be at least 1, got 0",
    ),
    ({"d_ff": -1}, r"d_ff must be at least 0, got -1"),
    ({"dense_layers": (2,)}, r"dense_layers = \(2,\) .* 2 layers"),
    ({"sliding_layers": (-1,)}, r"sliding_layers = \(-1,\) .* 2 layers"),
    ({"norm_eps": -1.0}, r"norm_eps must be above 0, got -1.0"),
    ({"final_norm_eps": 0.0}, r"final_norm_eps must be above 0, got 0.0"),
    ({"dtype": "bf16"}, r"dtype = 'bf16' is no floating-point dtype; such"),
    ({"param_dtype": "int8"}, r"param_dtype = 'int8' is no floating-point"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradicting_fields_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"tie_embeddings": "false"}, "tie_embeddings must be True or False, got"),
    ({"remat": 1}, "remat must be True or False, got 1"),
    ({"dense_layers": 0}, "dense_layers must be a tuple of layers, got 0"),
    ({"dense_layers": None}, "dense_layers must be a tuple of layers, got No"),
    ({"sliding_layers": 1}, "sliding_layers must be a tuple of layers, got 1"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_of_another_kind_are_refused(fields, message, unchecked):
  with pytest.raises(TypeError, match=f"ModelConfig: {message}"):
    dataclasses.replace(TINY, **fields)


def test_a_model_says_what_it_is_called_with(unchecked):
  run = lambda ids, cache=None: jax.eval_shape(
    lambda: Transformer(TINY).init(jax.random.key(0), ids, cache=cache)
  )
  ids, cache = jnp.zeros((1, 4), jnp.int32), init_cache(TINY, 1, 8)
  run(ids, cache)
  with pytest.raises(ValueError, match=r"input_ids must have shape \(B, L\)"):
    run(ids[0])
  with pytest.raises(
    TypeError, match="input_ids must be integers, got float32"
  ):
    run(ids.astype(jnp.float32))
  for wrong in (cache[0], cache[:1], ()):
    with pytest.raises(
      ValueError, match="must be a tuple of 2 KVCache, one per"
    ):
      run(ids, wrong)


def test_sizes_of_what_a_model_has_not_may_be_zero():
  no_experts = dict(num_experts=0, top_k=0, d_expert=0)
  dense = dataclasses.replace(TINY, ffn="dense", **no_experts)
  no_mixture = dict(attention_experts=0, attention_top_k=0)
  plain = dataclasses.replace(dense, attention="mha", **no_mixture)
  assert shapes_of(Transformer(plain)) == shapes_of(Transformer(dense))
  assert dataclasses.replace(TINY, d_ff=0).is_moe(0)


def test_greedy_sample_takes_the_likeliest_token_of_the_full_pass():
  model = Transformer(TINY)
  variables = random_variables(model)
  prompt = random_ids(2, 3)

  @jax.jit
  def greedy(variables, prompt):
    key = jax.random.key(0)
    return sample(model, variables, prompt, 4, key=key, temperature=0.0)

  tokens = greedy(variables, prompt)
  text = jnp.concatenate([prompt, tokens], axis=1)
  logits = logits_of(model, variables, text)
  np.testing.assert_array_equal(tokens, logits[:, 2:-1].argmax(axis=-1))


def test_top_p_keeps_the_fewest_likeliest_tokens():
  probs = jnp.array([[0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]])
  keys = jax.random.split(jax.random.key(0), 300)

  def draw(top_p, temperature=1.0):
    choose = functools.partial(
      choose_token, jnp.log(probs), top_p=top_p, temperature=temperature
    )
    return [set(row) for row in np.asarray(jax.vmap(choose)(keys)).T.tolist()]

  assert draw(0.4) == [{0}, {3}]
  assert draw(0.6) == [{0, 2}, {2, 3}]
  assert draw(1.0) == [{0, 1, 2, 3}, {0, 1, 2, 3}]
  assert draw(1.0, temperature=0.01) == [{0}, {3}]
  assert draw(1.0, temperature=0.4) != [{0}, {3}]
