"""`smoe_mlp` of what a mesh holds in parts."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scattermoe_jax import ops
from scattermoe_jax._compat import current_device, vary_over
from scattermoe_jax.ops import checks
from scattermoe_jax.ops.rows import repeat_tokens, sum_rows
from scattermoe_jax.ops.transfer import plan_transfer, send_rows
from scattermoe_jax.routing import route, route_local
from scattermoe_jax.sharding import local
from scattermoe_jax.sharding.axes import (
  MeshAxes,
  axes_of,
  check_divides,
  context_mesh,
  num_devices,
  run_on_mesh,
)
from scattermoe_jax.sharding.checks import checked_routing


def smoe_mlp(
  x: Float[Array, "T d"],
  gates: Float[Array, "T k"],
  expert_ids: Int[Array, "T k"],
  w_in: Float[Array, "E d ..."],
  w_out: Float[Array, "E n d"],
  *,
  axes: MeshAxes,
  bias_in: Float[Array, "E ..."] | None = None,
  bias_out: Float[Array, "E d"] | None = None,
  mesh: Any = None,
  **options: Any,
) -> Float[Array, "T d"]:
  """Returns `ops.smoe_mlp` of what a mesh holds in parts.

  Args:
    x: tokens.
    gates: the weight of each choice.
    expert_ids: the experts of each token; outside [0, E) for 'not here'.
    w_in: (E, d, n), or (E, d, 2, n) with the gate half first. (E, d, 2n) only
      where no axis splits n: a block of its columns has no matching halves.
    w_out: (E, n, d).
    axes: which axes of the mesh split what. Arrays that are not split so yet
      are resharded.
    bias_in: (E, n), (E, 2, n) or (E, 2n), as `w_in`.
    bias_out: (E, d).
    mesh: the mesh; that of `jax.set_mesh` if None. Without either, this is
      `route` and `ops.smoe_mlp`.
    **options: of `ops.smoe_mlp`: activation, num_chunks, precision,
      implementation.

  Returns:
    (T, d), its tokens split over `axes.tokens`. A T that their devices do not
    divide is padded with tokens that are 'not here', on every device.

  Raises:
    ValueError: if shapes disagree, the mesh lacks an axis, or an axis does not
      divide what it splits.
    TypeError: if dtypes disagree, or what should be an array, axes or a mesh
      is not one.
    NotImplementedError: if the platform lacks `axes.exchange`.
  """
  mesh = context_mesh("smoe_mlp", mesh)
  axes = axes_of("smoe_mlp", axes, mesh)
  num_experts = checks.check_matrices("smoe_mlp", "w_out", w_out)
  routing = checked_routing(
    "smoe_mlp",
    expert_ids,
    num_experts,
    x=x,
    gates=gates,
    w_in=w_in,
    w_out=w_out,
    optional={"bias_in": bias_in, "bias_out": bias_out},
  )
  checks.check_tokens("smoe_mlp", x, routing)
  checks.check_gates("smoe_mlp", gates, routing)
  checks.check_weights("smoe_mlp", "w_out", w_out, routing)
  _check_gate_axis("w_in", w_in, 2)
  _check_gate_axis("bias_in", bias_in, 1)
  # Before they are split: what is left of them on a device says less.
  checks.check_bias("smoe_mlp", "bias_out", bias_out, w_out)
  for name, array in (("w_in", w_in), ("bias_in", bias_in)):
    if array is not None and array.shape[0] != num_experts:
      raise ValueError(
        f"smoe_mlp: {name} {array.shape} is of {array.shape[0]} experts, w_out "
        f"{w_out.shape} of {num_experts}."
      )
  num_tokens = routing.num_tokens
  run = functools.partial(_local, axes=axes, options=options)
  weights = (w_in, w_out, bias_in, bias_out)
  expert_ids = local.here_or_nowhere(expert_ids, num_experts)
  if not axes.names:
    return run(x, gates, expert_ids, *weights)

  check_divides("smoe_mlp", "num_experts", num_experts, axes.expert, mesh)
  check_divides("smoe_mlp", "d", x.shape[1], axes.fsdp, mesh)
  check_divides("smoe_mlp", "d_expert", w_out.shape[1], axes.tensor, mesh)
  _check_gate(w_in, w_out, axes)
  _check_exchange(axes)
  shards = num_devices(axes.tokens, mesh)
  padded = local.num_padded(num_tokens, shards)
  gate_axis = (None,) * (w_in.ndim - 3)
  tokens = axes.split("tokens", None)
  y = run_on_mesh(
    run,
    mesh,
    in_specs=(
      tokens,
      tokens,
      tokens,
      axes.split("expert", "fsdp", *gate_axis, "tensor"),
      axes.split("expert", "tensor", "fsdp"),
      axes.split("expert", *gate_axis, "tensor"),
      axes.split("expert", "fsdp"),
    ),
    out_specs=tokens,
    arguments=(
      local.pad_tokens(x, padded, mesh),
      local.pad_tokens(gates, padded, mesh),
      local.pad_tokens(expert_ids, padded, mesh, fill=-1),
      *weights,
    ),
  )
  return local.unpad_tokens(y, num_tokens, mesh)


def _local(
  x, gates, expert_ids, w_in, w_out, bias_in, bias_out, *, axes, options
):
  """Runs the op on one device, between the collectives of its axes."""
  w_in = local.gather_weight(w_in.reshape(*w_in.shape[:2], -1), axes, 1)
  w_out = local.gather_weight(w_out, axes, 2)
  bias_in = local.gather_weight(bias_in, axes, None)
  bias_out = local.gather_weight(bias_out, axes, 1)
  if bias_in is not None:
    bias_in = bias_in.reshape(bias_in.shape[0], -1)
  # What every device of the tensor axes has alike: the transpose sums dx and
  # dgates over them.
  x, gates = vary_over((x, gates), frozenset(axes.names))

  def experts(x, gates, expert_ids):
    """Returns what this device's experts add to the sum of each token."""
    first = local.first_expert(axes, w_out.shape[0])
    return ops.smoe_mlp(
      x,
      gates,
      route_local(expert_ids, first, w_out.shape[0]),
      w_in,
      w_out,
      bias_in=bias_in,
      bias_out=local.first_only(bias_out, axes.tensor),
      **options,
    )

  if axes.expert and axes.exchange == "ragged_all_to_all":
    y = _visit(experts, x, gates, expert_ids, axes, w_out.shape[0])
  else:
    x, gates, expert_ids = (
      local.gather(a, axes.expert, 0) for a in (x, gates, expert_ids)
    )
    y = local.scatter_sum(experts(x, gates, expert_ids), axes.expert)
  return local.add_up(y, axes.tensor)


