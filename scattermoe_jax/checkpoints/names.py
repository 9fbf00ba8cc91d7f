"""What each family calls its tensors, as data: ours, theirs, the layout.

`{layer}` stands for a number in both names. `{expert}` in a file's name stands
for the index along the first axis of our array. A line applies where our model
has the array: biases, norms of queries, dense layers and tied embeddings need
no condition of their own.
Source: the files that transformers 4.57 and 5.23 write (`save_pretrained`).
"""

from typing import NamedTuple


class Name(NamedTuple):
  """One tensor of a file and the array of ours that it is, or is a part of.

  Attributes:
    ours: path in the tree of parameters.
    theirs: name in the file.
    layout: a key of `layouts.LAYOUTS`.
    is_mxfp4: whether the file has `theirs` in two tensors, "_blocks" and
      "_scales".
  """

  ours: str
  theirs: str
  layout: str
  is_mxfp4: bool = False


def _linear(ours: str, theirs: str) -> tuple[Name, Name]:
  return (
    Name(f"{ours}/kernel", f"{theirs}.weight", "transposed"),
    Name(f"{ours}/bias", f"{theirs}.bias", "same"),
  )


_ENDS = (
  Name("embed/embedding", "model.embed_tokens.weight", "same"),
  Name("final_norm/scale", "model.norm.weight", "same"),
  Name("lm_head/kernel", "lm_head.weight", "transposed"),
)
_NORMS = (
  Name(
    "layer_{layer}/attention_norm/scale",
    "model.layers.{layer}.input_layernorm.weight",
    "same",
  ),
  Name(
    "layer_{layer}/ffn_norm/scale",
    "model.layers.{layer}.post_attention_layernorm.weight",
    "same",
  ),
)
_OURS = "layer_{layer}/attention"
_SELF_ATTENTION = "model.layers.{layer}.self_attn"
_ATTENTION = (
  *_linear(f"{_OURS}/query", f"{_SELF_ATTENTION}.q_proj"),
  *_linear(f"{_OURS}/key", f"{_SELF_ATTENTION}.k_proj"),
  *_linear(f"{_OURS}/value", f"{_SELF_ATTENTION}.v_proj"),
  *_linear(f"{_OURS}/output", f"{_SELF_ATTENTION}.o_proj"),
  Name(f"{_OURS}/query_norm/scale", f"{_SELF_ATTENTION}.q_norm.weight", "same"),
  Name(f"{_OURS}/key_norm/scale", f"{_SELF_ATTENTION}.k_norm.weight", "same"),
  Name(f"{_OURS}/sinks", f"{_SELF_ATTENTION}.sinks", "same"),
)
_COMMON = (*_ENDS, *_NORMS, *_ATTENTION)

_FFN = "layer_{layer}/ffn"
_EXPERTS = f"{_FFN}/experts"


def _split_experts(theirs: str, gate: str, up: str, down: str):
  """Three matrices per expert, each a linear layer."""
  return (
    Name(f"{_EXPERTS}/w_gate_up", f"{theirs}.{{expert}}.{gate}.weight", "gate"),
    Name(f"{_EXPERTS}/w_gate_up", f"{theirs}.{{expert}}.{up}.weight", "up"),
    Name(
      f"{_EXPERTS}/w_out", f"{theirs}.{{expert}}.{down}.weight", "transposed"
    ),
  )


def _fused_experts(theirs: str):
  """One tensor for all experts' rows [gate; up], one for their outputs."""
  return (
    Name(
      f"{_EXPERTS}/w_gate_up", f"{theirs}.input_linear.weight", "transposed"
    ),
    Name(f"{_EXPERTS}/w_out", f"{theirs}.output_linear.weight", "transposed"),
  )


_MLP = "model.layers.{layer}.mlp"
_SPARSE_MOE = "model.layers.{layer}.block_sparse_moe"

