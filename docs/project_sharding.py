"""Prints the projections of docs/sharding.md: arithmetic, not measurements.

python docs/project_sharding.py
"""

from typing import NamedTuple

from scattermoe_jax.sharding.traffic import Layer, bytes_received

# Assumptions, all of them.
PRODUCTS = 550e12  # FLOP/s of a grouped product in bfloat16
NVLINK = 360e9  # bytes/s into a GPU: 80 % of 450 GB/s
NETWORK = 45e9  # bytes/s into a GPU: 90 % of one 400 Gbit/s port each
NODE = 8  # GPUs that share NVLink
STATE = 14  # bytes per parameter: bfloat16, and float32 weight and moments


class Model(NamedTuple):
  """The expert layers of a model and how they are trained."""

  name: str
  layer: Layer
  num_layers: int
  num_devices: int
  num_tokens: int  # of a step, over the devices


class Plan(NamedTuple):
  """How many devices play each role; the first named share a node."""

  tensor: int = 1
  expert: int = 1
  fsdp: int = 1
  exchange: str = "all_gather"

  def __str__(self):
    sizes = [f"{r}={n}" for r, n in zip(self._fields, self[:3], strict=False)]
    text = " ".join(size for size in sizes if not size.endswith("=1"))
    return text + (" ragged" if self.exchange != "all_gather" else "")


MIXTRAL = Model("Mixtral-8x22B", Layer(6144, 16384, 8, 2), 56, 64, 8192)
DEEPSEEK = Model("DeepSeek-V3", Layer(7168, 2048, 256, 8), 58, 256, 16384)
PLANS = (
  (MIXTRAL, Plan(tensor=8, fsdp=8)),
  (MIXTRAL, Plan(expert=8, fsdp=8)),
  (DEEPSEEK, Plan(expert=8, fsdp=32)),
  (DEEPSEEK, Plan(expert=64, fsdp=4, exchange="ragged_all_to_all")),
  (DEEPSEEK, Plan(expert=256, exchange="ragged_all_to_all")),
)


def project(model: Model, plan: Plan) -> dict[str, float]:
  """Returns milliseconds per layer and step, and GB per device."""
  layer, t = model.layer, model.num_tokens
  # Devices of the tensor axes share their tokens.
  forward, backward = bytes_received(
    layer,
    t * plan.tensor,
    fsdp=plan.fsdp,
    tensor=plan.tensor,
    expert=plan.expert,
    exchange=plan.exchange,
  )
  # Weights are gathered again for the backward: sharding.own_parts_saveable.
  fsdp = 2 * forward.fsdp + backward.fsdp
  tokens = sum(t.tensor + t.expert for t in (forward, backward))
  inside = max(plan.tensor, plan.expert)
  outside = max(0, inside - NODE) / max(inside - 1, 1)
  products = 18 * t * layer.top_k * layer.d * layer.n / PRODUCTS
  params = layer.weight_bytes / layer.itemsize * model.num_layers
  return {
    "products": 1e3 * products,
    "nvlink": 1e3 * tokens * (1 - outside) / NVLINK,
    "network": 1e3 * (fsdp + tokens * outside) / NETWORK,
    "state": params * STATE / model.num_devices / 1e9,
    "h": 4 * t * layer.top_k * layer.n * worst_rows(plan) / 1e9,
  }


def worst_rows(plan: Plan) -> float:
  """Returns the rows that a device has room for over an even share."""
  if plan.exchange == "all_gather":
    return plan.expert
  return 2.0  # capacity_factor


def table() -> str:
  """Returns the projections in Markdown."""
  lines = [
    "| model, devices | plan | products | NVLink | network | state | h |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
  ]
  for model, plan in PLANS:
    figures = project(model, plan)
    lines.append(
      f"| {model.name}, {model.num_devices} | {plan} | "
      f"{figures['products']:.0f} ms | {figures['nvlink']:.1f} ms | "
      f"{figures['network']:.0f} ms | {figures['state']:.0f} GB | "
      f"{figures['h']:.1f} GB |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  print(table())
