"""Bytes that one device receives for one expert layer: formulas for planning.

With p devices in a ring, an all-gather or a reduce-scatter of N bytes brings
each device N (p - 1) / p of them, and an all-reduce twice that.
"""

from typing import NamedTuple

from scattermoe_jax.sharding.axes import Exchange


class Layer(NamedTuple):
  """An expert layer, as far as its traffic goes.

  Attributes:
    d: width of the model.
    n: width of one expert.
    num_experts: E.
    top_k: k.
    gated: whether the first matrix has a gate half.
    itemsize: bytes of an activation and of a weight as gathered; 2 for
      bfloat16. Gates and their gradients take 4, expert ids too.
  """

  d: int
  n: int
  num_experts: int
  top_k: int
  gated: bool = True
  itemsize: int = 2

  @property
  def weight_bytes(self) -> int:
    """All experts' matrices."""
    columns = 3 if self.gated else 2
    return columns * self.num_experts * self.d * self.n * self.itemsize


class Traffic(NamedTuple):
  """Bytes that one device receives, by role of the axis that brings them."""

  data: float
  fsdp: float
  tensor: float
  expert: float

  @property
  def total(self) -> float:
    """The sum over the roles."""
    return sum(self)


def bytes_received(
  layer: Layer,
  num_tokens: int,
  *,
  data: int = 1,
  fsdp: int = 1,
  tensor: int = 1,
  expert: int = 1,
  exchange: Exchange = "all_gather",
) -> tuple[Traffic, Traffic]:
  """Returns the traffic of `smoe_mlp`, forward and backward.

  Args:
    layer: its shape; biases, E / k times smaller than the gates, are left out.
    num_tokens: tokens of one device.
    data: devices along the data axes; likewise the next three.
    fsdp: those along the fsdp axes.
    tensor: those along the tensor axes.
    expert: those along the expert axes.
    exchange: how tokens reach their experts. "ragged_all_to_all" moves what
      the routing asks for: given here for an even one.

  Example:
    >>> forward, _ = bytes_received(Layer(64, 32, 8, 2), 16, fsdp=8)
    >>> forward.fsdp
    86016.0
  """
  t = num_tokens
  weights = layer.weight_bytes / (expert * tensor)
  vectors = t * layer.d * layer.itemsize
  gates = ids = t * layer.top_k * 4
  gathered = weights * (fsdp - 1) / fsdp
  summed = 2 * weights / fsdp * (data - 1) / data
  reduced = 2 * (tensor - 1) / tensor
  if exchange == "all_gather":
    there = back = float((expert - 1) * vectors)
    numbers = float(expert - 1)
  else:
    there = back = layer.top_k * vectors * (expert - 1) / expert
    numbers = (expert - 1) / expert
  forward = Traffic(
    data=0.0,
    fsdp=gathered,
    tensor=reduced * vectors,
    expert=there + back + numbers * (gates + ids),
  )
  backward = Traffic(
    data=summed,
    fsdp=gathered,
    tensor=reduced * (vectors + gates),
    expert=there + back + numbers * gates,
  )
  return forward, backward
