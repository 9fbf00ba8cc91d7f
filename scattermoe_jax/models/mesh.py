"""Training on several devices: where the state and the batches lie.

  --mesh data=2,expert=4      8 devices: 2 copies of 4 groups of experts
  --mesh fsdp=8               weights and moments in 8 parts, gathered on use
  --mesh expert=4,tensor=2    d_expert of each expert in 2 parts

The axes are named after their roles, see `sharding.MeshAxes`. A checkpoint
belongs to no mesh: what it holds has the shapes of one device.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.sharding import MeshAxes, join_gate, split_gate

# A tree of arrays.
Tree = Any

ROLES = ("data", "fsdp", "expert", "tensor")
_AXES = MeshAxes(data="data", fsdp="fsdp", expert="expert", tensor="tensor")


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh and what to do with it; without one, everything is as JAX does it.

  Attributes:
    mesh: the devices; None for one device.
  """

  mesh: Mesh | None = None

  @classmethod
  def of(cls, text: str | None) -> "Placement":
    """Returns the placement of a text such as "data=2,expert=4".

    Raises:
      ValueError: if it is not such a text, or the machine has fewer devices.
    """
    if not text:
      return cls()
    sizes = dict.fromkeys(ROLES, 1) | parse_mesh(text)
    needed = math.prod(sizes.values())
    devices = jax.devices()
    if needed > len(devices):
      raise ValueError(
        f"--mesh {text}: needs {needed} devices; JAX has {len(devices)}."
      )
    return cls(
      jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:needed],
      )
    )

  @property
  def axes(self) -> MeshAxes | None:
    """What modules take as `mesh_axes`."""
    return None if self.mesh is None else _AXES

  def context(self) -> contextlib.AbstractContextManager:
    """Returns the context in which all of the below is to be called."""
    if self.mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  def init(
    self,
    model: nn.Module,
    init_state: Callable[[jax.Array], Tree],
    key: jax.Array,
  ) -> Tree:
    """Returns `init_state(key)`, each device making its own part.

    Args:
      model: whose parameters the state holds; their logical axis names decide
        where they lie.
      init_state: makes the state, its parameters without names.
      key: the random key.
    """
    if self.mesh is None:
      return jax.jit(init_state)(key)
    named = jax.eval_shape(model.init, key, jnp.zeros((1, 8), jnp.int32))
    places = self.shardings(jax.eval_shape(init_state, key), named["params"])
    return jax.jit(init_state, out_shardings=places)(key)

  def shardings(self, state: Tree, named: Tree) -> Tree:
    """Returns where each leaf of a state lies.

    A leaf is a parameter, or a moment of one, if its path ends as that of the
    parameter. A matrix without logical axis names, such as one of attention, is
    split along its first dimension that the fsdp axes divide.

    Args:
      state: the state, or its shapes.
      named: the parameters, boxed with their logical axis names.
    """
    assert self.mesh is not None
    mesh, fsdp = self.mesh, self.mesh.shape["fsdp"]
    specs = nn.logical_to_mesh(nn.get_partition_spec(named), _AXES.rules)
    leaves, _ = jax.tree_util.tree_flatten_with_path(
      specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
    spec_of = {tuple(map(str, path)): spec for path, spec in leaves}

    def place(path, leaf):
      path = tuple(map(str, path))
      ends = (spec_of.get(path[i:]) for i in range(len(path)))
      spec = next((end for end in ends if end is not None), PartitionSpec())
      if not any(spec) and len(leaf.shape) > 1:
        spec = _first_divisible(leaf.shape, fsdp)
      return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)

  def jit_step(self, step: Callable, state: Tree) -> Callable:
    """Returns the step compiled; the state stays where it is."""
    if self.mesh is None:
      return jax.jit(step, donate_argnums=0)
    here = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(here, None))

  def check(self, batch_size: int, configs: Iterable[ModelConfig]) -> None:
    """Raises ValueError if the mesh cannot split the batch or a model."""
    if self.mesh is None:
      return
    sizes = self.mesh.shape
    shards = math.prod(sizes[name] for name in _AXES.tokens)
    if batch_size % shards:
      raise ValueError(
        f"--mesh: batch_size = {batch_size} is not a multiple of the {shards} "
        f"devices of {', '.join(_AXES.tokens)}, which split the batch."
      )
    for config in configs:
      if config.attention == "moa" and self.mesh.size > 1:
        raise ValueError(
          '--mesh: attention="moa" runs on one device; "mha" on several.'
        )
      if config.ffn != "moe":
        continue
      for name, size, role in (
        ("num_experts", config.num_experts, "expert"),
        ("d_model", config.d_model, "fsdp"),
        ("d_expert", config.d_expert, "tensor"),
      ):
        if size % sizes[role]:
          raise ValueError(
            f"--mesh: {name} = {size} is not a multiple of {role}="
            f"{sizes[role]}, which splits it."
          )

  def put(self, batch: np.ndarray) -> Any:
    """Returns a batch (B, ...) with its rows split over the devices."""
    if self.mesh is None:
      return batch
    return jax.device_put(
      batch, NamedSharding(self.mesh, PartitionSpec(_AXES.tokens))
    )

  def to_store(self, state: Tree) -> Tree:
    """Returns the state in the shapes of one device, split as it can be."""
    return state if self.mesh is None else jax.jit(join_gate)(state)

  def from_store(self, stored: Tree, like: Tree) -> Tree:
    """Returns a state that `to_store` made, on any mesh, lying as `like`."""
    if self.mesh is None:
      return stored
    here = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(split_gate, out_shardings=here)(stored)


def parse_mesh(text: str) -> dict[str, int]:
  """Returns the devices of each role of a text such as "data=2,expert=4".

  Raises:
    ValueError: if it is not such a text.

  Example:
    >>> parse_mesh("data=2,expert=4")
    {'data': 2, 'expert': 4}
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    role, _, size = part.strip().partition("=")
    if role not in ROLES or role in sizes or not size.isdigit() or size == "0":
      raise ValueError(
        f"--mesh {text}: {part!r} should be ROLE=DEVICES, each role once, of "
        f"{', '.join(ROLES)}; as in data=2,expert=4."
      )
    sizes[role] = int(size)
  return sizes


def _first_divisible(shape: tuple[int, ...], devices: int) -> PartitionSpec:
  """Returns the partition of the first dimension that `devices` divide."""
  for i, size in enumerate(shape):
    if devices > 1 and size % devices == 0:
      return PartitionSpec(*(None,) * i, "fsdp")
  return PartitionSpec()
