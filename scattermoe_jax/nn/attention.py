"""Mixture of attention (MoMHA): an expert is a query and an output projection.

  token t takes experts e_1 .. e_k with gates g_1 .. g_k, and for each j:

    q_tj = x_t W_Q[e_j]               h_expert heads
    o_tj = attention of q_tj over the K, V of all tokens    (shared, dense)
    y_t  = sum_j g_j o_tj W_O[e_j]

Attention needs the order of the tokens: both projections take and give rows in
scattered order, and one routing serves both. Nothing as wide as the model is
copied for it: the products gather x and dy themselves. The narrow rows of heads
are written once more in any case, to turn them and to put those of one K, V
side by side; their order changes in the same pass.
"""

import functools
from typing import Any, cast

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scattermoe_jax.nn import checks
from scattermoe_jax.nn.attention_core import (
  IMPLEMENTATIONS,
  KVCache,
  attend,
  check_cache,
  consecutive_positions,
)
from scattermoe_jax.nn.lora import adapted_linear_combine
from scattermoe_jax.nn.metrics import SMoEMetrics, route_with_metrics
from scattermoe_jax.nn.parallel_linear import (
  ParallelLinear,
  default_kernel_init,
)
from scattermoe_jax.nn.rotary import RopeScaling, rotary_embedding
from scattermoe_jax.nn.router import Router, Scoring
from scattermoe_jax.nn.smoe import zero_padding
from scattermoe_jax.ops import linear_combine
from scattermoe_jax.ops.rows import group_rows, ungroup_rows
from scattermoe_jax.routing import Routing


