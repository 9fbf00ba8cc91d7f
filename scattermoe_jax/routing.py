"""Which row belongs to which token: the ids that every op shares.

A token t chooses k experts. Its choices are S = T * k rows, in two orders:

  scattered   row s = t * k + j is choice j of token t       (token order)
  grouped     rows sorted by expert, ties in token order     (expert order)

  token            0     1     2                 expert   0     1        2
  expert_ids     (2,0) (1,2) (0,1)                      +-----+-----+-----+
  scattered row   0 1   2 3   4 5        grouped row    | 0 1 | 2 3 | 4 5 |
                                         scattered_ids  | 1 4 | 2 5 | 0 3 |

Only ids are sorted; the rows themselves stay where they are.
Source: ScatterMoE (Tan et al., 2024, arXiv 2403.08245), section 3.
"""

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Integer

from scattermoe_jax._compat import (
  current_device,
  split_axes,
  vary_over,
  varying_axes,
)

# What to do with arrays that lie on several devices.
REMEDY = (
  "use scattermoe_jax.sharding (Flax modules: mesh_axes=...), or call it "
  "inside jax.shard_map (MixtureOfAttention, which has no mesh_axes, too)"
)


class Routing(NamedTuple):
  """The ids of one routing; made once by `route`, passed whole to every op.

  A choice whose expert id lies outside [0, E) is 'not here': a padding token,
  or an expert of another device. Its row sorts last, belongs to no group, costs
  no product and contributes zero, forward and backward.

  Attributes:
    expert_ids: expert of each grouped row, ascending; E for 'not here'.
    scattered_ids: scattered row of each grouped row.
    grouped_ids: grouped row of choice j of token t, the inverse of the above.
    group_sizes: rows of each expert; their sum is below S if some are not here.
  """

  expert_ids: Int[Array, " S"]
  scattered_ids: Int[Array, " S"]
  grouped_ids: Int[Array, "T k"]
  group_sizes: Int[Array, " E"]

  @property
  def num_tokens(self) -> int:
    """T, the tokens that were routed."""
    return self.grouped_ids.shape[0]

  @property
  def top_k(self) -> int:
    """k, the experts of each token."""
    return self.grouped_ids.shape[1]

  @property
  def num_rows(self) -> int:
    """S = T * k, the routed rows."""
    return self.expert_ids.shape[0]

  @property
  def num_experts(self) -> int:
    """E, the experts."""
    return self.group_sizes.shape[0]


def route(expert_ids: Integer[Array, "T k"], num_experts: int) -> Routing:
  """Returns the routing of T tokens to k experts each, by a stable sort.

  Args:
    expert_ids: the experts of each token; outside [0, E) for 'not here', so
      that ids counted from 1 lose an expert without a word. Where none is
      meant, `checkify.check(jnp.all((ids >= 0) & (ids < E)), "ids")` finds
      them in what `jax.experimental.checkify.checkify` wraps, `jit` outside.
    num_experts: E.

  Returns:
    The `Routing`; the same ids give the same bits.

  Raises:
    TypeError: if `expert_ids` are no array of integers, or `num_experts` is
      traced or no integer.
    ValueError: if `expert_ids` is not (T, k) in plain numbers, or k does not
      lie in [1, E].
    NotImplementedError: if explicit mesh axes split `expert_ids`.

  Example:
    >>> route(jnp.array([[2, 0], [1, 2], [0, 1]]), 3).scattered_ids.tolist()
    [1, 4, 2, 5, 0, 3]
  """
  _check_expert_ids("route", expert_ids, num_experts)
  if expert_ids.shape[1] > num_experts:
    raise ValueError(
      f"route: k = {expert_ids.shape[1]} experts per token, but there are only "
      f"num_experts = {num_experts}."
    )
  return _route(expert_ids, num_experts)


