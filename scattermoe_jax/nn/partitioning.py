"""What a module's parameters are called on a mesh."""

from flax import linen as nn
from flax.typing import Initializer

from scattermoe_jax.sharding import MeshAxes


def named(
  init: Initializer, mesh_axes: MeshAxes | None, *names: str | None
) -> Initializer:
  """Returns an initializer of parameters with logical axis names.

  Args:
    init: of the values.
    mesh_axes: None for `init` itself: names are for those who split.
    *names: of the dimensions, as `MeshAxes.rules` maps them to a mesh.
  """
  if mesh_axes is None:
    return init
  return nn.with_logical_partitioning(init, names)


def with_gate_axis(init: Initializer) -> Initializer:
  """Returns an initializer of (..., 2, n) with the values of (..., 2n).

  A mesh can split n only where both halves are split alike.
  """

  def split(key, shape, dtype):
    joined = (*shape[:-2], shape[-2] * shape[-1])
    return init(key, joined, dtype).reshape(shape)

  return split
