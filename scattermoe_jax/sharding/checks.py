"""What the ops check of a routing and its arrays, before a mesh splits them.

Padded to a multiple of the devices, too few rows would be taken for tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from scattermoe_jax.ops import checks
from scattermoe_jax.routing import Routing, route


def checked_routing(
  function: str,
  expert_ids: Any,
  num_experts: int,
  *,
  optional: dict[str, Any],
  **arrays: Any,
) -> Routing:
  """Returns the routing of all tokens, its shapes alone, for the ops' checks.

  Args:
    function: the name of the caller.
    expert_ids: the experts of each token.
    num_experts: E.
    optional: arrays that may be None, by name.
    **arrays: those that may not.

  Raises:
    TypeError: if one is no array, or `expert_ids` are not of integers.
    ValueError: if `expert_ids` are not (T, k), or k is above E.
  """
  if isinstance(expert_ids, Routing):
    raise TypeError(
      f"{function}: expert_ids must be an array of integers, got a Routing; "
      "pass the (T, k) ids that it was made of: each device makes its own."
    )
  make = functools.partial(route, num_experts=num_experts)
  routing = jax.eval_shape(make, _shape(expert_ids))
  given, others = (
    {name: _shape(array) for name, array in several.items()}
    for several in (arrays, optional)
  )
  checks.check_arrays(function, routing, optional=others, **given)
  return routing


def _shape(array: Any) -> Any:
  """Returns an array's shape and dtype, whatever splits it; else what came."""
  if not checks.is_array(array):
    return array
  return jax.ShapeDtypeStruct(array.shape, jnp.result_type(array))
