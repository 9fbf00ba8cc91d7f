"""A decoder language model: attention and a mixture of experts, layer by layer.

input_ids -> embed -> [x += attention(norm(x)); x += ffn(norm(x))] * layers
          -> norm -> lm_head -> logits
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.nn import (
  DenseMLP,
  KVCache,
  MixtureOfAttention,
  SMoEBlock,
  SMoEMetrics,
  attend,
  consecutive_positions,
  rotary_embedding,
)
from scattermoe_jax.nn.checks import check_ids
from scattermoe_jax.sharding import MeshAxes


class ModelMetrics(NamedTuple):
  """What the routers of a model report.

  Attributes:
    ffn: of the feed-forward mixtures, stacked over their layers; None without.
    attention: of the mixtures of attention; None without.
  """

  ffn: SMoEMetrics | None
  attention: SMoEMetrics | None


class ModelOutput(NamedTuple):
  """What a model returns.

  Attributes:
    logits: of the next token, in float32.
    metrics: of the routers.
    cache: the keys and values, where a cache was given; else None.
  """

  logits: Float[Array, "B L V"]
  metrics: ModelMetrics
  cache: tuple[KVCache, ...] | None


class Transformer(nn.Module):
  """A decoder language model.

  Attributes:
    config: its sizes and switches.
    mesh_axes: which axes of a mesh split the experts, see
      `scattermoe_jax.sharding`; None for one device.

  Example:
    >>> model = Transformer(ModelConfig(num_layers=1))
    >>> input_ids = jnp.zeros((2, 16), jnp.int32)
    >>> variables = model.init(jax.random.key(0), input_ids)
    >>> model.apply(variables, input_ids).logits.shape
    (2, 16, 256)
  """

  config: ModelConfig
  mesh_axes: MeshAxes | None = None

  @nn.compact
  def __call__(
    self,
    input_ids: Int[Array, "B L"],
    *,
    positions: Int[Array, "B L"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    cache: tuple[KVCache, ...] | None = None,
    deterministic: bool = True,
  ) -> ModelOutput:
    """Returns the logits of each next token.

    Args:
      input_ids: tokens.
      positions: of the tokens in their text; None if they count on from 0, or
        from the end of the cache.
      segment_ids: the text a token belongs to: texts packed into one row do not
        see one another. 0 is padding, which no expert computes. None if each
        row is one text.
      cache: from `init_cache` or from the previous call; one per layer.
      deterministic: whether routers go without jitter.

    Raises:
      ValueError: if ids are not (B, L), or caches are not one per layer.
      TypeError: if ids are no array of integers.
    """
    config = self.config
    check_ids("Transformer", ("B", "L"), input_ids=input_ids)
    if cache is not None:
      kinds = [type(layer).__name__ for layer in cache]
      if kinds != ["KVCache"] * config.num_layers:
        raise ValueError(
          f"Transformer: cache must be a tuple of {config.num_layers} KVCache, "
          f"one per layer, got {kinds}; init_cache makes it."
        )
    embed = nn.Embed(
      config.vocab_size,
      config.d_model,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      name="embed",
    )
    x = embed(input_ids) * config.embedding_multiplier  # (B, L, d)

    layer_class = nn.remat(Layer) if config.remat else Layer
    layers = []
    for i in range(config.num_layers):
      layer = layer_class(
        config, i, deterministic, self.mesh_axes, name=f"layer_{i}"
      )
      x, *rest = layer(
        x, positions, segment_ids, None if cache is None else cache[i]
      )
      layers.append(rest)
    attention_metrics, ffn_metrics, new_cache = zip(*layers, strict=True)

    x = _norm(config, "final_norm", config.final_norm_eps or config.norm_eps)(x)
    if config.tie_embeddings:
      logits = embed.attend(x)
    else:
      logits = _dense(config, "lm_head", config.vocab_size, False)(x)
    return ModelOutput(
      logits.astype(jnp.float32) / config.logits_divisor,
      ModelMetrics(_stack(ffn_metrics), _stack(attention_metrics)),
      None if cache is None else new_cache,
    )


class Layer(nn.Module):
  """Attention, then a feed-forward, each on a normed copy of the stream."""

  config: ModelConfig
  index: int
  deterministic: bool = True
  mesh_axes: MeshAxes | None = None

  @nn.compact
  def __call__(self, x, positions, segment_ids, cache):
    """Returns (x, metrics of attention, metrics of the ffn, cache)."""
    config = self.config

    h = _norm(config, "attention_norm", config.norm_eps)(x)
    if config.attention == "moa":
      h, attention_metrics, cache = self._mixture_of_attention()(
        h,
        positions=positions,
        segment_ids=segment_ids,
        cache=cache,
        deterministic=self.deterministic,
      )
    else:
      attention = Attention(config, self.index, name="attention")
      h, cache = attention(h, positions, segment_ids, cache)
      attention_metrics = None
    x = x + h * config.residual_multiplier

    h = _norm(config, "ffn_norm", config.norm_eps)(x)
    if config.is_moe(self.index):
      mask = None if segment_ids is None else segment_ids != 0
      h, ffn_metrics = self._mixture_of_experts()(
        h, mask=mask, deterministic=self.deterministic
      )
    else:
      h, ffn_metrics = self._dense_mlp()(h), None
    x = x + h * config.residual_multiplier
    return x, attention_metrics, ffn_metrics, cache

  @nn.nowrap
  def _mixture_of_attention(self):
    config = self.config
    return MixtureOfAttention(
      num_experts=config.attention_experts,
      top_k=config.attention_top_k,
      num_heads=config.num_kv_heads,
      head_dim=config.head_dim,
      scoring=config.attention_scoring,
      jitter=config.router_jitter,
      rope_theta=config.rope_theta,
      rope_scaling=config.rope_scaling,
      sliding_window=config.window(self.index),
      scale=config.attention_scale,
      use_output_bias=config.block_bias,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      implementation=config.implementation,
      name="attention",
    )

  @nn.nowrap
  def _mixture_of_experts(self):
    config = self.config
    return SMoEBlock(
      num_experts=config.num_experts,
      top_k=config.top_k,
      d_expert=config.d_expert,
      activation=config.activation,
      gated=config.gated,
      use_bias=config.expert_bias,
      use_output_bias=config.block_bias,
      scoring=config.scoring,
      router_use_bias=config.router_bias,
      num_groups=config.num_groups,
      top_groups=config.top_groups,
      scale=config.routed_scale,
      jitter=config.router_jitter,
      use_selection_bias=config.selection_bias,
      d_shared=config.d_shared or None,
      shared_gate=config.shared_gate,
      mesh_axes=self.mesh_axes,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      implementation=config.implementation,
      name="ffn",
    )

  @nn.nowrap
  def _dense_mlp(self):
    config = self.config
    return DenseMLP(
      config.d_ff,
      activation=config.activation,
      gated=config.gated,
      dtype=config.dtype,
      param_dtype=config.param_dtype,
      name="ffn",
    )


class Attention(nn.Module):
  """Causal attention, h query heads sharing n heads of keys and values."""

  config: ModelConfig
  index: int

  @nn.compact
  def __call__(self, x, positions, segment_ids, cache):
    """Returns (y, cache)."""
    config = self.config
    batch, length, d_model = x.shape
    h, n, d_head = config.num_heads, config.num_kv_heads, config.head_dim
    bias = config.attention_bias
    query = _dense(config, "query", h * d_head, bias)(x)  # (B, L, h d_head)
    key = _dense(config, "key", n * d_head, bias)(x)  # (B, L, n d_head)
    value = _dense(config, "value", n * d_head, bias)(x)

    if config.qk_norm == "vector":
      query, key = self._norm_query_and_key(query, key)
    if config.clip_qkv is not None:
      limit = config.clip_qkv
      query, key, value = (
        jnp.clip(y, -limit, limit) for y in (query, key, value)
      )
    query = query.reshape(batch, length, h, d_head)
    key = key.reshape(batch, length, n, d_head)
    value = value.reshape(batch, length, n, d_head)
    if config.qk_norm == "head":
      query, key = self._norm_query_and_key(query, key)

    turns = positions
    if turns is None:
      turns = consecutive_positions(batch, length, cache)
    theta, scaling = config.rope_theta, config.rope_scaling
    query = rotary_embedding(query, turns, theta=theta, scaling=scaling)
    key = rotary_embedding(key, turns, theta=theta, scaling=scaling)
    y, cache = attend(
      query,
      key,
      value,
      positions=positions,
      segment_ids=segment_ids,
      cache=cache,
      sliding_window=config.window(self.index),
      sinks=self._sinks(),
      scale=config.attention_scale,
    )
    y = y.reshape(batch, length, h * d_head)
    return _dense(config, "output", d_model, bias)(y), cache

  def _norm_query_and_key(self, query, key):
    eps = self.config.norm_eps
    query = _norm(self.config, "query_norm", eps)(query)
    return query, _norm(self.config, "key_norm", eps)(key)

  def _sinks(self):
    config = self.config
    if not config.attention_sinks:
      return None
    zeros = nn.initializers.zeros_init()
    return self.param("sinks", zeros, (config.num_heads,), config.param_dtype)


class RMSNorm(nn.Module):
  """x over the root of its mean square, times a learned scale, in float32.

  Unlike `flax.linen.RMSNorm` it never mixes dtypes.
  """

  epsilon: float
  dtype: str
  param_dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Returns the normed x."""
    ones = nn.initializers.ones_init()
    scale = self.param("scale", ones, x.shape[-1:], self.param_dtype)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    y = x.astype(wide)
    y *= lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    scale = scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * scale).astype(self.dtype)


def init_cache(
  config: ModelConfig, batch_size: int, capacity: int
) -> tuple[KVCache, ...]:
  """Returns an empty cache of keys and values for `capacity` tokens a row."""
  return tuple(
    KVCache.empty(
      batch_size,
      capacity,
      config.num_kv_heads,
      config.head_dim,
      dtype=config.dtype,
    )
    for _ in range(config.num_layers)
  )


def _norm(config: ModelConfig, name: str, eps: float) -> RMSNorm:
  return RMSNorm(eps, config.dtype, config.param_dtype, name=name)


def _dense(
  config: ModelConfig, name: str, features: int, use_bias: bool
) -> nn.Dense:
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    name=name,
  )


def _stack(metrics: tuple[SMoEMetrics | None, ...]) -> SMoEMetrics | None:
  present = [m for m in metrics if m is not None]
  if not present:
    return None
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *present)
