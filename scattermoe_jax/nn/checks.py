"""Every check of a module's fields and arrays, at trace time, in words.

What the ops check of the same arrays is left to them, see `ops/checks.py`.
"""

from typing import Any

import jax.numpy as jnp

from scattermoe_jax.ops.checks import check_array
from scattermoe_jax.ops.checks import check_ints as check_ints
from scattermoe_jax.ops.checks import check_one_of as check_one_of
from scattermoe_jax.routing import Routing


def check_tokens(
  module: str, x: Any, dims: tuple[str, ...] = (), advice: str = ""
) -> None:
  """Raises unless x is a floating array.

  Args:
    module: whose x it is.
    x: tokens.
    dims: what the dimensions of x are called, if they must be so many.
    advice: how to come by them.
  """
  check_array(module, "x", x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f"{module}: x must be floating, got {x.dtype}; embed token ids first."
    )
  if dims and len(x.shape) != len(dims):
    raise ValueError(
      f"{module}: x must be ({', '.join(dims)}), got {x.shape}; {advice}."
    )


def check_choices(module: str, x: Any, gates: Any, expert_ids: Any) -> None:
  """Raises unless gates and expert_ids have a row for each token of x."""
  check_array(module, "gates", gates)
  batch = x.shape[:-1]
  if not gates.shape or gates.shape[:-1] != batch:
    expected = ", ".join([*map(str, batch), "k"])
    raise ValueError(
      f"{module}: gates must have shape ({expected}), one row per token of x, "
      f"got {gates.shape}."
    )
  if isinstance(expert_ids, Routing):
    return
  check_array(module, "expert_ids", expert_ids)
  if expert_ids.shape != gates.shape:
    raise ValueError(
      f"{module}: expert_ids must have the shape of gates, {gates.shape}, got "
      f"{expert_ids.shape}."
    )


def check_mask(function: str, mask: Any, shape: tuple[int, ...]) -> None:
  """Raises unless a mask is None or bool and of the shape of the tokens."""
  if mask is None:
    return
  check_array(function, "mask", mask)
  if mask.dtype != jnp.bool_:
    raise TypeError(
      f"{function}: mask must be bool, got {mask.dtype}; it is True where the "
      "token is real: mask != 0 of ones and zeros, mask == 0 of an additive "
      "mask."
    )
  if mask.shape != shape:
    raise ValueError(
      f"{function}: mask must have shape {shape}, one entry per token, got "
      f"{mask.shape}."
    )
