"""Every check of a module's fields and arrays, at trace time, in words.

What the ops check of the same arrays is left to them, see `ops/checks.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from scattermoe_jax.ops.checks import check_array as check_array
from scattermoe_jax.ops.checks import check_floating
from scattermoe_jax.ops.checks import check_ints as check_ints
from scattermoe_jax.ops.checks import check_one_of as check_one_of
from scattermoe_jax.routing import Routing
from scattermoe_jax.sharding.axes import check_axes


def check_tokens(
  module: str, x: Any, dims: tuple[str, ...] = (), advice: str = ""
) -> None:
  """Raises unless x is a floating array of tokens with a feature at least.

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
  if dims:
    check_shape(module, "x", x, dims, advice)
  if not x.shape or not x.shape[-1]:
    raise ValueError(
      f"{module}: x must have shape (..., d), d at least 1, got {x.shape}."
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


def check_routing(module: str, routing: Routing, num_experts: int) -> None:
  """Raises unless a routing is of as many experts as the module has."""
  if routing.num_experts != num_experts:
    raise ValueError(
      f"{module}: expert_ids is a Routing of {routing.num_experts} experts, "
      f"but num_experts = {num_experts}; route to the experts there are: "
      f"route(ids, {num_experts})."
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


def check_shape(
  function: str,
  name: str,
  array: Any,
  dims: tuple[int | str, ...],
  advice: str = "",
) -> None:
  """Raises unless it is an array of that shape.

  Args:
    function: whose argument it is.
    name: of the argument.
    array: the argument.
    dims: sizes, or what dimensions of any size are called.
    advice: how to come by them.
  """
  check_array(function, name, array)
  right = len(array.shape) == len(dims) and all(
    isinstance(dim, str) or dim == size
    for dim, size in zip(dims, array.shape, strict=True)
  )
  if not right:
    expected = ", ".join(map(str, dims)) + ("," if len(dims) == 1 else "")
    raise ValueError(
      f"{function}: {name} must have shape ({expected}), got {array.shape}"
      + (f"; {advice}." if advice else ".")
    )


def check_ids(
  function: str, shape: tuple[int | str, ...], **arrays: Any
) -> None:
  """Raises unless all are None, or integers of that shape."""
  for name, array in arrays.items():
    if array is None:
      continue
    advice = "jnp.broadcast_to repeats what all sequences share"
    check_shape(function, name, array, shape, advice)
    if not jnp.issubdtype(array.dtype, jnp.integer):
      raise TypeError(
        f"{function}: {name} must be integers, got {array.dtype}; cast "
        "them, a mask as well: astype(jnp.int32)."
      )


def check_expert_rows(function: str, name: str, rows: Any) -> None:
  """Raises unless they are floats (T, E)."""
  advice = f"flatten batch and sequence: {name}.reshape(-1, E)"
  check_shape(function, name, rows, ("T", "E"), advice)
  check_floating(function, name, rows)


def check_top_k(function: str, logits: Any, k: int) -> None:
  """Raises unless logits are (T, E) and k lies in [1, E]."""
  check_expert_rows(function, "logits", logits)
  check_ints(function, k=k)
  check_at_most(function, "k", k, "E", logits.shape[1])


def check_at_most(
  function: str, name: str, value: int, among: str, most: int
) -> None:
  """Raises ValueError if one size is above another."""
  if value > most:
    raise ValueError(
      f"{function}: {name} must lie in [1, {among} = {most}], got {value}."
    )


def check_dtype_fields(function: str, **dtypes: Any) -> None:
  """Raises TypeError unless all are None or floating."""
  for name, dtype in dtypes.items():
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError(
        f"{function}: {name} must be floating, got {jnp.dtype(dtype)}."
      )


def check_mesh_axes(function: str, mesh_axes: Any) -> None:
  """Raises TypeError unless it is None or says which axes split what."""
  if mesh_axes is not None:
    check_axes(function, mesh_axes, "mesh_axes")


def check_window(function: str, sliding_window: Any) -> None:
  """Raises unless it is None, traced, or how many tokens one sees."""
  if sliding_window is not None and not _is_traced(sliding_window):
    check_ints(function, sliding_window=sliding_window)


def check_positive(function: str, **values: Any) -> None:
  """Raises unless all are static and above 0."""
  for name, value in values.items():
    _check_known(function, name, value)
    if not value > 0:
      raise ValueError(f"{function}: {name} must be above 0, got {value}.")


def check_not_negative(function: str, **values: Any) -> None:
  """Raises unless all are static and at least 0."""
  for name, value in values.items():
    _check_known(function, name, value)
    if not value >= 0:
      raise ValueError(f"{function}: {name} must be at least 0, got {value}.")


def check_gate_axis(function: str, w_gate_up: Any, *, is_split: bool) -> None:
  """Raises ValueError if parameters have a gate axis, or lack it, wrongly.

  Args:
    function: the module.
    w_gate_up: its parameter, None where there is none yet.
    is_split: whether it should have an axis for gate and up.
  """
  shape = jnp.shape(meta.unbox(w_gate_up)) if w_gate_up is not None else ()
  if len(shape) == (3 if is_split else 4):
    made, view = ("without", "split") if is_split else ("with", "join")
    raise ValueError(
      f"{function}: w_gate_up has the shape {shape} of one made {made} "
      f"mesh_axes; pass scattermoe_jax.sharding.{view}_gate(params)."
    )


def check_static(function: str, name: str, value: Any) -> None:
  """Raises TypeError if a switch is known at run time only."""
  if _is_traced(value):
    raise TypeError(
      f"{function}: {name} must be a static bool, got a traced one; "
      "nn.remat traces what it is given, so: nn.remat(lambda module, x: "
      f"module(x, {name}=False))(module, x)."
    )


def _check_known(function: str, name: str, value: Any) -> None:
  if _is_traced(value):
    raise TypeError(f"{function}: {name} must be static, got a traced one.")


def _is_traced(value: Any) -> bool:
  return isinstance(value, jax.core.Tracer)