class MixtureOfAttention(nn.Module):
  """Attention whose heads each token picks: k experts of `num_heads` heads.

  k * num_heads query heads are active; keys and values have `num_heads` heads,
  which all experts share. Causal, with rotary positions. On several devices,
  call it inside `jax.shard_map`, sequences split: it has no `mesh_axes`. The
  metrics are then of a device's own tokens: average or sum them there.

  Submodules: `router` (`Router`), `query` (kernel (E, d, n d_head)),
  `key_value` (kernel (d, 2 n d_head), keys first) and `output` (kernel
  (E, n d_head, d)), for n = num_heads.

  Attributes:
    num_experts: E.
    top_k: k.
    num_heads: h_expert, the heads of one expert, and of keys and values.
    head_dim: d_head.
    scoring: the router's rule, see `Router`; as are the next seven.
    router_use_bias: whether the router's logits have a bias.
    num_groups: groups of experts of scoring "sigmoid".
    top_groups: those of them that stay open to a token.
    renormalize: whether "sigmoid" divides the gates by their sum.
    router_scale: multiplies the gates.
    jitter: noise on the router's input; training only.
    use_selection_bias: whether the choice has a bias of its own.
    rope_theta: base of the rotary frequencies; None for no rotary positions.
    rope_scaling: for contexts beyond pre-training's.
    sliding_window: how many tokens a token sees; None for all before it.
    scale: of the attention logits; None for d_head^-0.5.
    use_output_bias: whether one vector, the parameter `output_bias` (d,), is
      added to the weighted sum (JetMoE).
    dtype: of the computation, except the router's; None for what x and the
      parameters promote to.
    param_dtype: of the parameters.
    precision: of the projections, as `jax.lax.dot_general` takes it.
    kernel_init: of the query projections; scaled by the fan-in of one expert.
    out_kernel_init: of the output projections; None for k / fan-in as variance,
      as the average of k experts has a k-th of the variance of one.
    key_value_kernel_init: of the shared projection.
    router_kernel_init: of the router's kernel (d, E).
    bias_init: of all biases.
    attention_implementation: of the attention itself, see `attend`.
    implementation: of the expert projections: "mosaic", "triton" or "xla";
      None for the first that can.

  Source: ScatterMoE (Tan et al., 2024, arXiv 2403.08245), section 3.3; JetMoE
  (Shen et al., 2024, arXiv 2404.07413).
  """

  num_experts: int
  top_k: int
  num_heads: int
  head_dim: int
  scoring: Scoring = "top_k_softmax"
  router_use_bias: bool = False
  num_groups: int = 1
  top_groups: int = 1
  renormalize: bool = True
  router_scale: float = 1.0
  jitter: float = 0.0
  use_selection_bias: bool = False
  rope_theta: float | None = 10000.0
  rope_scaling: RopeScaling | None = None
  sliding_window: int | None = None
  scale: float | None = None
  use_output_bias: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: lax.PrecisionLike = None
  kernel_init: Initializer = default_kernel_init
  out_kernel_init: Initializer | None = None
  key_value_kernel_init: Initializer = nn.initializers.lecun_normal()
  router_kernel_init: Initializer = nn.initializers.lecun_normal()
  bias_init: Initializer = nn.initializers.zeros_init()
  attention_implementation: str | None = None
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L d"],
    *,
    positions: Int[Array, "B L"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    mask: Bool[Array, "B L"] | None = None,
    cache: KVCache | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "B L d"], SMoEMetrics, KVCache | None]:
    """Returns y, the metrics of the routing, and the cache with these tokens.

    Args:
      x: tokens.
      positions: of the tokens in their sequences; None for consecutive ones,
        which go on from the cache's length. That counts padding too: after
        prompts of unequal length, padded on the right, give them.
      segment_ids: tokens of different ids don't see each other; 0 is padding.
      mask: True where the token is real; the rest is padding. A padding token
        goes to no expert and gets zero, whatever it holds.
      cache: of the tokens before these.
      deterministic: whether to leave out the router's jitter, see `SMoEBlock`.
    """
    self._check_fields()
    checks.check_tokens(
      "MixtureOfAttention", x, ("B", "L", "d"), "one sequence is x[None]"
    )
    batch, length, d = x.shape
    checks.check_mask("MixtureOfAttention", mask, (batch, length))
    checks.check_ids(
      "MixtureOfAttention",
      (batch, length),
      positions=positions,
      segment_ids=segment_ids,
    )
    heads_shape = (batch, length, self.num_heads, self.head_dim)
    check_cache("MixtureOfAttention", cache, heads_shape)
    if mask is not None:
      real = mask.astype(jnp.int32)
      segment_ids = real if segment_ids is None else segment_ids * real
    row_mask = None if segment_ids is None else (segment_ids != 0).reshape(-1)
    # Attention weighs the values of padding by zero, but weighs them.
    rows = zero_padding(x.reshape(-1, d), row_mask)
    routed = self._router()(rows, deterministic=deterministic)
    routing, metrics = route_with_metrics(routed, row_mask)
    query = self._query()(rows, routing, grouped_out=True)
    key, value = self._key_value(rows.reshape(x.shape))
    query = ungroup_rows(query, routing)
    query = _to_head_order(
      query.reshape(batch, length, self.top_k, self.num_heads, self.head_dim)
    )
    if self.rope_theta is not None:
      if positions is None:
        positions = consecutive_positions(batch, length, cache)
      query, key = (
        rotary_embedding(
          a, positions, theta=self.rope_theta, scaling=self.rope_scaling
        )
        for a in (query, key)
      )
    heads, cache = attend(
      query,
      key,
      value,
      positions=positions,
      segment_ids=segment_ids,
      cache=cache,
      sliding_window=self.sliding_window,
      scale=self.scale,
      implementation=self.attention_implementation,
    )
    y = self._output(d)(heads, routed.gates, routing)
    if self.use_output_bias:
      bias = self.param("output_bias", self.bias_init, (d,), self.param_dtype)
      y = zero_padding(y + bias.astype(y.dtype)[None, :], row_mask)
    return y.reshape(x.shape), metrics, cache

  @nn.nowrap
  def _check_fields(self):
    checks.check_ints(
      "MixtureOfAttention",
      num_experts=self.num_experts,
      top_k=self.top_k,
      num_heads=self.num_heads,
      head_dim=self.head_dim,
    )
    checks.check_one_of(
      "MixtureOfAttention",
      "attention_implementation",
      self.attention_implementation,
      IMPLEMENTATIONS,
    )
    checks.check_window("MixtureOfAttention", self.sliding_window)
    if self.rope_theta is not None:
      checks.check_positive("MixtureOfAttention", rope_theta=self.rope_theta)

  @nn.nowrap
  def _router(self):
    return Router(
      num_experts=self.num_experts,
      top_k=self.top_k,
      scoring=self.scoring,
      use_bias=self.router_use_bias,
      num_groups=self.num_groups,
      top_groups=self.top_groups,
      renormalize=self.renormalize,
      scale=self.router_scale,
      jitter=self.jitter,
      use_selection_bias=self.use_selection_bias,
      param_dtype=self.param_dtype,
      kernel_init=self.router_kernel_init,
      bias_init=self.bias_init,
      name="router",
    )

  @nn.nowrap
  def _query(self):
    return ParallelLinear(
      features=self.num_heads * self.head_dim,
      num_experts=self.num_experts,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
      kernel_init=self.kernel_init,
      implementation=self.implementation,
      name="query",
    )

  @nn.nowrap
  def _key_value(self, x):
    key_value = nn.Dense(
      2 * self.num_heads * self.head_dim,
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=cast(Any, self.precision),
      kernel_init=self.key_value_kernel_init,
      name="key_value",
    )(x)
    heads = (*x.shape[:-1], self.num_heads, self.head_dim)
    return (a.reshape(heads) for a in jnp.split(key_value, 2, axis=-1))

  @nn.nowrap
  def _output(self, d):
    # A flash kernel keeps its output for its own backward, in head order. Under
    # remat the grouped rows are made from it again, and are not kept as well;
    # nothing else runs twice, since the product's result is not a residual.
    return nn.remat(_OutputProjection)(
      features=d,
      num_experts=self.num_experts,
      top_k=self.top_k,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
      kernel_init=self.out_kernel_init
      or nn.initializers.variance_scaling(
        self.top_k, "fan_in", "truncated_normal", batch_axis=0
      ),
      implementation=self.implementation,
      name="output",
    )


