"""ScatterMoE (Tan et al., 2024): its gated MLP, and two of its products."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from benchmarks.peers import Absent, Step, torch_step
from scattermoe_jax.routing import Routing


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


def products(
  op: str, left: jax.Array, right: jax.Array, routes: Mapping[str, Routing]
) -> dict[str, Callable[[], torch_step.Results]]:
  """Returns calls of its kernels by routing, as its layer calls them.

  Args:
    op: "up", whose weights are laid out as its layer stores them, beforehand;
      or "dw_up", for which it makes a grouped copy of x each time.
    left: x, scattered.
    right: the weights (E, d, n), or the gradient of h, grouped.
    routes: the routings by name.

  Raises:
    Absent: if it is not installed, or has no such product.
  """
  if op not in ("up", "dw_up"):
    raise Absent(f"nothing calls its {op}")
  try:
    from scattermoe.kernels import ops
  except ImportError as error:
    raise Absent(f"not installed ({error})") from error
  x, other = map(torch_step.to_torch, (left, right))
  if op == "up":
    # Stored (E, out, in), and read as (E, in, out).
    other = other.transpose(1, 2).contiguous().transpose(1, 2)

  def of(routing: Routing):
    ids = torch_step.to_torch(routing.scattered_ids).long()
    expert_ids = torch_step.to_torch(routing.expert_ids).long()
    ends = torch_step.to_torch(routing.group_sizes).long().cumsum(0)
    top_k, num_experts = routing.top_k, routing.num_experts

    def up():
      y = ops.scatter2scatter(
        x, other, expert_ids, ids, top_k, x_grouped=False, y_grouped=True
      )
      return torch_step.Results(y)

    def dw_up():
      grouped = ops.group(x, ids, fan_out=top_k)
      return torch_step.Results(
        ops.group_bwd_W(other, grouped, ends, num_experts)[0]
      )

    return up if op == "up" else dw_up

  return {name: of(routing) for name, routing in routes.items()}