def route_local(
  expert_ids: Integer[Array, "T k"],
  first_expert: int | Int[Array, ""],
  num_experts: int,
) -> Routing:
  """Returns the routing to the experts of one device; others are 'not here'.

  Args:
    expert_ids: the experts of each token, numbered over all devices.
    first_expert: the first expert of this device.
    num_experts: experts of this device; k may be above it.

  Raises:
    TypeError, ValueError, NotImplementedError: as `route`, but for k.

  Example:
    >>> route_local(jnp.array([[2, 0], [1, 3]]), 2, 2).group_sizes.tolist()
    [1, 1]
  """
  _check_expert_ids("route_local", expert_ids, num_experts)
  expert_ids = at_least_int32(expert_ids)
  # In the dtype of the ids: beyond int32 they are experts of nobody.
  local_ids = expert_ids - jnp.asarray(first_expert).astype(expert_ids.dtype)
  return _route(local_ids, num_experts)


def at_least_int32(ids: Integer[Array, "*n"]) -> Integer[Array, "*n"]:
  """Returns the ids, narrow ones as int32: E may not fit their dtype."""
  return ids.astype(jnp.int32) if jnp.iinfo(ids.dtype).bits < 32 else ids


def _route(expert_ids: Integer[Array, "T k"], num_experts: int) -> Routing:
  num_rows = expert_ids.size
  expert_ids = at_least_int32(expert_ids)
  in_range = (expert_ids >= 0) & (expert_ids < num_experts)
  flat_ids = jnp.where(in_range, expert_ids, num_experts).reshape(num_rows)
  flat_ids = flat_ids.astype(jnp.int32)
  small = num_rows <= _MAX_COUNTED_ROWS and num_experts <= _MAX_COUNTED_ROWS
  on_gpu = current_device().platform == "gpu"
  sort = _counting_sort if on_gpu and small else _comparison_sort
  grouped_ids, scattered_ids, sizes = sort(flat_ids, num_experts)
  routing = Routing(
    expert_ids=take_rows(flat_ids, scattered_ids),
    scattered_ids=scattered_ids,
    grouped_ids=grouped_ids.reshape(expert_ids.shape),
    group_sizes=sizes,
  )
  # Else XLA counts again in every kernel that reads a count: a decode step of
  # one token takes 77 us instead of 66 on an H200.
  return (
    lax.optimization_barrier(routing) if sort is _counting_sort else routing
  )


def group_offsets(routing: Routing) -> Int[Array, " offsets"]:
  """Returns the first grouped row of each expert, then the end of the last."""
  return jnp.concatenate(
    [jnp.zeros((1,), jnp.int32), jnp.cumsum(routing.group_sizes)]
  ).astype(jnp.int32)


def input_rows(
  routing: Routing, num_input_rows: int, *, grouped: bool
) -> Int[Array, " S"]:
  """Returns the row of x that each grouped row reads.

  Args:
    routing: the routing.
    num_input_rows: rows of x: S, or T where the k choices of a token share one.
    grouped: whether x is in grouped order (S rows then).
  """
  if grouped:
    return jnp.arange(routing.num_rows, dtype=jnp.int32)
  if num_input_rows == routing.num_rows:
    return routing.scattered_ids
  return routing.scattered_ids // jnp.int32(routing.top_k)


def take_rows(rows: Array, ids: Int[Array, " *ids"]) -> Array:
  """Returns rows[ids], for ids of a routing.

  Those are never negative nor out of bounds. Indexing would allow for both, and
  XLA hold what it makes of the ids beside them.
  """
  return rows.at[ids].get(mode="promise_in_bounds", wrap_negative_indices=False)


def is_static_int(value: Any) -> bool:
  """Returns whether `value` is an integer that is known while tracing."""
  if isinstance(value, bool):
    return False
  try:
    operator.index(value)
  except TypeError:  # a traced value's error is one
    return False
  return True


# What either sort returns: grouped_ids (S), scattered_ids (S), group_sizes (E).
_Sorted = tuple[Int[Array, " S"], Int[Array, " S"], Int[Array, " E"]]


_KEYS = (jnp.uint8, jnp.uint16, jnp.int32)