class _OutputProjection(nn.Module):
  features: int
  num_experts: int
  top_k: int
  dtype: Dtype | None
  param_dtype: Dtype
  precision: lax.PrecisionLike
  kernel_init: Initializer
  implementation: str | None

  @nn.compact
  def __call__(
    self,
    heads: Float[Array, "B L N d_head"],
    gates: Float[Array, "T k"],
    routing: Routing,
  ) -> Float[Array, "T d"]:
    # No -1 in a shape: an empty batch has any width.
    width = heads.shape[2] // self.top_k * heads.shape[3]
    rows = _to_token_order(heads, self.top_k).reshape(routing.num_rows, width)
    rows = group_rows(rows, routing)
    kernel = self.param(
      "kernel",
      self.kernel_init,
      (self.num_experts, rows.shape[1], self.features),
      self.param_dtype,
    )
    rows, kernel = promote_dtype(rows, kernel, dtype=self.dtype)
    combine = linear_combine
    if self.has_variable("params", "lora"):
      adapters: dict[str, Any] = self.get_variable("params", "lora")
      combine = functools.partial(
        adapted_linear_combine, adapter=adapters.get("kernel")
      )
    return combine(
      rows,
      gates,
      routing,
      kernel,
      grouped_in=True,
      precision=self.precision,
      implementation=self.implementation,
    )


def _to_head_order(
  rows: Float[Array, "B L k n d_head"],
) -> Float[Array, "B L N d_head"]:
  """Returns heads i k + j for head i of choice j: those of one K, V adjoin."""
  batch, length, top_k, num_heads, head_dim = rows.shape
  heads = jnp.swapaxes(rows, 2, 3)
  return heads.reshape(batch, length, num_heads * top_k, head_dim)


def _to_token_order(
  heads: Float[Array, "B L N d_head"], top_k: int
) -> Float[Array, "B L k n d_head"]:
  """Undoes `_to_head_order`."""
  batch, length, width, head_dim = heads.shape
  heads = heads.reshape(batch, length, width // top_k, top_k, head_dim)
  return jnp.swapaxes(heads, 2, 3)
