"""Which experts a token takes, and with which gates.

Every rule maps logits z (T, E) to gates (T, k), expert_ids (T, k) and probs
(T, E), the distribution that the load-balancing loss sees:

  softmax_then_top_k   P = softmax(z); the k largest P, renormalised or not
                       (Mixtral, Qwen3-MoE; OLMoE, Qwen2-MoE without)
  top_k_then_softmax   softmax over the k largest z
                       (Granite, JetMoE, gpt-oss)
  sigmoid_top_k        s = sigmoid(z), chosen by s + bias within the best groups
                       (DeepSeek-V3, Kimi-K2, GLM-4.5)

The first, renormalised, equals the second but for rounding.
"""

import warnings
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float, Int, Real

from scattermoe_jax._compat import current_device, split_axes
from scattermoe_jax.nn import checks
from scattermoe_jax.ops.split_dot import multiplies_bfloat16, split_dot
from scattermoe_jax.routing import is_static_int

Scoring = Literal[
  "softmax_top_k", "softmax_top_k_renormalized", "top_k_softmax", "sigmoid"
]

# Fewer are over before a kernel is taken apart.
_MANY_TOKENS = 256

# The sum of sigmoids can underflow; a softmax's cannot. The derivative of a
# quotient divides by the square, and that of DeepSeek's 1e-20 is zero.
_LEAST_SUM = 1e-18


class RouterOutput(NamedTuple):
  """What a router decided, in float32 (float64 for float64 tokens).

  Attributes:
    gates: the weight of each choice.
    expert_ids: the experts of each token, in [0, E).
    logits: for the z-loss.
    probs: for the load-balancing loss; each row sums to 1.
  """

  gates: Float[Array, "T k"]
  expert_ids: Int[Array, "T k"]
  logits: Float[Array, "T E"]
  probs: Float[Array, "T E"]


