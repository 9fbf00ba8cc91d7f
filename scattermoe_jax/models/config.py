"""The sizes and switches of a language model, as one plain value."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from scattermoe_jax.nn import ACTIVATIONS, RopeScaling
from scattermoe_jax.nn.checks import (
  check_ints,
  check_one_of,
  check_positive,
  check_window,
)
from scattermoe_jax.nn.router import Scoring


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What `Transformer` is built from; the defaults are a byte model.

  Every field is a number, a string or a tuple, so that a config is hashable and
  survives JSON. A field that only some families of models need names them.

  Raises:
    ValueError: if two fields contradict each other; the message names them.
    TypeError: if a size is no int, a switch no bool, or layers no tuple.
  """

  vocab_size: int = 256
  d_model: int = 128
  num_layers: int = 4

  # Attention: "mha" is dense, with fewer heads of keys and values than of
  # queries where num_kv_heads is below num_heads (all families but OLMoE).
  # "moa" is a Mixture of Attention (JetMoE): a token chooses attention_top_k
  # of attention_experts, each of num_kv_heads heads.
  attention: str = "mha"
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 32
  attention_experts: int = 12
  attention_top_k: int = 3
  attention_scoring: Scoring = "top_k_softmax"
  attention_bias: bool = False  # On all four projections: gpt-oss.
  attention_sinks: bool = False  # A learned logit that takes weight: gpt-oss.
  attention_scale: float | None = None  # None: head_dim**-0.5. Granite sets it.
  qk_norm: str | None = None  # "head": Qwen3. "vector", over all heads: OLMoE.
  clip_qkv: float | None = None  # OLMoE's first release.
  sliding_window: int | None = None  # Tokens seen, with oneself: gpt-oss.
  sliding_layers: tuple[int, ...] | None = (
    None  # None: all. gpt-oss: even ones.
  )

  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None  # YaRN: gpt-oss.

  # Feed-forward: "moe", or "dense" of width d_ff in every layer. Layers listed
  # in dense_layers are dense among MoE layers (Qwen3's mlp_only_layers,
  # DeepSeek's first layers).
  ffn: str = "moe"
  dense_layers: tuple[int, ...] = ()
  d_ff: int = 256
  num_experts: int = 16
  top_k: int = 2
  d_expert: int = 128
  activation: str = "silu"  # "clamped_swiglu": gpt-oss.
  gated: bool = True
  expert_bias: bool = False  # gpt-oss.
  d_shared: int = (
    0  # A dense MLP beside the experts: DeepSeek, GraniteMoeShared.
  )
  shared_gate: bool = False  # A sigmoid on its output: Qwen2.

  # Router: "top_k_softmax" (Granite, JetMoE, gpt-oss), "softmax_top_k" (OLMoE),
  # "softmax_top_k_renormalized" (Mixtral, Qwen3), "sigmoid" (DeepSeek-V3).
  scoring: Scoring = "top_k_softmax"
  router_bias: bool = False  # gpt-oss.
  router_jitter: float = 0.0  # Mixtral, in training.
  num_groups: int = 1  # DeepSeek-V3 chooses top_groups of num_groups first.
  top_groups: int = 1
  routed_scale: float = 1.0  # DeepSeek-V3.
  selection_bias: bool = False  # DeepSeek-V3.

  # One vector added to the sum of the experts of a block: JetMoE.
  block_bias: bool = False

  # Granite's multipliers, with attention_scale the fourth.
  embedding_multiplier: float = 1.0
  residual_multiplier: float = 1.0
  logits_divisor: float = 1.0

  tie_embeddings: bool = True
  norm_eps: float = 1e-5
  final_norm_eps: float | None = None  # None: norm_eps. JetMoE's differ.

  # Dtype of the arithmetic and of the weights. Router and logits are float32.
  dtype: str = "float32"
  param_dtype: str = "float32"
  remat: bool = False  # Recompute each layer in the backward pass.
  implementation: str | None = None  # The backend; None for the first that can.

  def __post_init__(self):
    for name in ("dtype", "param_dtype"):
      object.__setattr__(self, name, _dtype_name(name, getattr(self, name)))
    _check(self)

  def is_moe(self, layer: int) -> bool:
    """Returns whether the feed-forward of that layer is a mixture."""
    return self.ffn == "moe" and layer not in self.dense_layers

  def window(self, layer: int) -> int | None:
    """Returns the sliding window of that layer, or None."""
    if self.sliding_layers is None or layer in self.sliding_layers:
      return self.sliding_window
    return None

  def dense_twin(self) -> "ModelConfig":
    """Returns a model with as many active parameters and no routing.

    Its feed-forward is as wide as the k experts of a token and the shared
    expert together; its attention has the heads that a token of a Mixture of
    Attention has. Only the routers are missing.
    """
    width = self.top_k * self.d_expert + self.d_shared
    return dataclasses.replace(
      self, ffn="dense", d_ff=width, attention="mha", block_bias=False
    )

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields as JSON can say them."""
    fields = dataclasses.asdict(self)
    if self.rope_scaling is not None:
      fields["rope_scaling"] = self.rope_scaling._asdict()
    return fields

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
    """Returns the config that `to_dict` or its JSON came from.

    Raises:
      ValueError: if a field is unknown, or a value does not fit.
      TypeError: if a size is no int, a switch no bool, or layers no list.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - known):
      raise ValueError(
        f"ModelConfig: unknown fields {unknown}; known are {sorted(known)}."
      )
    fields = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in fields.items()
    }
    if isinstance(fields.get("rope_scaling"), dict):
      fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return cls(**fields)


