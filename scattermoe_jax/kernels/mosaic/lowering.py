"""Which activations Mosaic GPU lowers inside a product."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Of what is elementwise, and lowers for registers of the tensor core's results
# (JAX 0.11.2 and 0.12). Not there: erf, pow, log1p, expm1, and the add_any and
# custom_jvp_call that `jax.jvp` leaves behind.
_LOWERED = frozenset(
  "add sub mul div neg max min clamp abs sign square one_minus_square"
  " integer_pow sqrt rsqrt exp exp2 log logistic tanh sin cos"
  " eq gt ge lt le and select_n broadcast_in_dim convert_element_type".split()
)


def lowers(value_and_slope: Callable) -> bool:
  """Returns whether an activation is made of what Mosaic GPU lowers.

  A user's own may be made of anything.
  """
  block = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  return _primitives(jax.make_jaxpr(value_and_slope)(block).jaxpr) <= _LOWERED


def _primitives(jaxpr: Any) -> set[str]:
  """Returns the names of a jaxpr's primitives, and of jitted ones within."""
  names = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("jit", "pjit"):
      names |= _primitives(equation.params["jaxpr"].jaxpr)
    else:
      names.add(equation.primitive.name)
  return names