class Router(nn.Module):
  """Chooses k of E experts for each token, by a linear layer and a rule.

  The logits are computed and kept in float32 whatever the dtype of the tokens:
  rounding them in bfloat16, or multiplying them in TF32, changes who is chosen.
  On a GPU, many bfloat16 tokens meet a float32 kernel by `split_dot`, which
  rounds neither and does not take the slow float32 cores; but not with jitter,
  another `dtype` or `precision`, or where explicit mesh axes split either.

  Attributes:
    num_experts: E.
    top_k: k.
    scoring: the rule. "softmax_top_k" and "softmax_top_k_renormalized" are
      `softmax_then_top_k`, "top_k_softmax" is `top_k_then_softmax`, "sigmoid"
      is `sigmoid_top_k`. A single gate (k = 1) that is divided by the sum of
      all k is 1 and has no gradient: for that "softmax_top_k", as Switch has
      it, or "sigmoid" without `renormalize`.
    use_bias: whether the linear layer has a bias (gpt-oss).
    num_groups: groups of experts, of which only the best `top_groups` are open;
      "sigmoid" only.
    top_groups: see `num_groups`.
    renormalize: whether "sigmoid" divides the gates by their sum.
    scale: multiplies the gates (DeepSeek's routed_scaling_factor).
    jitter: the tokens, as the router sees them, are multiplied by uniform noise
      of [1 - jitter, 1 + jitter] unless `deterministic`; needs the random
      stream "router".
    use_selection_bias: whether a bias (E,), the variable "selection_bias" of
      the collection "router_state", is added for the choice but not for the
      gates; "sigmoid" only. No gradient: see `update_selection_bias`.
    dtype: of the linear layer's operands; None for float32. The sums and the
      logits are float32 regardless.
    param_dtype: of the parameters.
    precision: of the linear layer.
    kernel_init: of the kernel (d, E).
    bias_init: of the bias (E,).
  """

  num_experts: int
  top_k: int
  scoring: Scoring = "softmax_top_k_renormalized"
  use_bias: bool = False
  num_groups: int = 1
  top_groups: int = 1
  renormalize: bool = True
  scale: float = 1.0
  jitter: float = 0.0
  use_selection_bias: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: lax.PrecisionLike = lax.Precision.HIGHEST
  kernel_init: Initializer = nn.initializers.lecun_normal()
  bias_init: Initializer = nn.initializers.zeros_init()

  @nn.compact
  def __call__(
    self, x: Float[Array, "T d"], *, deterministic: bool = True
  ) -> RouterOutput:
    """Returns the gates, the experts, the logits and the probabilities of x."""
    self._check_fields()
    checks.check_tokens(
      "Router", x, ("T", "d"), "flatten batch and sequence: x.reshape(-1, d)"
    )
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    if self.jitter:
      checks.check_static("Router", "deterministic", deterministic)
    if self.jitter and not deterministic:
      x = x.astype(wide) * jax.random.uniform(
        self.make_rng("router"),
        x.shape,
        wide,
        minval=1 - self.jitter,
        maxval=1 + self.jitter,
      )
    kernel = self.param(
      "kernel",
      self.kernel_init,
      (x.shape[1], self.num_experts),
      self.param_dtype,
    )
    logits = self._linear(x, kernel, wide)
    if self.use_bias:
      bias = self.param(
        "bias", self.bias_init, (self.num_experts,), self.param_dtype
      )
      logits += bias.astype(wide)[None, :]
    gates, expert_ids, probs = self._choose(logits)
    return RouterOutput(gates * self.scale, expert_ids, logits, probs)

  def _linear(self, x, kernel, wide):
    if self._splits(x, kernel):
      return split_dot(x, kernel)
    dtype = self.dtype or wide
    return lax.dot_general(
      x.astype(dtype),
      kernel.astype(dtype),
      (((1,), (0,)), ((), ())),
      precision=self.precision,
      preferred_element_type=wide,
    )

  @nn.nowrap
  def _splits(self, x, kernel) -> bool:
    is_exact = self.precision in (lax.Precision.HIGHEST, "highest", "float32")
    is_wide = self.dtype is None or jnp.dtype(self.dtype) == jnp.float32
    return (
      is_exact
      and is_wide
      and (x.dtype, kernel.dtype) == (jnp.bfloat16, jnp.float32)
      and is_static_int(x.shape[0])
      and x.shape[0] >= _MANY_TOKENS
      and not (split_axes(x) or split_axes(kernel))
      and multiplies_bfloat16(current_device())
    )

  def _choose(self, logits):
    if self.scoring == "top_k_softmax":
      return top_k_then_softmax(logits, self.top_k)
    if self.scoring != "sigmoid":
      renormalize = self.scoring == "softmax_top_k_renormalized"
      return softmax_then_top_k(logits, self.top_k, renormalize=renormalize)
    selection_bias = None
    if self.use_selection_bias:
      selection_bias = self.variable(
        "router_state",
        "selection_bias",
        jnp.zeros,
        (self.num_experts,),
        logits.dtype,
      ).value
    return sigmoid_top_k(
      logits,
      self.top_k,
      selection_bias=selection_bias,
      num_groups=self.num_groups,
      top_groups=self.top_groups,
      renormalize=self.renormalize,
    )

  @property
  def _sums_to_one(self) -> bool:
    """Whether the k gates of a token do, before `scale`."""
    if self.scoring == "sigmoid":
      return self.renormalize
    return self.scoring != "softmax_top_k"

  @nn.nowrap
  def _check_fields(self):
    for name, among in (("top_k", "num_experts"), ("top_groups", "num_groups")):
      value, most = getattr(self, name), getattr(self, among)
      checks.check_ints("Router", **{name: value, among: most})
      checks.check_at_most("Router", name, value, among, most)
    checks.check_one_of("Router", "scoring", self.scoring, get_args(Scoring))
    checks.check_dtype_fields(
      "Router", dtype=self.dtype, param_dtype=self.param_dtype
    )
    if not 0 <= self.jitter < 1:
      raise ValueError(f"Router: jitter must lie in [0, 1), got {self.jitter}.")
    if self.top_k == 1 < self.num_experts and self._sums_to_one:
      warnings.warn(
        f"Router: top_k=1 with scoring={self.scoring!r} makes every gate 1, so "
        "that no loss of the output has a gradient for the router; use "
        "scoring='softmax_top_k', or 'sigmoid' with renormalize=False.",
        stacklevel=3,
      )
    if self.scoring == "sigmoid":
      return
    if not self.renormalize:
      raise ValueError(
        "Router: renormalize=False needs scoring='sigmoid', got "
        f"{self.scoring!r}; scoring='softmax_top_k' is the softmax that is not "
        "renormalized."
      )
    if self.use_selection_bias or self.num_groups != 1:
      raise ValueError(
        "Router: use_selection_bias and num_groups need scoring='sigmoid', got "
        f"{self.scoring!r}."
      )


def softmax_then_top_k(
  logits: Float[Array, "T E"], k: int, *, renormalize: bool
) -> tuple[Float[Array, "T k"], Int[Array, "T k"], Float[Array, "T E"]]:
  """Returns (gates, expert_ids, probs): the k largest of P = softmax(z).

  Args:
    logits: z.
    k: experts per token.
    renormalize: whether the gates are divided by their sum.

  Source: transformers, MixtralTopKRouter (renormalised) and OlmoeTopKRouter.
  """
  checks.check_top_k("softmax_then_top_k", logits, k)
  probs = jax.nn.softmax(logits, axis=-1)
  gates, expert_ids = _top_k(probs, k)
  if renormalize:
    gates /= gates.sum(axis=-1, keepdims=True)
  return gates, expert_ids, probs