_MIXTRAL = (
  *_COMMON,
  *_linear(f"{_FFN}/router", f"{_SPARSE_MOE}.gate"),
  *_split_experts(f"{_SPARSE_MOE}.experts", "w1", "w3", "w2"),
)
# Also DeepSeek-V3's and GLM's words for a mixture of experts.
_QWEN = (
  *_COMMON,
  *_linear(f"{_FFN}/router", f"{_MLP}.gate"),
  *_split_experts(f"{_MLP}.experts", "gate_proj", "up_proj", "down_proj"),
  # A dense layer among the others.
  Name(f"{_FFN}/w_gate_up", f"{_MLP}.gate_proj.weight", "gate"),
  Name(f"{_FFN}/w_gate_up", f"{_MLP}.up_proj.weight", "up"),
  Name(f"{_FFN}/w_out", f"{_MLP}.down_proj.weight", "transposed"),
)
_GRANITE = (
  *_COMMON,
  *_linear(f"{_FFN}/router", f"{_SPARSE_MOE}.router.layer"),
  *_fused_experts(_SPARSE_MOE),
)
_GRANITE_SHARED = (
  *_GRANITE,
  Name(
    f"{_FFN}/shared/w_gate_up",
    "model.layers.{layer}.shared_mlp.input_linear.weight",
    "transposed",
  ),
  Name(
    f"{_FFN}/shared/w_out",
    "model.layers.{layer}.shared_mlp.output_linear.weight",
    "transposed",
  ),
)

_MOA = "model.layers.{layer}.self_attention"
_JETMOE = (
  *_ENDS,
  *_NORMS,
  *_linear(f"{_OURS}/router", f"{_MOA}.experts.router.layer"),
  Name(
    f"{_OURS}/query/kernel", f"{_MOA}.experts.input_linear.weight", "transposed"
  ),
  Name(
    f"{_OURS}/output/kernel",
    f"{_MOA}.experts.output_linear.weight",
    "transposed",
  ),
  Name(f"{_OURS}/output_bias", f"{_MOA}.experts.bias", "same"),
  # Keys first, then values, in the file as in ours.
  *_linear(f"{_OURS}/key_value", f"{_MOA}.kv_proj"),
  *_linear(f"{_FFN}/router", f"{_MLP}.router.layer"),
  *_fused_experts(_MLP),
  Name(f"{_FFN}/output_bias", f"{_MLP}.bias", "same"),
)

_GPT_OSS_BUT_WEIGHTS = (
  *_COMMON,
  *_linear(f"{_FFN}/router", f"{_MLP}.router"),
  Name(
    f"{_EXPERTS}/bias_in", f"{_MLP}.experts.gate_up_proj_bias", "interleaved"
  ),
  Name(f"{_EXPERTS}/bias_out", f"{_MLP}.experts.down_proj_bias", "same"),
)
_GPT_OSS = (
  *_GPT_OSS_BUT_WEIGHTS,
  Name(f"{_EXPERTS}/w_gate_up", f"{_MLP}.experts.gate_up_proj", "interleaved"),
  Name(f"{_EXPERTS}/w_out", f"{_MLP}.experts.down_proj", "same"),
)
# Quantised along d_in, so d_in is last.
_GPT_OSS_MXFP4 = (
  *_GPT_OSS_BUT_WEIGHTS,
  Name(
    f"{_EXPERTS}/w_gate_up",
    f"{_MLP}.experts.gate_up_proj",
    "interleaved_transposed",
    is_mxfp4=True,
  ),
  Name(
    f"{_EXPERTS}/w_out",
    f"{_MLP}.experts.down_proj",
    "transposed",
    is_mxfp4=True,
  ),
)

# By `model_type` of config.json.
NAMES: dict[str, tuple[Name, ...]] = {
  "mixtral": _MIXTRAL,
  "olmoe": _QWEN,
  "qwen3_moe": _QWEN,
  "granitemoe": _GRANITE,
  "granitemoeshared": _GRANITE_SHARED,
  "jetmoe": _JETMOE,
  "gpt_oss": _GPT_OSS,
  "gpt_oss_mxfp4": _GPT_OSS_MXFP4,
}

# Buffers that old files hold beside the weights: computed, not learned.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
