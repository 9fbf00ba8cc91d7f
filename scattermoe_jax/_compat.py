"""The JAX version, the device and the environment, as plain values.

The only file that asks what machine this is. Everything below it takes the
answer as an argument, so that a kernel for one device can be built, lowered and
interpreted on another.
"""

import importlib.util
import os
import re
import warnings
from typing import Any, NamedTuple

import jax

IMPLEMENTATION_VARIABLE = "SCATTERMOE_JAX_IMPLEMENTATION"
_TRITON = "The Pallas Triton backend is deprecated"

# Compute capability by a word of the name, for a device that is only described
# (an AbstractDevice) and not here to be asked.
_CAPABILITY_OF_KIND = {
  "T4": (7, 5),
  "T4G": (7, 5),
  "A100": (8, 0),
  "A800": (8, 0),
  "A30": (8, 0),
  "A10": (8, 6),
  "A10G": (8, 6),
  "L4": (8, 9),
  "L40": (8, 9),
  "L40S": (8, 9),
  "RTX 4090": (8, 9),
  "H20": (9, 0),
  "H100": (9, 0),
  "H200": (9, 0),
  "H800": (9, 0),
  "GH200": (9, 0),
  "B200": (10, 0),
  "GB200": (10, 0),
  "B300": (10, 3),
  "GB300": (10, 3),
  "RTX 5090": (12, 0),
  "RTX PRO 6000 Blackwell": (12, 0),
}


class Device(NamedTuple):
  """The device that a computation is traced for.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    kind: the vendor's name, such as "NVIDIA H200".
    capability: CUDA compute capability (major, minor); None if not a CUDA GPU.
    num_cores: streaming multiprocessors; None if not a GPU.
  """

  platform: str
  kind: str
  capability: tuple[int, int] | None = None
  num_cores: int | None = None

  def has_capability(self, major: int, minor: int) -> bool:
    """Returns whether it is a CUDA GPU of that compute capability or newer."""
    return self.capability is not None and self.capability >= (major, minor)


def current_device() -> Device:
  """Returns the device described by the abstract mesh, else JAX's default."""
  abstract = _abstract_device()
  if abstract is not None:
    return _described(abstract)
  device = jax.config.jax_default_device or jax.devices()[0]
  return _present(jax.devices(device)[0] if isinstance(device, str) else device)


def _described(abstract: Any) -> Device:
  kind = abstract.device_kind
  # Any mesh describes its devices, so that they are mostly here.
  for device in jax.devices():
    if device.device_kind == kind:
      return _present(device)
  # Before JAX 0.9 a described device has no platform, only a kind.
  platform = getattr(abstract, "platform", None)
  if platform is None:
    on_cpu = abstract.num_cores is None
    platform = "cpu" if on_cpu else "tpu" if "TPU" in kind else "gpu"
  if platform not in ("gpu", "cuda", "rocm"):
    return Device(platform, kind)
  capability = next(
    (
      capability
      for name, capability in _CAPABILITY_OF_KIND.items()
      if re.search(rf"\b{name}\b", kind)
    ),
    None,
  )
  return Device("gpu", kind, capability, abstract.num_cores)


def _present(device: Any) -> Device:
  if device.platform != "gpu":
    return Device(device.platform, device.device_kind)
  # AMD's are names, like gfx942.
  found = re.fullmatch(
    r"(\d+)(?:\.(\d+))?", str(getattr(device, "compute_capability", None))
  )
  capability = (int(found[1]), int(found[2] or 0)) if found else None
  return Device(
    "gpu", device.device_kind, capability, getattr(device, "core_count", None)
  )


def _abstract_device():
  get_mesh = getattr(jax.sharding, "get_abstract_mesh", None)
  return getattr(get_mesh(), "abstract_device", None) if get_mesh else None


def requested_implementation() -> str | None:
  """Returns SCATTERMOE_JAX_IMPLEMENTATION, the user's override, or None."""
  return os.environ.get(IMPLEMENTATION_VARIABLE) or None


def varying_axes(*arrays: Any) -> frozenset[str]:
  """Returns the mesh axes over which any of `arrays` differs by device.

  Empty outside `jax.shard_map`. None counts as an array that differs nowhere.
  """
  axes: frozenset[str] = frozenset()
  for array in jax.tree.leaves(arrays):
    aval = jax.typeof(array)
    # `vma` became `manual_axis_type.varying` in JAX 0.11.
    kind = getattr(aval, "manual_axis_type", None)
    axes |= getattr(aval, "vma", frozenset()) if kind is None else kind.varying
  return axes


def split_axes(array: Any) -> tuple[str, ...]:
  """Returns the mesh axes of explicit type that split `array`."""
  if not isinstance(array, jax.Array):
    return ()
  axes: tuple[str, ...] = ()
  for names in jax.typeof(array).sharding.spec:
    if names is not None:
      axes += names if isinstance(names, tuple) else (names,)
  return axes


def vary_over(tree: Any, axes: frozenset[str]) -> Any:
  """Returns `tree` marked as differing by device over the mesh axes `axes`.

  `jax.shard_map` checks that a loop carries, and a hand-written backward
  returns, what varies over the same axes as what went in. The values do not
  change; the transpose is the sum over those axes.
  """

  def mark(array):
    missing = tuple(sorted(axes - varying_axes(array)))
    if not missing:
      return array
    if hasattr(jax.lax, "pcast"):
      return jax.lax.pcast(array, missing, to="varying")
    pvary = getattr(jax.lax, "pvary")  # noqa: B009 - gone from newer JAX
    return pvary(array, missing)

  return jax.tree.map(mark, tree)


def output_struct(shape, dtype, *operands: Any) -> jax.ShapeDtypeStruct:
  """Returns the shape of a kernel's output, varying as its operands do.

  For `pl.pallas_call(out_shape=...)`, which inside `jax.shard_map` must say
  over which mesh axes the result differs.
  """
  axes = varying_axes(operands)
  if not axes:
    return jax.ShapeDtypeStruct(shape, dtype)
  if hasattr(jax.sharding, "ManualAxisType"):
    kind = jax.sharding.ManualAxisType(varying=axes)
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
  options: dict[str, Any] = {"vma": axes}  # before JAX 0.11
  return jax.ShapeDtypeStruct(shape, dtype, **options)


def has_pallas_triton() -> bool:
  """Returns whether this JAX still has its Pallas-Triton backend."""
  return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def silence_triton_deprecation() -> None:
  """Hides JAX's warning, at each lowering, that Pallas-Triton will go.

  It speaks to this library's authors; a user cannot act on it, and with
  warnings as errors it would stop a layer that works.
  """
  already = any(
    action == "ignore" and message is not None and message.pattern == _TRITON
    for action, message, *_ in warnings.filters
  )
  # Each new filter makes Python show again what it has shown once: only one.
  if not already:
    warnings.filterwarnings("ignore", _TRITON, DeprecationWarning)
