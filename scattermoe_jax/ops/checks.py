"""Every check of a user's arguments, at trace time, in words."""

import jax.numpy as jnp

from scattermoe_jax._compat import split_axes
from scattermoe_jax.routing import REMEDY, Routing, is_static_int


def check_arrays(
  function: str, routing: Routing, *, optional: dict | None = None, **arrays
) -> None:
  """Raises unless routing is one, and the rest whole arrays.

  Args:
    function: the name of the caller.
    routing: the routing.
    optional: arrays that may be None, by name.
    **arrays: those that may not.
  """
  if not isinstance(routing, Routing):
    raise TypeError(
      f"{function}: routing must be a Routing, got {_describe(routing)}; make "
      "one of the ids of each token's experts: route(expert_ids, num_experts)."
    )
  arrays |= {n: a for n, a in (optional or {}).items() if a is not None}
  for name, array in arrays.items():
    check_array(function, name, array)
  for name, array in (arrays | routing._asdict()).items():
    # An automatic axis is the compiler's affair, see `check_placement`.
    if axes := split_axes(array):
      raise NotImplementedError(
        f"{function}: {name} is split over {axes}, mesh axes of explicit "
        f"type, and no backend runs on parts; {REMEDY}."
      )


def check_array(function: str, name: str, array) -> None:
  """Raises TypeError unless it is an array."""
  if not is_array(array):
    raise TypeError(
      f"{function}: {name} must be an array, got {_describe(array)}; "
      "jnp.asarray makes one of numbers."
    )


def is_array(x) -> bool:
  """Returns whether x is an array, or stands for one while it is traced."""
  return hasattr(x, "shape") and hasattr(x, "dtype")


def check_ints(function: str, *, least: int = 1, **values) -> None:
  """Raises unless all are static ints and at least `least`."""
  for name, value in values.items():
    if not is_static_int(value):
      raise TypeError(
        f"{function}: {name} must be a static int, got {value!r}."
      )
    if value < least:
      raise ValueError(
        f"{function}: {name} must be at least {least}, got {value}."
      )


def check_one_of(function: str, name: str, value, known: tuple) -> None:
  """Raises ValueError unless the value is a known one."""
  if value not in known:
    raise ValueError(
      f"{function}: {name} must be one of {known}, got {value!r}."
    )


def check_rows(
  function: str, x, routing: Routing, *, grouped: bool, name: str = "x"
) -> None:
  """Raises ValueError unless x has T or S rows (S if grouped) of one width."""
  num_tokens, num_rows = routing.num_tokens, routing.num_rows
  rows = _check_matrix(function, name, x)
  if grouped and rows != num_rows:
    raise ValueError(
      f"{function}: {name} has {rows} rows; this routing needs S = {num_rows} "
      "(one per choice) for a grouped input."
    )
  if rows not in (num_tokens, num_rows):
    raise ValueError(
      f"{function}: {name} has {rows} rows; this routing needs T = "
      f"{num_tokens} (one per token) or S = {num_rows} (one per choice, or "
      "grouped_in=True)."
    )


def check_tokens(function: str, x, routing: Routing) -> None:
  """Raises ValueError unless x has T rows of one width."""
  rows = _check_matrix(function, "x", x)
  if rows != routing.num_tokens:
    raise ValueError(
      f"{function}: x has {rows} rows; this routing needs T = "
      f"{routing.num_tokens} (one per token)."
    )


def check_weights(
  function: str, name: str, w, routing: Routing, *, d_in: int | None = None
) -> None:
  """Raises ValueError unless w is (E, d_in, d_out)."""
  num_experts = check_matrices(function, name, w)
  if num_experts != routing.num_experts:
    raise ValueError(
      f"{function}: {name} has {num_experts} experts, the routing "
      f"{routing.num_experts}; make it by route(ids, "
      f"num_experts={num_experts})."
    )
  if d_in is not None and w.shape[1] != d_in:
    raise ValueError(
      f"{function}: {name} reads rows of width {w.shape[1]}, but got rows of "
      f"width {d_in}; {name} is (E, d_in, d_out)."
    )


def check_matrices(function: str, name: str, w) -> int:
  """Returns E; raises unless w is an array (E, d_in, d_out)."""
  check_array(function, name, w)
  if len(w.shape) != 3:
    raise ValueError(
      f"{function}: {name} must have shape (E, d_in, d_out), got {w.shape}."
    )
  return w.shape[0]


def check_bias(function: str, name: str, bias, w) -> None:
  """Raises ValueError unless bias is None or (E, d_out) for its w."""
  if bias is None:
    return
  expected = (jnp.shape(w)[0], jnp.shape(w)[2])
  if jnp.shape(bias) != expected:
    raise ValueError(
      f"{function}: {name} must have shape (E, d_out) = {expected}, got "
      f"{jnp.shape(bias)}."
    )


def check_gates(function: str, gates, routing: Routing) -> None:
  """Raises unless gates are (T, k) floats."""
  expected = (routing.num_tokens, routing.top_k)
  if jnp.shape(gates) != expected:
    raise ValueError(
      f"{function}: gates must have shape (T, k) = {expected}, got "
      f"{jnp.shape(gates)}."
    )
  check_floating(function, "gates", gates)


def check_dtypes(function: str, x, *, name: str = "x", **others) -> None:
  """Raises TypeError unless all are of one floating dtype; None is of any."""
  check_floating(function, name, x)
  dtype = jnp.result_type(x)
  for other, array in others.items():
    if array is not None and jnp.result_type(array) != dtype:
      raise TypeError(
        f"{function}: {other} is {jnp.result_type(array)} but {name} is "
        f"{dtype}; cast one of them (the Flax modules do, by their dtype "
        "field)."
      )


def check_floating(function: str, name: str, x) -> None:
  """Raises TypeError unless x is of a floating-point dtype."""
  dtype = jnp.result_type(x)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f"{function}: {name} must be of a floating-point dtype, got {dtype}."
    )


def check_mlp_widths(function: str, w_in, w_out, d: int) -> bool:
  """Returns whether the MLP is gated; raises ValueError if its widths disagree.

  w_in (E, d, n) or (E, d, 2n) and w_out (E, n, d) tell by themselves.
  """
  width, n = jnp.shape(w_in)[2], jnp.shape(w_out)[1]
  if width not in (n, 2 * n):
    raise ValueError(
      f"{function}: w_in has {width} columns and w_out reads n = {n}; w_in "
      f"must have n = {n} columns, or 2n = {2 * n} with a gate half first."
    )
  if jnp.shape(w_out)[2] != d:
    raise ValueError(
      f"{function}: w_out writes rows of width {jnp.shape(w_out)[2]}, but x "
      f"has width {d}."
    )
  return width == 2 * n


def check_num_chunks(function: str, num_chunks: int, d: int) -> None:
  """Raises unless num_chunks, an int, slices of equal width make up d."""
  check_ints(function, num_chunks=num_chunks)
  if d % num_chunks:
    raise ValueError(
      f"{function}: num_chunks must be a divisor of d = {d}, got {num_chunks}."
    )


def _check_matrix(function: str, name: str, x) -> int:
  if jnp.ndim(x) != 2:
    raise ValueError(
      f"{function}: {name} must have shape (rows, d), got {jnp.shape(x)}; "
      "flatten batch and sequence into rows."
    )
  return jnp.shape(x)[0]


def _describe(x) -> str:
  if x is None:
    return "None"
  if not is_array(x):
    return f"a {type(x).__name__}"
  return f"an array {x.dtype}{list(x.shape)}"
