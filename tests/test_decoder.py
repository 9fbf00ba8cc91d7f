"""The language model against its definition in plain JAX, in float64.

What the mixtures compute is pinned elsewhere: they stand in the definition with
their fields written out once more, so that no field of the config is lost.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax.models import ModelConfig, Transformer, init_cache
from scattermoe_jax.models.transformer import RMSNorm
from scattermoe_jax.nn import (
  MixtureOfAttention,
  RopeScaling,
  SMoEBlock,
  rotary_embedding,
)
from tests.accuracy import assert_accurate
from tests.test_models import random_ids, random_variables

DOUBLE = {"dtype": "float64", "param_dtype": "float64"}
B, L = 2, 7
# Neither from 0 nor one by one.
POSITIONS = np.array([[3, 4, 6, 0, 2, 3, 7], [1, 2, 4, 5, 7, 8, 9]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)

# No two sizes or numbers that a mistake could exchange are equal.
SIZES = dict(vocab_size=19, d_model=10, num_experts=5, d_expert=6)
MHA = dict(num_heads=4, num_kv_heads=2, head_dim=6, d_ff=8)
MULTIPLIERS = dict(
  embedding_multiplier=3.0, residual_multiplier=0.7, logits_divisor=1.7
)
STRETCHED = RopeScaling(4.0, 8, truncate=False)
CASES = {
  "norm-of-heads": dict(
    **SIZES, **MHA, **MULTIPLIERS, num_layers=3, qk_norm="head",
    attention_bias=True, attention_sinks=True, attention_scale=0.3,
    sliding_window=2, sliding_layers=(1,), rope_theta=50.0,
    rope_scaling=STRETCHED, dense_layers=(1,), top_k=2, activation="gelu",
    expert_bias=True, d_shared=7, shared_gate=True, scoring="sigmoid",
    router_bias=True, routed_scale=2.5, selection_bias=True,
    tie_embeddings=False, norm_eps=0.1, final_norm_eps=0.3,
  ),
  "norm-of-vectors": dict(
    **SIZES, **MHA, num_layers=2, qk_norm="vector", clip_qkv=0.5,
    sliding_window=3, dense_layers=(0,), top_k=1, activation="relu",
    gated=False, scoring="softmax_top_k", norm_eps=0.1,
  ),
  "mixture-of-attention": dict(
    **SIZES, **MULTIPLIERS, num_layers=2, attention="moa", num_heads=4,
    num_kv_heads=2, head_dim=6, attention_experts=3, attention_top_k=2,
    attention_scoring="softmax_top_k", attention_scale=0.3, sliding_window=2,
    sliding_layers=(1,), rope_theta=50.0, rope_scaling=STRETCHED, top_k=2,
    block_bias=True, scoring="softmax_top_k_renormalized", norm_eps=0.1,
  ),
}  # fmt: skip
BLOCKS = {
  "norm-of-heads": SMoEBlock(
    num_experts=5, top_k=2, d_expert=6, activation="gelu", use_bias=True,
    scoring="sigmoid", router_use_bias=True, scale=2.5, use_selection_bias=True,
    d_shared=7, shared_gate=True, **DOUBLE,
  ),
  "norm-of-vectors": SMoEBlock(
    num_experts=5, top_k=1, d_expert=6, activation="relu", gated=False,
    scoring="softmax_top_k", **DOUBLE,
  ),
  "mixture-of-attention": SMoEBlock(
    num_experts=5, top_k=2, d_expert=6, use_output_bias=True,
    scoring="softmax_top_k_renormalized", **DOUBLE,
  ),
}  # fmt: skip
MOA = MixtureOfAttention(
  num_experts=3, top_k=2, num_heads=2, head_dim=6, scoring="softmax_top_k",
  rope_theta=50.0, rope_scaling=STRETCHED, scale=0.3, use_output_bias=True,
  **DOUBLE,
)  # fmt: skip


def norm(x, p, eps):
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * p["scale"]


def dense(x, p):
  return x @ p["kernel"] + p.get("bias", 0.0)


def attention(config, p, x, positions, sees):
  """softmax(q k^T scale, sink) v, each two heads of queries to one of keys."""
  q, k, v = (dense(x, p[name]) for name in ("query", "key", "value"))
  heads = lambda y: y.reshape(B, L, -1, 6)
  if config.qk_norm == "vector":
    q, k = norm(q, p["query_norm"], 0.1), norm(k, p["key_norm"], 0.1)
  if config.clip_qkv:
    q, k, v = (jnp.minimum(jnp.maximum(y, -0.5), 0.5) for y in (q, k, v))
  q, k, v = heads(q), heads(k), heads(v)
  if config.qk_norm == "head":
    q, k = norm(q, p["query_norm"], 0.1), norm(k, p["key_norm"], 0.1)
  turn = functools.partial(
    rotary_embedding,
    theta=config.rope_theta,
    scaling=config.rope_scaling,
  )
  q, k = turn(q, positions), turn(k, positions)
  k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
  scale = config.attention_scale or 6**-0.5
  powers = jnp.exp(jnp.einsum("blhc,bmhc->bhlm", q, k) * scale)
  powers = jnp.where(sees[:, None], powers, 0)
  total = powers.sum(axis=-1, keepdims=True)
  if "sinks" in p:
    total += jnp.exp(p["sinks"])[None, :, None, None]
  y = jnp.einsum("bhlm,bmhc->blhc", powers / total, v)
  return dense(y.reshape(B, L, -1), p["output"])


def mlp(config, p, x):
  if config.gated:
    gate, up = jnp.split(x @ p["w_gate_up"], 2, axis=-1)
    return (jax.nn.gelu(gate, approximate=False) * up) @ p["w_out"]
  return jnp.maximum(x @ p["w_in"], 0) @ p["w_out"]


def decoder(name, variables, ids, positions, segment_ids, distance):
  """Returns logits and the metrics of each mixture, in the order of layers."""
  config = ModelConfig(**CASES[name])
  params, biases = variables["params"], variables.get("router_state", {})
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  causal = np.tri(L, dtype=bool)[None] & same & (segment_ids != 0)[:, None]
  attentions, ffns = [], []
  x = params["embed"]["embedding"][ids] * config.embedding_multiplier
  for i in range(config.num_layers):
    p = params[f"layer_{i}"]
    slides = config.sliding_layers is None or i in config.sliding_layers
    window = config.sliding_window if slides else None
    h = norm(x, p["attention_norm"], 0.1)
    if config.attention == "moa":
      h, metrics, _ = MOA.clone(sliding_window=window).apply(
        {"params": p["attention"]}, h, positions=positions,
        segment_ids=segment_ids,
      )  # fmt: skip
      attentions.append(metrics)
    else:
      sees = causal & (distance < (window or np.inf))
      h = attention(config, p["attention"], h, positions, sees)
    x = x + config.residual_multiplier * h
    h = norm(x, p["ffn_norm"], 0.1)
    if i in config.dense_layers:
      h = mlp(config, p["ffn"], h)
    else:
      state = biases.get(f"layer_{i}", {}).get("ffn", {})
      h, metrics = BLOCKS[name].apply(
        {"params": p["ffn"], "router_state": state}, h, mask=segment_ids != 0
      )
      ffns.append(metrics)
    x = x + config.residual_multiplier * h
  x = norm(x, params["final_norm"], config.final_norm_eps or 0.1)
  if config.tie_embeddings:
    logits = x @ params["embed"]["embedding"].T
  else:
    logits = dense(x, params["lm_head"])
  return logits / config.logits_divisor, ffns, attentions


@pytest.mark.parametrize("name", CASES)
def test_a_model_equals_its_definition(name, x64):
  config = ModelConfig(**CASES[name], **DOUBLE)
  model = Transformer(config)
  variables, ids = random_variables(model), random_ids(B, L)
  positions, segment_ids, cache = jnp.asarray(POSITIONS), SEGMENTS, None
  distance = np.arange(L)[None, :, None] - np.arange(L)[None, None, :]
  if name == "norm-of-vectors":
    # In a cache a window is of positions, which its tokens may leave out.
    segment_ids, cache = np.ones_like(SEGMENTS), init_cache(config, B, L + 2)
    distance = POSITIONS[:, :, None] - POSITIONS[:, None, :]

  @jax.jit
  def both(variables):
    got = model.apply(
      variables, ids, positions=positions, cache=cache,
      segment_ids=None if cache else jnp.asarray(segment_ids),
    )  # fmt: skip
    with jax.numpy_rank_promotion("allow"):
      want = decoder(
        name, variables, ids, positions, jnp.asarray(segment_ids), distance
      )
    return got, want

  got, (logits, *metrics) = both(variables)
  real = segment_ids != 0
  assert_accurate(got.logits[real], logits[real], None)
  for stacked, layers in zip(got.metrics, metrics, strict=True):
    assert (stacked is None) == (not layers)
    for i, of_layer in enumerate(layers):
      for a, b in zip(stacked, of_layer, strict=True):
        assert a.shape == (len(layers), *b.shape)
        np.testing.assert_allclose(a[i], b, rtol=1e-6)


def dtypes_of(config):
  """Returns the dtype of what each module gives, by path, but for routers."""
  dtypes = {}

  def record(next_function, args, kwargs, context):
    output = next_function(*args, **kwargs)
    path = "/".join(context.module.path)
    if context.method_name == "__call__" and "router" not in path:
      dtypes[path] = jax.tree.leaves(output)[0].dtype
    return output

  run = lambda: Transformer(config).init(jax.random.key(0), random_ids(B, L))
  with nn.intercept_methods(record):
    variables = jax.eval_shape(run)
  return dtypes, {leaf.dtype for leaf in jax.tree.leaves(variables["params"])}


@pytest.mark.parametrize("name", CASES)
def test_every_part_computes_and_is_stored_in_its_dtype(name):
  config = ModelConfig(**CASES[name], dtype="bfloat16")
  dtypes, stored = dtypes_of(config)
  assert stored == {jnp.dtype("float32")}
  assert dtypes.pop("") == jnp.float32  # The logits.
  assert {"layer_0/attention", "layer_1/ffn", "final_norm"} <= dtypes.keys()
  assert set(dtypes.values()) == {jnp.dtype("bfloat16")}, dtypes
  wide = dataclasses.replace(config, dtype="float32", param_dtype="bfloat16")
  dtypes, stored = dtypes_of(wide)
  assert stored == {jnp.dtype("bfloat16")}
  assert set(dtypes.values()) == {jnp.dtype("float32")}, dtypes
  for layer in init_cache(config, B, L):
    assert layer.key.dtype == layer.value.dtype == jnp.bfloat16
    assert layer.key.shape == layer.value.shape == (B, L, 2, 6)


def test_a_norm_of_bfloat16_is_rounded_once():
  random = np.random.default_rng(0)
  x = jnp.asarray(random.normal(size=(3, 50)) + 2, jnp.bfloat16)
  scale = jnp.asarray(random.normal(size=50), jnp.float32)
  layer = RMSNorm(0.1, "bfloat16", "float32")
  got = layer.apply({"params": {"scale": scale}}, x)
  wide, of_norm = (np.asarray(a, np.float64) for a in (x, scale))
  want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * of_norm
  np.testing.assert_array_equal(got, jnp.asarray(want, jnp.bfloat16))


def test_remat_keeps_less_for_the_backward_pass():
  def kept(**fields):
    model = Transformer(ModelConfig(**CASES["norm-of-vectors"], **fields))
    ids = random_ids(B, L)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    pull_back = jax.eval_shape(
      lambda v: jax.vjp(lambda v: model.apply(v, ids).logits, v)[1], variables
    )
    return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

  assert kept(remat=True) < 0.5 * kept()


@pytest.mark.parametrize("routed", ["ffn", "attention"])
def test_a_mixture_is_of_the_backend_that_the_config_names(routed):
  fields = CASES["norm-of-vectors"]
  if routed == "attention":
    fields = CASES["mixture-of-attention"] | {"ffn": "dense"}
  with pytest.raises(NotImplementedError, match="mosaic"):
    dtypes_of(ModelConfig(**fields, implementation="mosaic"))