def _comparison_sort(flat_ids: Int[Array, " S"], num_experts: int) -> _Sorted:
  """Sorts by the library's stable sort."""
  rows = jnp.arange(flat_ids.shape[0], dtype=jnp.int32)
  # A radix sort passes over the data once for each byte of its key.
  key = next(t for t in _KEYS if num_experts <= jnp.iinfo(t).max)
  flat_ids = flat_ids.astype(key)
  sorted_ids, scattered_ids = lax.sort(
    (flat_ids, vary_over(rows, varying_axes(flat_ids))),
    num_keys=1,
    is_stable=True,
  )
  experts = jnp.arange(num_experts + 1, dtype=key)
  experts = vary_over(experts, varying_axes(sorted_ids))
  offsets = jnp.searchsorted(sorted_ids, experts, method="scan_unrolled")
  sizes = jnp.diff(offsets).astype(jnp.int32)
  return _inverse(scattered_ids), scattered_ids, sizes


# Every row meets every other. An H200 sorts 4096 ids so in 4 us, by the
# library's sort in 20 us; 196608 ids, in blocks, in no less than the library.
_MAX_COUNTED_ROWS = 4096


def _counting_sort(flat_ids: Int[Array, " S"], num_experts: int) -> _Sorted:
  """Sorts by counting the rows before each row: two kernels on a GPU."""
  rows = jnp.arange(flat_ids.shape[0], dtype=jnp.int32)
  here, other = flat_ids[:, None], flat_ids[None, :]
  earlier = rows[None, :] < rows[:, None]
  before = (other < here) | ((other == here) & earlier)
  grouped_ids = jnp.sum(before, axis=1, dtype=jnp.int32)
  experts = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
  sizes = jnp.sum(flat_ids[None, :] == experts, axis=1, dtype=jnp.int32)
  return grouped_ids, _inverse(grouped_ids), sizes


def _inverse(permutation: Int[Array, " S"]) -> Int[Array, " S"]:
  rows = jnp.arange(permutation.shape[0], dtype=jnp.int32)
  # Every place is written.
  inverse = lax.empty(rows.shape, rows.dtype)
  inverse = vary_over(inverse, varying_axes(permutation))
  return inverse.at[permutation].set(
    rows,
    mode="promise_in_bounds",
    unique_indices=True,
    wrap_negative_indices=False,
  )


def _check_expert_ids(function: str, expert_ids, num_experts: int) -> None:
  if not is_static_int(num_experts):
    raise TypeError(
      f"{function}: num_experts must be a static int, a shape depends on it; "
      f"got {num_experts!r}. For jax.jit: functools.partial({function}, "
      "num_experts=8), or static_argnums=1."
    )
  if not hasattr(expert_ids, "dtype"):
    raise TypeError(
      f"{function}: expert_ids must be an array of integers, got a "
      f"{type(expert_ids).__name__}; jnp.asarray makes one."
    )
  if axes := split_axes(expert_ids):
    raise NotImplementedError(
      f"{function}: expert_ids is split over {axes}, mesh axes of explicit "
      f"type, and a routing is of all tokens; {REMEDY}."
    )
  dtype = jnp.result_type(expert_ids)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(
      f"{function}: expert_ids must be integers, got {dtype}; pass the ids "
      "that jax.lax.top_k returns."
    )
  if jnp.ndim(expert_ids) != 2:
    raise ValueError(
      f"{function}: expert_ids must have shape (T, k), got "
      f"{jnp.shape(expert_ids)}; flatten batch and sequence into T."
    )
  if not all(map(is_static_int, expert_ids.shape)):
    raise ValueError(
      f"{function}: expert_ids has a symbolic shape, {expert_ids.shape}, and "
      "the tiles of a product depend on T; export one program for each batch "
      "size."
    )
  if num_experts < 1:
    raise ValueError(
      f"{function}: num_experts must be at least 1, got {num_experts}."
    )
  if not expert_ids.shape[1]:
    raise ValueError(
      f"{function}: expert_ids has shape {expert_ids.shape}; k must be at "
      "least 1."
    )
