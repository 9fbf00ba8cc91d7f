"""Golden: each family's tensors in the file, what they are here, its switches.

The tests of parity see a mistake in these only where transformers is installed.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from scattermoe_jax import checkpoints
from scattermoe_jax.checkpoints import mxfp4, reader
from scattermoe_jax.checkpoints.config_json import config_from_entries
from scattermoe_jax.checkpoints.plan import make_plan
from scattermoe_jax.models import Transformer
from tests.families import FAMILY_ENTRIES, random_variables, write_some

# Their name -> our path, and the layout. "model.layers.0." and
# "params/layer_0/" are left out, and of the experts all but the second.
_DENSE_ATTENTION = {
  "input_layernorm.weight": ("attention_norm/scale", "same"),
  "post_attention_layernorm.weight": ("ffn_norm/scale", "same"),
  "self_attn.q_proj.weight": ("attention/query/kernel", "transposed"),
  "self_attn.k_proj.weight": ("attention/key/kernel", "transposed"),
  "self_attn.v_proj.weight": ("attention/value/kernel", "transposed"),
  "self_attn.o_proj.weight": ("attention/output/kernel", "transposed"),
}
_BIASES = {
  f"self_attn.{theirs}_proj.bias": (f"attention/{ours}/bias", "same")
  for theirs, ours in (
    ("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")
  )
}  # fmt: skip
_QK_NORMS = {
  "self_attn.q_norm.weight": ("attention/query_norm/scale", "same"),
  "self_attn.k_norm.weight": ("attention/key_norm/scale", "same"),
}
_QWEN_EXPERTS = {
  "mlp.gate.weight": ("ffn/router/kernel", "transposed"),
  "mlp.experts.1.gate_proj.weight": ("ffn/experts/w_gate_up", "gate"),
  "mlp.experts.1.up_proj.weight": ("ffn/experts/w_gate_up", "up"),
  "mlp.experts.1.down_proj.weight": ("ffn/experts/w_out", "transposed"),
}


def _fused(theirs):
  return {
    f"{theirs}.router.layer.weight": ("ffn/router/kernel", "transposed"),
    f"{theirs}.input_linear.weight": ("ffn/experts/w_gate_up", "transposed"),
    f"{theirs}.output_linear.weight": ("ffn/experts/w_out", "transposed"),
  }


_GPT_OSS = {
  **_DENSE_ATTENTION,
  **_BIASES,
  "self_attn.sinks": ("attention/sinks", "same"),
  "mlp.router.weight": ("ffn/router/kernel", "transposed"),
  "mlp.router.bias": ("ffn/router/bias", "same"),
  "mlp.experts.gate_up_proj_bias": ("ffn/experts/bias_in", "interleaved"),
  "mlp.experts.down_proj_bias": ("ffn/experts/bias_out", "same"),
}
LAYER_NAMES = {
  "mixtral": {
    **_DENSE_ATTENTION,
    "block_sparse_moe.gate.weight": ("ffn/router/kernel", "transposed"),
    "block_sparse_moe.experts.1.w1.weight": ("ffn/experts/w_gate_up", "gate"),
    "block_sparse_moe.experts.1.w3.weight": ("ffn/experts/w_gate_up", "up"),
    "block_sparse_moe.experts.1.w2.weight": ("ffn/experts/w_out", "transposed"),
  },
  "olmoe": {**_DENSE_ATTENTION, **_QK_NORMS, **_QWEN_EXPERTS},
  "qwen3_moe": {**_DENSE_ATTENTION, **_QK_NORMS, **_QWEN_EXPERTS},
  "granitemoe": {**_DENSE_ATTENTION, **_fused("block_sparse_moe")},
  "granitemoeshared": {
    **_DENSE_ATTENTION,
    **_BIASES,
    **_fused("block_sparse_moe"),
    "shared_mlp.input_linear.weight": ("ffn/shared/w_gate_up", "transposed"),
    "shared_mlp.output_linear.weight": ("ffn/shared/w_out", "transposed"),
  },
  "jetmoe": {
    "input_layernorm.weight": ("attention_norm/scale", "same"),
    "post_attention_layernorm.weight": ("ffn_norm/scale", "same"),
    "self_attention.experts.router.layer.weight": (
      "attention/router/kernel", "transposed"
    ),
    "self_attention.experts.input_linear.weight": (
      "attention/query/kernel", "transposed"
    ),
    "self_attention.experts.output_linear.weight": (
      "attention/output/kernel", "transposed"
    ),
    "self_attention.experts.bias": ("attention/output_bias", "same"),
    "self_attention.kv_proj.weight": (
      "attention/key_value/kernel", "transposed"
    ),
    **_fused("mlp"),
    "mlp.bias": ("ffn/output_bias", "same"),
  },
  "gpt_oss": {
    **_GPT_OSS,
    "mlp.experts.gate_up_proj": ("ffn/experts/w_gate_up", "interleaved"),
    "mlp.experts.down_proj": ("ffn/experts/w_out", "same"),
  },
  "gpt_oss_mxfp4": {
    **_GPT_OSS,
    "mlp.experts.gate_up_proj": (
      "ffn/experts/w_gate_up", "interleaved_transposed"
    ),
    "mlp.experts.down_proj": ("ffn/experts/w_out", "transposed"),
  },
}  # fmt: skip
_QWEN_DENSE = {
  "mlp.gate_proj.weight": ("ffn/w_gate_up", "gate"),
  "mlp.up_proj.weight": ("ffn/w_gate_up", "up"),
  "mlp.down_proj.weight": ("ffn/w_out", "transposed"),
}
_ENDS = {
  "model.embed_tokens.weight": ("params/embed/embedding", "same"),
  "model.norm.weight": ("params/final_norm/scale", "same"),
}
_HEAD = {"lm_head.weight": ("params/lm_head/kernel", "transposed")}


def planned(table, config):
  """Their name -> (our path, layout) of all weights but those of experts.

  Of the experts, the second.
  """
  shapes = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )
  shapes = {p: a.shape for p, a in flatten_dict(shapes, sep="/").items()}
  return {
    piece.theirs: (path, piece.layout)
    for path, pieces in make_plan(table, shapes).items()
    for piece in pieces
    if piece.expert in (None, 1)
  }


@pytest.mark.parametrize("table", LAYER_NAMES)
def test_names_are_those_of_the_family(table):
  family = table.removesuffix("_mxfp4")
  config = config_from_entries(FAMILY_ENTRIES[family], "config.json")
  layers = [LAYER_NAMES[table]] * 2
  if family == "qwen3_moe":  # Its second layer is dense.
    layers[1] = {**_DENSE_ATTENTION, **_QK_NORMS, **_QWEN_DENSE}
  expected = _ENDS | ({} if config.tie_embeddings else _HEAD)
  for i, names in enumerate(layers):
    for theirs, (ours, layout) in names.items():
      path = f"params/layer_{i}/{ours}"
      expected[f"model.layers.{i}.{theirs}"] = (path, layout)
  assert planned(table, config) == expected


_RENORMALIZED = "softmax_top_k_renormalized"
_PLAIN_SOFTMAX = "softmax_top_k"

# Where the file does not say: qk_norm, scoring, rope_theta, norm_eps, tied.
SWITCHES = {
  "mixtral": (None, _RENORMALIZED, 1e6, 1e-5, False),
  "olmoe": ("vector", _PLAIN_SOFTMAX, 1e4, 1e-5, False),
  "qwen3_moe": ("head", _PLAIN_SOFTMAX, 1e4, 1e-6, False),
  "granitemoe": (None, "top_k_softmax", 1e4, 1e-6, False),
  "granitemoeshared": (None, "top_k_softmax", 1e4, 1e-6, False),
  "jetmoe": (None, "top_k_softmax", 1e4, 1e-6, True),
  "gpt_oss": (None, "top_k_softmax", 150_000.0, 1e-5, False),
}


@pytest.mark.parametrize("family", FAMILY_ENTRIES)
def test_switches_are_those_of_the_family(family):
  entries = dict(FAMILY_ENTRIES[family])
  for key in ("rope_theta", "rope_scaling", "rms_norm_eps", "norm_topk_prob",
              "tie_word_embeddings"):  # fmt: skip
    entries.pop(key, None)
  config = config_from_entries(entries, "config.json")
  got = (config.qk_norm, config.scoring, config.rope_theta, config.norm_eps,
         config.tie_embeddings)  # fmt: skip
  assert got == SWITCHES[family]
  scaling = (32.0, 4096, 32.0, 1.0, False, None)
  assert config.rope_scaling == (scaling if family == "gpt_oss" else None)
  is_jetmoe = family == "jetmoe"
  assert config.attention == ("moa" if is_jetmoe else "mha")
  assert config.block_bias == is_jetmoe


def test_later_chunks_of_mxfp4_have_their_own_scales(tmp_path):
  random = np.random.default_rng(0)
  blocks = random.integers(0, 256, (5, 500, 128, 16), np.uint8)
  scales = random.integers(100, 150, blocks.shape[:-1], np.uint8)
  write_some(tmp_path / "m", {"w_blocks": blocks, "w_scales": scales})
  stored = reader.read_folder(tmp_path / "m")
  tensor = mxfp4.Mxfp4Tensor(stored["w_blocks"], stored["w_scales"])
  parts = list(tensor.chunks())
  assert len(parts) > 2
  positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
  nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1)
  values = np.where(nibbles & 8, -1, 1) * positive[nibbles & 7]
  values = values * np.exp2(scales[..., None, None] - np.float32(127))
  for first, rows in parts:
    expected = values[first : first + len(rows)].reshape(rows.shape)
    np.testing.assert_array_equal(rows, expected)


def test_saving_like_a_newer_folder_says_the_dtype_written(tmp_path):
  config = config_from_entries(FAMILY_ENTRIES["mixtral"], "config.json")
  variables = random_variables(config)
  checkpoints.save(tmp_path / "a", config, variables, family="mixtral")
  path = tmp_path / "a" / "config.json"
  entries = json.loads(path.read_text()) | {
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
  }
  path.write_text(json.dumps(entries))
  checkpoints.save(tmp_path / "b", config, variables, like=tmp_path / "a")
  again = checkpoints.read_config(tmp_path / "b")
  assert (again.param_dtype, again.rope_theta) == ("float32", 1e6)
