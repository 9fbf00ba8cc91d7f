"""A tiny config.json of each family, and weights that hide nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from scattermoe_jax.checkpoints import writer
from scattermoe_jax.models import ModelConfig, Transformer

_SIZES = {
  "vocab_size": 97,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "intermediate_size": 24,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
_HEADS = {"num_attention_heads": 4, "head_dim": 8}

# No two sizes that a mistake could exchange are equal, and every switch that a
# family has is on somewhere.
FAMILY_ENTRIES = {
  "mixtral": {
    **_SIZES,
    **_HEADS,
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "rope_theta": 1e6,
  },
  "olmoe": {
    **_SIZES,
    "num_attention_heads": 4,
    "model_type": "olmoe",
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "clip_qkv": 1.5,
    "pad_token_id": None,  # torch gives the embedding of padding no gradient.
  },
  "qwen3_moe": {
    **_SIZES,
    "num_attention_heads": 4,
    "head_dim": 10,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 20,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
  },
  "granitemoe": {
    **_SIZES,
    "num_attention_heads": 4,
    "model_type": "granitemoe",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.7,
    "tie_word_embeddings": True,
  },
  "granitemoeshared": {
    **_SIZES,
    "num_attention_heads": 4,
    "model_type": "granitemoeshared",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 12,
    "attention_bias": True,
  },
  "jetmoe": {
    **_SIZES,
    "model_type": "jetmoe",
    "kv_channels": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
  },
  "gpt_oss": {
    **_SIZES,
    **_HEADS,
    "intermediate_size": 32,  # MXFP4 has blocks of 32.
    "model_type": "gpt_oss",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "rope_theta": 150000.0,
    "rope_scaling": {
      "rope_type": "yarn",
      "factor": 32.0,
      "beta_fast": 32.0,
      "beta_slow": 1.0,
      "truncate": False,
      "original_max_position_embeddings": 4096,
    },
  },
}


def random_variables(config: ModelConfig, dtype: str = "float32", seed=0):
  """Every parameter drawn from N(0, 0.2)."""
  config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
  shapes = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )
  random = np.random.default_rng(seed)
  return unflatten_dict(
    {
      path: jnp.asarray(random.normal(0, 0.2, leaf.shape), leaf.dtype)
      for path, leaf in flatten_dict(shapes).items()
    }
  )


def stored(name, array):
  return writer.TensorToWrite(name, array.dtype, array.shape, lambda: array)


def write_some(directory, tensors, **options):
  with writer.new_folder(directory) as partial:
    writer.write_tensors(
      partial, [stored(n, a) for n, a in tensors.items()], **options
    )