def _dtype_name(field: str, dtype: Any) -> str:
  """Returns the name of a dtype, however it is said."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found is None or not jnp.issubdtype(found, jnp.floating):
    raise ValueError(
      f"ModelConfig: {field} = {dtype!r} is no floating-point dtype; such are "
      "'float32' and 'bfloat16'."
    )
  return found.name


def _check(config: ModelConfig) -> None:
  for name, known in (
    ("attention", ("mha", "moa")),
    ("ffn", ("moe", "dense")),
    ("qk_norm", (None, "head", "vector")),
    ("activation", ACTIVATIONS),
  ):
    check_one_of("ModelConfig", name, getattr(config, name), known)
  _check_kinds(config)
  _check_sizes(config)
  for name in ("dense_layers", "sliding_layers"):
    layers = getattr(config, name) or ()
    if any(not 0 <= layer < config.num_layers for layer in layers):
      raise ValueError(
        f"ModelConfig: {name} = {layers} names a layer that is not there; "
        f"there are {config.num_layers} layers."
      )
  if config.num_heads % config.num_kv_heads:
    raise ValueError(
      f"ModelConfig: num_heads = {config.num_heads} is not a multiple of "
      f"num_kv_heads = {config.num_kv_heads}."
    )
  check_window("ModelConfig", config.sliding_window)
  check_positive(
    "ModelConfig", rope_theta=config.rope_theta, norm_eps=config.norm_eps
  )
  if config.final_norm_eps is not None:
    check_positive("ModelConfig", final_norm_eps=config.final_norm_eps)
  if config.head_dim % 2:
    raise ValueError(
      f"ModelConfig: head_dim = {config.head_dim} must be even; rotary "
      "embeddings turn pairs."
    )
  if config.attention == "moa":
    heads = config.attention_top_k * config.num_kv_heads
    if config.num_heads != heads:
      raise ValueError(
        f'ModelConfig: attention="moa" has attention_top_k * num_kv_heads = '
        f"{heads} query heads, got num_heads = {config.num_heads}."
      )
    for name in ("qk_norm", "clip_qkv", "attention_bias", "attention_sinks"):
      if getattr(config, name):
        raise ValueError(
          f'ModelConfig: {name} needs attention="mha"; '
          "MixtureOfAttention has none."
        )
  if config.ffn == "moe" and config.top_k > config.num_experts:
    raise ValueError(
      f"ModelConfig: top_k = {config.top_k} is above num_experts = "
      f"{config.num_experts}."
    )


def _check_kinds(config: ModelConfig) -> None:
  """Raises unless switches are bools and layers are listed in tuples.

  Any word is true, "false" as well.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.type is bool and not isinstance(value, bool):
      raise TypeError(
        f"ModelConfig: {field.name} must be True or False, got {value!r}."
      )
  for name, kind in (
    ("dense_layers", tuple),
    ("sliding_layers", tuple | None),
  ):
    layers = getattr(config, name)
    if not isinstance(layers, kind):
      raise TypeError(
        f"ModelConfig: {name} must be a tuple of layers, got {layers!r}."
      )


def _check_sizes(config: ModelConfig) -> None:
  """Raises unless sizes are ints, and above 0 where the model has such parts.

  Of parts that it has not, 0 is a size as well.
  """

  def check(*names: str, least: int):
    sizes = {name: getattr(config, name) for name in names}
    check_ints("ModelConfig", least=least, **sizes)

  check("vocab_size", "d_model", "num_layers", least=1)
  check("num_heads", "num_kv_heads", "head_dim", least=1)
  is_moe = [config.is_moe(layer) for layer in range(config.num_layers)]
  check("num_experts", "top_k", "d_expert", least=int(any(is_moe)))
  check("num_groups", "top_groups", least=int(any(is_moe)))
  check("d_ff", least=int(not all(is_moe)))
  check("d_shared", least=0)
  is_mixture = config.attention == "moa"
  check("attention_experts", "attention_top_k", least=int(is_mixture))
