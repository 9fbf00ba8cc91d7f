"""What an op was given, as its backend wants it."""

from typing import Any

import jax
import jax.numpy as jnp

from scattermoe_jax._compat import vary_over, varying_axes
from scattermoe_jax.routing import Routing


def as_operands(operands: Any, routing: Routing) -> tuple[Any, Routing]:
  """Returns the operands and the routing as arrays of JAX.

  A loop over tiles takes rows at a traced index, which NumPy's arrays have not.

  Args:
    operands: arrays that a gradient flows to, or None. They are marked as
      varying over the mesh axes that any of them or the routing varies over.
    routing: the routing.
  """
  operands, routing = jax.tree.map(jnp.asarray, (operands, routing))
  return vary_over(operands, varying_axes(operands, routing)), routing