def _visit(experts, x, gates, expert_ids, axes, num_local):
  """Sends each row to the device of its expert, and brings its result back.

  The gate goes along: the results come back weighted, so that none of them is
  kept for the gradient of its gate.
  """
  axis_name = axes.expert
  devices = jax.lax.axis_size(axis_name)
  routing = route(expert_ids, devices * num_local)
  rows_to = routing.group_sizes.reshape(devices, num_local).sum(axis=1)
  most = devices * routing.num_rows
  if axes.capacity_factor is not None:
    most = min(most, math.ceil(axes.capacity_factor * routing.num_rows))
  forth, back = plan_transfer(rows_to.astype(jnp.int32), most, axis_name)

  def send(rows):
    return send_rows(rows, forth, back, most, axis_name)

  row_gates = (
    gates.reshape(-1).at[routing.scattered_ids].get(unique_indices=True)
  )
  # One more than the id, so that a row that nobody sent is expert -1.
  row_ids = send(routing.expert_ids + 1) - 1
  y = experts(
    send(repeat_tokens(x, routing)),
    send(row_gates)[:, None],
    row_ids[:, None],
  )
  return sum_rows(
    send_rows(y, back, forth, routing.num_rows, axis_name), routing
  )


def _check_gate_axis(name: str, array, axis: int) -> None:
  """Raises unless the columns, from `axis` on, are (m,) or (2, n)."""
  if array is not None and array.shape[axis:-1] not in ((), (2,)):
    raise ValueError(
      f"smoe_mlp: {name} has columns of shape {array.shape[axis:]}; with an "
      "axis for the gate they are (2, n), as sharding.split_gate makes them."
    )


def _check_gate(w_in, w_out, axes: MeshAxes) -> None:
  if axes.tensor and w_in.ndim == 3 and w_in.shape[2] == 2 * w_out.shape[1]:
    raise ValueError(
      f"smoe_mlp: {axes.tensor} split d_expert, and no block of columns of "
      f"w_in {w_in.shape} has matching gate and up halves; pass (E, d, 2, n), "
      "as sharding.split_gate makes it."
    )


def _check_exchange(axes: MeshAxes) -> None:
  ragged = axes.expert and axes.exchange == "ragged_all_to_all"
  if ragged and current_device().platform == "cpu":
    raise NotImplementedError(
      "smoe_mlp: CPUs have no ragged_all_to_all; use exchange='all_gather'."
    )
