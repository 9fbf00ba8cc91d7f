"""A word said where the compiler would have to split a kernel over devices.

The compiler splits what it knows: it cannot look into a kernel, so it gathers
every operand and runs the whole kernel on every device, without saying so.
Where arrays lie is known only when a program is lowered. Hence a primitive
that does nothing but look there.
"""

import math
import warnings
from types import ModuleType

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from scattermoe_jax.routing import REMEDY, Routing

_placed_p = Primitive("smoe_placed")


def check_placement(
  function: str, backend: ModuleType, routing: Routing
) -> Routing:
  """Returns `routing`; complains if the op runs on several devices unwrapped.

  Args:
    function: the op, for the message.
    backend: what runs it. A kernel raises, "xla" warns: the compiler splits
      its loop, with collectives in every turn.
    routing: what the op will read.

  Raises:
    NotImplementedError: when the program is lowered.
  """
  implementation = backend.__name__.rpartition(".")[2]
  group_sizes = _placed_p.bind(
    routing.group_sizes, function=function, implementation=implementation
  )
  return routing._replace(group_sizes=group_sizes)


def _complain(function: str, implementation: str, num_devices: int) -> None:
  if num_devices <= 1:
    return
  if implementation != "xla":
    raise NotImplementedError(
      f"{function}: on {num_devices} devices, {implementation!r} would run "
      "whole on each of them, since the compiler cannot split a kernel; "
      f"{REMEDY}, or implementation='xla'."
    )
  warnings.warn(
    f"{function}: the compiler splits this over {num_devices} devices, with "
    f"collectives for every tile; {REMEDY}.",
    stacklevel=2,
  )


def _lower(context, group_sizes, *, function, implementation):
  place = context.module_context.axis_context
  mesh = getattr(place, "mesh", None)
  if mesh is None:
    num_devices = getattr(place, "num_devices", 1)
  else:  # inside shard_map, which may hold a part of the axes only
    free = set(mesh.axis_names) - set(place.manual_axes)
    num_devices = math.prod(mesh.shape[name] for name in free)
  _complain(function, implementation, num_devices)
  return [group_sizes]


def _run(group_sizes, *, function, implementation):
  _complain(function, implementation, len(group_sizes.sharding.device_set))
  return group_sizes


_placed_p.def_impl(_run)
_placed_p.def_abstract_eval(lambda group_sizes, **_: group_sizes)
ad.defjvp(_placed_p, None)  # integers have no tangent
batching.defvectorized(_placed_p)
mlir.register_lowering(_placed_p, _lower)