def top_k_then_softmax(
  logits: Float[Array, "T E"], k: int
) -> tuple[Float[Array, "T k"], Int[Array, "T k"], Float[Array, "T E"]]:
  """Returns (gates, expert_ids, probs): gates = softmax(the k largest z).

  The probs are softmax(z) over all experts.
  Source: transformers, GraniteMoeTopKGating and GptOssTopKRouter.
  """
  checks.check_top_k("top_k_then_softmax", logits, k)
  top_logits, expert_ids = _top_k(logits, k)
  gates = jax.nn.softmax(top_logits, axis=-1)
  return gates, expert_ids, jax.nn.softmax(logits, axis=-1)


def sigmoid_top_k(
  logits: Float[Array, "T E"],
  k: int,
  *,
  selection_bias: Float[Array, " E"] | None = None,
  num_groups: int = 1,
  top_groups: int = 1,
  renormalize: bool = True,
  scale: float = 1.0,
) -> tuple[Float[Array, "T k"], Int[Array, "T k"], Float[Array, "T E"]]:
  """Returns (gates, expert_ids, probs) of s = sigmoid(z), chosen by s + bias.

  The experts lie in `num_groups` groups of equal size. A group's score is the
  sum of its two largest s + bias; only experts of the `top_groups` best groups
  are open. The gates are s itself, without the bias. The probs are s / sum(s).

  Args:
    logits: z.
    k: experts per token.
    selection_bias: added to s for the choice alone.
    num_groups: groups of experts.
    top_groups: groups that stay open.
    renormalize: whether the gates are divided by their sum.
    scale: multiplies the gates, after that.

  Raises:
    ValueError: if shapes disagree, the groups are uneven, or fewer than k
      experts stay open.

  Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; closed groups are
  masked with -inf, as transformers 5 does (version 4 masked with 0, which a
  negative s + bias loses against).
  """
  checks.check_top_k("sigmoid_top_k", logits, k)
  scores = jax.nn.sigmoid(logits)
  ranking = scores
  if selection_bias is not None:
    shape = logits.shape[1:]
    checks.check_shape("sigmoid_top_k", "selection_bias", selection_bias, shape)
    ranking = scores + selection_bias.astype(scores.dtype)[None, :]
  ranking = lax.stop_gradient(ranking)
  checks.check_ints(
    "sigmoid_top_k", num_groups=num_groups, top_groups=top_groups
  )
  if num_groups > 1:
    ranking = _close_groups(ranking, k, num_groups, top_groups)
  _, expert_ids = lax.top_k(ranking, k)
  gates = jnp.take_along_axis(scores, expert_ids, axis=-1)
  if renormalize:
    gates /= gates.sum(axis=-1, keepdims=True) + _LEAST_SUM
  probs = scores / (scores.sum(axis=-1, keepdims=True) + _LEAST_SUM)
  return gates * scale, expert_ids, probs


def _top_k(values, k: int):
  """Returns `lax.top_k`, whose derivative JAX 0.7 lacks for no rows."""
  return lax.top_k(values if values.size else lax.stop_gradient(values), k)


def _close_groups(ranking, k: int, num_groups: int, top_groups: int):
  num_tokens, num_experts = ranking.shape
  group_size, remainder = divmod(num_experts, num_groups)
  if remainder or top_groups > num_groups:
    raise ValueError(
      f"sigmoid_top_k: num_groups = {num_groups} must divide E = {num_experts} "
      f"and top_groups lie in [1, num_groups], got {top_groups}."
    )
  if k > top_groups * group_size:
    raise ValueError(
      f"sigmoid_top_k: k = {k} experts per token, but top_groups = "
      f"{top_groups} groups of {group_size} leave only "
      f"{top_groups * group_size} open."
    )
  grouped = ranking.reshape(num_tokens, num_groups, group_size)
  group_scores = lax.top_k(grouped, min(2, group_size))[0].sum(axis=-1)
  _, open_ids = lax.top_k(group_scores, top_groups)
  is_open = jax.nn.one_hot(open_ids, num_groups, dtype=jnp.bool_).any(axis=1)
  closed = jnp.full_like(grouped, -jnp.inf)
  return jnp.where(is_open[:, :, None], grouped, closed).reshape(ranking.shape)


def update_selection_bias(
  selection_bias: Float[Array, "*layers E"],
  tokens_per_expert: Real[Array, "*layers E"],
  *,
  rate: float = 1e-3,
) -> Float[Array, "*layers E"]:
  """Returns the bias after a step: up by `rate` for idle experts, else down.

    bias[e] += rate * sign(mean load - load[e])

  Args:
    selection_bias: of one layer, or stacked over layers.
    tokens_per_expert: of the whole batch, `SMoEMetrics.tokens_per_expert`.
    rate: of the change.

  To be called in the train step, outside the gradient, and written back to the
  collection "router_state".
  Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; rate 1e-3 there.
  """
  name = "update_selection_bias"
  checks.check_array(name, "selection_bias", selection_bias)
  shape = selection_bias.shape
  checks.check_shape(name, "tokens_per_expert", tokens_per_expert, shape)
  load = tokens_per_expert.astype(selection_bias.dtype)
  error = load.mean(axis=-1, keepdims=True) - load
  return selection_bias + rate * jnp.sign(error)
