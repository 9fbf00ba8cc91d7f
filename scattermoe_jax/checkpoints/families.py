"""What each family's config.json says, as tables of fields, and what it fixes.

The tables are read in both directions, from config.json to `ModelConfig` and
back; see `config_json`.
Source: the configuration classes of transformers 4.57 and 5.23.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from scattermoe_jax.models.config import ModelConfig

Entries = Mapping[str, Any]
REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Field:
  """An entry of config.json and the field of ours that says the same.

  Attributes:
    theirs: the key.
    ours: the field of `ModelConfig`.
    default: what an absent or null entry means: a value, or a function of all
      entries.
    read: (value, all entries) -> our value; None where they are the same.
    write: (our value, our config) -> entries; None for the value under its key.
    alias: another key for the same, of another version.
  """

  theirs: str
  ours: str
  default: Any | Callable[[Entries], Any] = REQUIRED
  read: Callable[[Any, Entries], Any] | None = None
  write: Callable[[Any, ModelConfig], dict[str, Any]] | None = None
  alias: str | None = None


@dataclasses.dataclass(frozen=True)
class Family:
  """How one family describes a model.

  Attributes:
    architecture: its class in transformers.
    fields: entries that are ours under another name.
    fixed: fields of ours that are equal in every model of the family.
    rope: the rotary embedding where the file does not say.
    entries: what the file says that we support one value of only.
    derive: fields of ours that follow from others.
  """

  architecture: str
  fields: tuple[Field, ...]
  fixed: Entries = dataclasses.field(default_factory=dict)
  rope: Entries = dataclasses.field(default_factory=dict)
  entries: Entries = dataclasses.field(default_factory=dict)
  derive: Callable[[Entries], dict[str, Any]] = lambda ours: {}


def _read_activation(value: str, entries: Entries) -> str:
  # An unknown name goes on, for ModelConfig or its modules to refuse.
  return {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}.get(value, value)


def _write_activation(key: str):
  names = {"gelu_tanh": "gelu_pytorch_tanh"}
  return lambda value, config: {key: names.get(value, value)}


def _activation(key: str) -> Field:
  return Field(
    key, "activation", "silu", _read_activation, _write_activation(key)
  )


_SIZES = (
  Field("vocab_size", "vocab_size"),
  Field("hidden_size", "d_model"),
  Field("num_hidden_layers", "num_layers"),
)
_HEADS = (
  Field("num_attention_heads", "num_heads"),
  Field(
    "num_key_value_heads",
    "num_kv_heads",
    lambda entries: entries["num_attention_heads"],
  ),
  Field(
    "head_dim",
    "head_dim",
    # Of 0 heads, ModelConfig complains.
    lambda entries: (
      entries["hidden_size"] // max(entries["num_attention_heads"], 1)
    ),
  ),
)
_SLIDING_WINDOW = Field("sliding_window", "sliding_window", None)


def _tied(default: bool) -> Field:
  return Field("tie_word_embeddings", "tie_embeddings", default)


def _norm_eps(default: float) -> Field:
  return Field("rms_norm_eps", "norm_eps", default)


_MIXTRAL = Family(
  architecture="MixtralForCausalLM",
  fields=(
    *_SIZES,
    *_HEADS,
    Field("intermediate_size", "d_expert"),
    Field("num_local_experts", "num_experts", 8),
    Field("num_experts_per_tok", "top_k", 2),
    Field("router_jitter_noise", "router_jitter", 0.0),
    _activation("hidden_act"),
    _SLIDING_WINDOW,
    _norm_eps(1e-5),
    _tied(False),
  ),
  fixed={"scoring": "softmax_top_k_renormalized"},
  rope={"rope_theta": 1e6},
)


def _scoring(default: bool) -> Field:
  renormalized = {
    True: "softmax_top_k_renormalized",
    False: "softmax_top_k",
  }
  back = {name: value for value, name in renormalized.items()}
  return Field(
    "norm_topk_prob",
    "scoring",
    default,
    lambda value, entries: renormalized[bool(value)],
    lambda value, config: {"norm_topk_prob": back.get(value)},
  )


_OLMOE = Family(
  architecture="OlmoeForCausalLM",
  fields=(
    *_SIZES,
    *_HEADS,
    Field("intermediate_size", "d_expert"),
    Field("num_experts", "num_experts", 64),
    Field("num_experts_per_tok", "top_k", 8),
    Field("clip_qkv", "clip_qkv", None),
    Field("attention_bias", "attention_bias", False),
    _scoring(False),
    _activation("hidden_act"),
    _norm_eps(1e-5),
    _tied(False),
  ),
  fixed={"qk_norm": "vector"},
)


def _read_dense_layers(value, entries: Entries) -> tuple[int, ...]:
  step = entries.get("decoder_sparse_step") or 1
  return tuple(
    layer
    for layer in range(entries["num_hidden_layers"])
    if layer in value or (layer + 1) % step
  )


def _write_dense_layers(value, config: ModelConfig) -> dict[str, Any]:
  return {"mlp_only_layers": list(value), "decoder_sparse_step": 1}


_QWEN3_MOE = Family(
  architecture="Qwen3MoeForCausalLM",
  fields=(
    *_SIZES,
    *_HEADS,
    Field("moe_intermediate_size", "d_expert"),
    Field("intermediate_size", "d_ff"),
    # Version 5 writes the alias and reads both.
    Field("num_experts", "num_experts", 128, alias="num_local_experts"),
    Field("num_experts_per_tok", "top_k", 8),
    Field("attention_bias", "attention_bias", False),
    Field(
      "mlp_only_layers",
      "dense_layers",
      (),
      _read_dense_layers,
      _write_dense_layers,
    ),
    Field(
      "sliding_window",
      "sliding_window",
      None,
      lambda value, entries: (
        value if entries.get("use_sliding_window") else None
      ),
      lambda value, config: {
        "sliding_window": value,
        "use_sliding_window": value is not None,
      },
    ),
    _scoring(False),
    _activation("hidden_act"),
    _norm_eps(1e-6),
    _tied(False),
  ),
  fixed={"qk_norm": "head"},
)

_GRANITEMOE = Family(
  architecture="GraniteMoeForCausalLM",
  fields=(
    *_SIZES,
    *_HEADS,
    Field("intermediate_size", "d_expert"),
    Field("num_local_experts", "num_experts", 8),
    Field("num_experts_per_tok", "top_k", 2),
    Field("attention_bias", "attention_bias", False),
    Field("embedding_multiplier", "embedding_multiplier", 1.0),
    Field("residual_multiplier", "residual_multiplier", 1.0),
    Field("attention_multiplier", "attention_scale", 1.0),
    Field("logits_scaling", "logits_divisor", 1.0),
    _activation("hidden_act"),
    _norm_eps(1e-6),
    _tied(False),
  ),
  fixed={"scoring": "top_k_softmax"},
)
_GRANITEMOE_SHARED = dataclasses.replace(
  _GRANITEMOE,
  architecture="GraniteMoeSharedForCausalLM",
  fields=(
    *_GRANITEMOE.fields,
    Field("shared_intermediate_size", "d_shared", 0),
  ),
)

_JETMOE = Family(
  architecture="JetMoeForCausalLM",
  fields=(
    *_SIZES,
    Field("num_key_value_heads", "num_kv_heads"),
    Field("kv_channels", "head_dim", 128),
    Field("intermediate_size", "d_expert"),
    # The mixtures of attention and of MLPs have as many experts.
    Field("num_local_experts", "num_experts", 8),
    Field("num_local_experts", "attention_experts", 8),
    Field("num_experts_per_tok", "top_k", 2),
    Field("num_experts_per_tok", "attention_top_k", 2),
    _activation("activation_function"),
    Field("rms_norm_eps", "final_norm_eps", 1e-6),
    _tied(True),
  ),
  # The norms of a layer have an epsilon of their own, whatever the file says.
  fixed={
    "attention": "moa",
    "attention_scoring": "top_k_softmax",
    "scoring": "top_k_softmax",
    "block_bias": True,
    "norm_eps": 1e-6,
  },
  derive=lambda ours: {
    "num_heads": ours["num_kv_heads"] * ours["attention_top_k"]
  },
)

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _alternating(entries: Entries) -> list[str]:
  layers = range(entries["num_hidden_layers"])
  return [_FULL if layer % 2 else _SLIDING for layer in layers]


def _read_layer_types(value, entries: Entries) -> tuple[int, ...]:
  return tuple(i for i, kind in enumerate(value) if kind == _SLIDING)


def _write_layer_types(value, config: ModelConfig) -> dict[str, Any]:
  layers = range(config.num_layers)
  kinds = [_FULL if config.window(i) is None else _SLIDING for i in layers]
  return {"layer_types": kinds}


_GPT_OSS = Family(
  architecture="GptOssForCausalLM",
  fields=(
    *_SIZES,
    *_HEADS[:2],
    Field("head_dim", "head_dim", 64),
    Field("intermediate_size", "d_expert"),
    Field("num_local_experts", "num_experts", 128),
    Field("num_experts_per_tok", "top_k", 4),
    Field("attention_bias", "attention_bias", True),
    Field("sliding_window", "sliding_window", 128),
    Field(
      "layer_types",
      "sliding_layers",
      _alternating,
      _read_layer_types,
      _write_layer_types,
    ),
    _norm_eps(1e-5),
    _tied(False),
  ),
  fixed={
    "scoring": "top_k_softmax",
    "router_bias": True,
    "expert_bias": True,
    "attention_sinks": True,
    "activation": "clamped_swiglu",
  },
  rope={
    "rope_theta": 150_000.0,
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
  },
  entries={"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "hidden_act": "silu"},
)

# By `model_type` of config.json.
FAMILIES: dict[str, Family] = {
  "mixtral": _MIXTRAL,
  "olmoe": _OLMOE,
  "qwen3_moe": _QWEN3_MOE,
  "granitemoe": _GRANITEMOE,
  "granitemoeshared": _GRANITEMOE_SHARED,
  "jetmoe": _JETMOE,
  "gpt_oss": _GPT_OSS,
}
