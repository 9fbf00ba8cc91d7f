"""What one device does before and after an op: its part of the collectives."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from scattermoe_jax._compat import vary_over
from scattermoe_jax.routing import at_least_int32
from scattermoe_jax.sharding.axes import Axes, MeshAxes

# The name of weights and tokens gathered from a mesh, for `jax.checkpoint`.
GATHERED = "smoe_gathered"


def own_parts_saveable(primitive: Any, *_: Any, **params: Any) -> bool:
  """A `jax.checkpoint` policy: keeps all but what came from other devices.

  Without it, the backward finds every gathered weight in memory, that is, the
  whole layer on every device. With it, the backward gathers them again: one
  more all-gather per weight, for memory that fsdp axes divide.

  JAX 0.7.2 raises an AssertionError of its own where a policy keeps what goes
  into `jax.shard_map` unchanged, as it does with expert or Explicit axes.

  Example:
    >>> layer = jax.checkpoint(jnp.sin, policy=own_parts_saveable)
  """
  # The operand of the name is as good to keep as the named, hence both.
  return primitive.name != "all_gather" and params.get("name") != GATHERED


def gather(array: Array, names: str | Axes, axis: int) -> Array:
  """Returns the parts of all devices along `names`, joined along `axis`.

  The transpose is a reduce-scatter.
  """
  if not names:
    return array
  gathered = lax.all_gather(array, names, axis=axis, tiled=True)
  return checkpoint_name(gathered, GATHERED)


def gather_weight(
  w: Array | None, axes: MeshAxes, axis: int | None
) -> Array | None:
  """Returns a weight as this device multiplies by it.

  Its gradient is reduce-scattered over the fsdp axes, and then what is left of
  it summed over the others along which all devices have the same weight.

  Args:
    w: as stored on this device; None for no weight.
    axes: the roles.
    axis: the dimension that the fsdp axes split; None for none.
  """
  if w is None:
    return None
  w = vary_over(w, frozenset(axes.names))
  return w if axis is None else gather(w, axes.fsdp, axis)


def first_only(bias: Array | None, names: Axes) -> Array | None:
  """Returns `bias` on the first device along `names` and zero on the others.

  For a bias added to partial sums, of which it must enter one.
  """
  if bias is None or not names:
    return bias
  return jnp.where(lax.axis_index(names) == 0, bias, jnp.zeros_like(bias))


def add_up(y: Array, names: Axes) -> Array:
  """Returns the sum of y over the devices along `names`."""
  return lax.psum(y, names) if names else y


def scatter_sum(y: Array, names: Axes) -> Array:
  """Returns this device's rows of the sum of y; the transpose gathers."""
  if not names:
    return y
  return lax.psum_scatter(y, names, scatter_dimension=0, tiled=True)


def first_expert(axes: MeshAxes, num_local: int) -> Any:
  """Returns the number of this device's first expert."""
  if not axes.expert:
    return 0
  return lax.axis_index(axes.expert) * num_local


def num_padded(num_tokens: int, num_devices: int) -> int:
  """Returns the tokens that devices share evenly: at least one each."""
  return max(1, -(-num_tokens // num_devices)) * num_devices


def pad_tokens(array: Array, num_rows: int, mesh: Any, fill: int = 0) -> Array:
  """Returns `array` with rows of `fill` added up to `num_rows`."""
  missing = num_rows - array.shape[0]
  if not missing:
    return array
  widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
  return jnp.pad(_whole(array, mesh), widths, constant_values=fill)


def unpad_tokens(array: Array, num_rows: int, mesh: Any) -> Array:
  """Returns the first `num_rows` rows."""
  if array.shape[0] == num_rows:
    return array
  if jax.sharding.AxisType.Explicit in mesh.axis_types:
    return _whole(array, mesh)[:num_rows]
  return _whole(array[:num_rows], mesh)


def _whole(array: Array, mesh: Any) -> Array:
  """Returns `array`, and takes its gradient, with all rows on each device.

  For rows that the devices do not divide. Explicit axes split evenly or not at
  all. For the others, the partitioner of JAX 0.7 splits them unevenly, and a
  reshape of that by the caller, or by the transpose of the caller's reshape,
  returns other rows.
  """
  spec = jax.sharding.PartitionSpec()
  if jax.sharding.AxisType.Explicit in mesh.axis_types:
    return jax.sharding.reshard(array, spec)
  whole = jax.sharding.NamedSharding(mesh, spec)
  # Outside `jax.jit` only what lies on the mesh already can be constrained. Of
  # one function, so that each call is not compiled anew.
  return jax.jit(lax.with_sharding_constraint, static_argnums=1)(array, whole)


def here_or_nowhere(
  expert_ids: Int[Array, "T k"], num_experts: int
) -> Int[Array, "T k"]:
  """Returns the ids as int32, with -1 for every id outside [0, E)."""
  expert_ids = at_least_int32(expert_ids)
  in_range = (expert_ids >= 0) & (expert_ids < num_experts)
  return jnp.where(in_range, expert_ids.astype(jnp.int32), -1)
