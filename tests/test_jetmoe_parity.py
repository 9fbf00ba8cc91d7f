"""JetMoE of transformers: attention and a decoder layer, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import nn as smnn

torch = pytest.importorskip("torch", reason="parity needs torch")
jetmoe = pytest.importorskip(
  "transformers.models.jetmoe.modeling_jetmoe",
  reason="parity needs transformers",
)

B, L, D, E, K, H, C, I = 2, 9, 32, 4, 2, 3, 8, 24
LIMIT = 1e-5
MASKS = {
  "full": np.ones((B, L), bool),
  "left": np.arange(L)[None] >= np.array([[3], [0]]),
  "right": np.arange(L)[None] < np.array([[9], [5]]),
}


def config():
  return jetmoe.JetMoeConfig(
    vocab_size=97, hidden_size=D, num_hidden_layers=1, num_key_value_heads=H,
    kv_channels=C, intermediate_size=I, num_local_experts=E,
    num_experts_per_tok=K, attn_implementation="eager",
  )  # fmt: skip


def filled(layer):
  generator = torch.Generator().manual_seed(0)
  for parameter in layer.parameters():
    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
  return layer


def tree(names, get):
  """Our tree of what `get(name of theirs)` returns, turned as we store it."""

  def leaf(name):
    a = np.asarray(get(name).detach().numpy())
    return jnp.asarray(np.swapaxes(a, -1, -2) if a.ndim > 1 else a)

  return jax.tree.map(leaf, names)


def attention_names(prefix=""):
  experts = f"{prefix}experts."
  return {
    "query": {"kernel": f"{experts}input_linear.weight"},
    "output": {"kernel": f"{experts}output_linear.weight"},
    "key_value": {"kernel": f"{prefix}kv_proj.weight"},
    "router": {"kernel": f"{experts}router.layer.weight"},
    "output_bias": f"{experts}bias",
  }


LAYER_NAMES = {
  "attention": attention_names("self_attention."),
  "mlp": {
    "router": {"kernel": "mlp.router.layer.weight"},
    "experts": {
      "w_gate_up": "mlp.input_linear.weight",
      "w_out": "mlp.output_linear.weight",
    },
    "output_bias": "mlp.bias",
  },
  "input_norm": "input_layernorm.weight",
  "mlp_norm": "post_attention_layernorm.weight",
}

MOA = smnn.MixtureOfAttention(
  num_experts=E, top_k=K, num_heads=H, head_dim=C, use_output_bias=True
)
MLP = smnn.SMoEBlock(
  num_experts=E, top_k=K, d_expert=I, scoring="top_k_softmax",
  use_output_bias=True,
)  # fmt: skip


def our_layer(params, x, mask):
  def normalized(x, weight):
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * scale * weight[None, None]

  h = normalized(x, params["input_norm"])
  x += MOA.apply({"params": params["attention"]}, h, mask=mask)[0]
  h = normalized(x, params["mlp_norm"])
  return x + MLP.apply({"params": params["mlp"]}, h, mask=mask)[0]


def our_attention(params, x, mask):
  return MOA.apply({"params": params}, x, mask=mask)[0]


def theirs(layer, x, mask, dy):
  """Output and gradients by torch; `dy` is zero at padding."""
  x = torch.tensor(x, requires_grad=True)
  causal = np.tri(L, dtype=bool)[None] & mask[:, None, :]
  lowest = np.finfo(np.float32).min
  bias = torch.tensor(np.where(causal, 0, lowest).astype(np.float32))[:, None]
  positions = torch.arange(L)[None].expand(B, L)
  options = {}
  if hasattr(jetmoe.JetMoeModel(config()), "rotary_emb"):
    rotary = jetmoe.JetMoeRotaryEmbedding(config=config())
    options["position_embeddings"] = rotary(x, positions)
  # Before version 5, each attention turned its heads by itself.
  y = layer(x, attention_mask=bias, position_ids=positions, **options)
  y = y[0] if isinstance(y, tuple) else y
  y.backward(torch.tensor(dy))
  return y.detach().numpy(), x.grad.numpy()


def relative_error(got, expected):
  expected = np.asarray(expected)
  return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("part", ["attention", "layer"])
def test_jetmoe_forward_and_gradients(part, padding):
  mask = MASKS[padding]
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, L, D)).astype(np.float32)
  dy = (rng.normal(size=x.shape) * mask[:, :, None]).astype(np.float32)
  if part == "attention":
    layer, names, ours = (
      jetmoe.JetMoeAttention(config(), 0), attention_names(), our_attention,
    )  # fmt: skip
  else:
    # `JetMoeBlock` before version 5.
    layer_type = getattr(jetmoe, "JetMoeDecoderLayer", None)
    layer_type = layer_type or jetmoe.JetMoeBlock
    layer, names, ours = layer_type(config(), 0), LAYER_NAMES, our_layer
  layer = filled(layer)
  params = tree(names, layer.get_parameter)
  y_theirs, dx_theirs = theirs(layer, x, mask, dy)

  @jax.jit
  def step(params, x, dy):
    y, pull_back = jax.vjp(
      lambda p, x: ours(p, x, jnp.asarray(mask)), params, x
    )
    return y, pull_back(dy)

  y, (dparams, dx) = step(params, jnp.asarray(x), jnp.asarray(dy))
  real = mask[:, :, None]
  errors = {
    "y": relative_error(np.asarray(y) * real, y_theirs * real),
    "dx": relative_error(dx, dx_theirs),
  }
  theirs_dparams = tree(names, lambda name: layer.get_parameter(name).grad)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(dparams),
    jax.tree.leaves(theirs_dparams),
    strict=True,
  ):
    errors[jax.tree_util.keystr(path)] = relative_error(a, b)
  assert max(errors.values()) <= LIMIT, errors
  print(part, padding, f"largest relative error {max(errors.values()):.1e}")
