"""Which axes of a mesh split what."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

Axes = tuple[str, ...]
Exchange = Literal["all_gather", "ragged_all_to_all"]
_ROLES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshAxes:
  """Which axes of a mesh split what in an expert layer.

  Attributes:
    data: axes that split tokens; each of their devices has all weights.
    fsdp: axes that split tokens and the d of every weight, gathered on use.
    expert: axes that split tokens and experts.
    tensor: axes that split d_expert; their devices share tokens.
    exchange: how tokens reach their experts. "all_gather": each device of the
      expert axes sees all their tokens. "ragged_all_to_all": a row goes only to
      the device of its expert, which moves fewer bytes where k is below the
      number of devices. Not on CPUs.
    capacity_factor: rows that a device of the expert axes takes, as a multiple
      of an even share; rows past it are dropped, those of the last devices
      first. None: all, and memory for all, whatever the routing. Only with
      exchange "ragged_all_to_all".

  Example:
    >>> MeshAxes(data="data", expert=("node", "gpu")).tokens
    ('data', 'node', 'gpu')
  """

  data: str | Axes = ()
  fsdp: str | Axes = ()
  expert: str | Axes = ()
  tensor: str | Axes = ()
  exchange: Exchange = "all_gather"
  capacity_factor: float | None = None

  def __post_init__(self):
    for role in _ROLES:
      names = getattr(self, role)
      names = (names,) if isinstance(names, str) else names
      if not isinstance(names, tuple | list) or not all(
        isinstance(name, str) for name in names
      ):
        raise TypeError(
          f"MeshAxes: {role} must be the name of a mesh axis or a tuple of "
          f"names, got {names!r}."
        )
      names = tuple(names)
      object.__setattr__(self, role, names)
    if len(set(self.names)) != len(self.names):
      raise ValueError(f"MeshAxes: an axis plays two roles in {self}.")
    if self.exchange not in ("all_gather", "ragged_all_to_all"):
      raise ValueError(
        "MeshAxes: exchange must be 'all_gather' or 'ragged_all_to_all', got "
        f"{self.exchange!r}."
      )
    if self.capacity_factor is None:
      return
    if self.exchange == "all_gather":
      raise ValueError(
        "MeshAxes: capacity_factor needs exchange='ragged_all_to_all'; an "
        "all_gather brings every token."
      )
    if not 0 < self.capacity_factor < math.inf:
      raise ValueError(
        "MeshAxes: capacity_factor must be above 0 and finite, got "
        f"{self.capacity_factor}; None takes all rows."
      )

  @property
  def tokens(self) -> Axes:
    """The axes that split tokens, in the order in which they do."""
    return (*self.data, *self.fsdp, *self.expert)

  @property
  def names(self) -> Axes:
    """All axes that play a role."""
    return (*self.tokens, *self.tensor)

  @property
  def rules(self) -> tuple[tuple[str, str | Axes | None], ...]:
    """What the modules' logical axis names mean, as Flax's rules say it."""
    return (
      ("batch", self.tokens or None),
      ("expert", self.expert or None),
      ("embed", self.fsdp or None),
      ("mlp", self.tensor or None),
    )

  def split(self, *roles: str | None) -> PartitionSpec:
    """Returns the partition of an array whose dimensions those roles split."""
    return PartitionSpec(
      *(getattr(self, role) or None if role else None for role in roles)
    )


def context_mesh(function: str, mesh: Any = None) -> Any:
  """Returns `mesh`, else that of `jax.set_mesh`, else None.

  Raises:
    TypeError: if `mesh` is not one.
  """
  if not isinstance(mesh, Mesh | AbstractMesh | None):
    raise TypeError(
      f"{function}: mesh must be a jax.sharding.Mesh, got a "
      f"{type(mesh).__name__}; jax.make_mesh makes one."
    )
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return None if mesh.empty else mesh


def check_axes(function: str, axes: Any, name: str = "axes") -> None:
  """Raises TypeError unless they are a `MeshAxes`."""
  if not isinstance(axes, MeshAxes):
    raise TypeError(
      f"{function}: {name} must be a MeshAxes, got a {type(axes).__name__}; "
      'MeshAxes(data="data"), for example, splits tokens over the axis "data".'
    )


def axes_of(function: str, axes: MeshAxes, mesh: Any) -> MeshAxes:
  """Returns `axes` without those that have a single device in `mesh`.

  Raises:
    TypeError: if `axes` is no `MeshAxes`.
    ValueError: if `mesh` lacks one of them, or `jax.shard_map` holds it.
  """
  check_axes(function, axes)
  if mesh is None:
    return MeshAxes(exchange=axes.exchange)
  for name in axes.names:
    if name not in mesh.shape:
      raise ValueError(
        f"{function}: the mesh has axes {tuple(mesh.axis_names)}, not {name!r} "
        f"of {axes}."
      )
    if name in manual_names(mesh):
      raise ValueError(
        f"{function}: {name!r} is an axis of a jax.shard_map around this call; "
        "inside one, call the ops themselves."
      )
  several: dict[str, Any] = {
    role: tuple(n for n in getattr(axes, role) if mesh.shape[n] > 1)
    for role in _ROLES
  }
  return dataclasses.replace(axes, **several)


def manual_names(mesh: Any) -> frozenset[str]:
  """Returns the axes of `mesh` that a `jax.shard_map` holds already."""
  return frozenset(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Manual
  )


def num_devices(names: str | Axes, mesh: Any) -> int:
  """Returns the devices along the axes `names`; 1 for none."""
  return math.prod(mesh.shape[name] for name in names)


def check_divides(
  function: str, what: str, size: int, names: str | Axes, mesh: Any
) -> None:
  """Raises ValueError unless the axes `names` divide `size`."""
  devices = num_devices(names, mesh)
  if size % devices:
    raise ValueError(
      f"{function}: {what} = {size} is not a multiple of the {devices} devices "
      f"of {names}, which split it."
    )


def run_on_mesh(
  local: Callable[..., Any],
  mesh: Any,
  in_specs: tuple[PartitionSpec, ...],
  out_specs: PartitionSpec,
  arguments: tuple[Any, ...],
) -> Any:
  """Returns `local` of each device's part of `arguments`, by `jax.shard_map`.

  Varying-axes checks are on. With explicit axes, arguments are resharded to
  `in_specs`; with automatic ones, the compiler does it.
  """
  free = frozenset(mesh.axis_names) - manual_names(mesh)
  if AxisType.Explicit in mesh.axis_types:
    arguments = tuple(
      None if a is None else jax.sharding.reshard(a, spec)
      for a, spec in zip(arguments, in_specs, strict=True)
    )
  mapped = jax.shard_map(
    local,
    mesh=None if jax.sharding.get_abstract_mesh() == mesh else mesh,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=free,
  )
  # Outside `jax.jit`, shard_map would compile each primitive by itself.
  return jax.jit(mapped)(*arguments)
