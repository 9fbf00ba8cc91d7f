"""ScatterMoE (Tan et al., 2024): its gated MLP, from gates and ids."""

import jax.numpy as jnp

from benchmarks.peers import Step, torch_step


def build(shape, data, direction: str) -> Step:
  """Returns the step. Its weights are (E, out, in), the up half first."""
  import torch
  from scattermoe.mlp import GLUMLP

  gate, up = jnp.split(data.w_in, 2, axis=-1)
  x, dy, ids = map(torch_step.to_torch, (data.x, data.dy, data.expert_ids))
  # It multiplies gates and rows, so both are of one dtype.
  gates = torch_step.to_torch(data.gates.astype(data.x.dtype))
  layer = GLUMLP(
    shape.d_model, shape.d_expert, shape.num_experts, shape.top_k,
    activation=torch.nn.SiLU(),
  )  # fmt: skip
  weights = (jnp.concatenate([up, gate], axis=-1), data.w_out)
  for experts, w in zip(
    (layer.experts, layer.output_experts), weights, strict=True
  ):
    w = torch_step.to_torch(jnp.swapaxes(w, 1, 2))
    experts.weight = torch.nn.Parameter(w)
  ids = ids.long()
  parameters = [layer.experts.weight, layer.output_experts.weight]
  return torch_step.make_step(
    lambda: layer(x, gates, ids), [x, gates, *parameters], dy, direction
  )
