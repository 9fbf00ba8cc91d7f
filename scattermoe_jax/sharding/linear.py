"""`parallel_linear` of what a mesh holds in parts."""

import functools
from typing import Any, Literal

from jaxtyping import Array, Float, Int

from scattermoe_jax import ops
from scattermoe_jax._compat import vary_over
from scattermoe_jax.ops import checks
from scattermoe_jax.routing import route_local
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


def parallel_linear(
  x: Float[Array, "rows d"],
  w: Float[Array, "E d n"],
  expert_ids: Int[Array, "T k"],
  *,
  axes: MeshAxes,
  split: Literal["columns", "rows"] = "columns",
  bias: Float[Array, "E n"] | None = None,
  mesh: Any = None,
  **options: Any,
) -> Float[Array, "S n"]:
  """Returns `ops.parallel_linear` of what a mesh holds in parts.

  Rows are in scattered order: a mesh has no grouped order. Experts, if split,
  see all tokens of their axes (exchange "all_gather").

  Args:
    x: (T, d), where the k choices of a token share a row, or (S, d). With
      `split="rows"`, its columns are split over `axes.tensor`.
    w: one matrix per expert.
    expert_ids: the experts of each token; outside [0, E) for 'not here'.
    axes: which axes of the mesh split what. The fsdp axes split the d of w, or
      its n with `split="rows"`: the width of the model.
    split: what the tensor axes split of each matrix: its "columns", and then y
      is split over them too; or its "rows", and y is summed over them.
    bias: one bias per expert.
    mesh: the mesh; that of `jax.set_mesh` if None. Without either, this is
      `route` and `ops.parallel_linear`.
    **options: of `ops.parallel_linear`: precision, implementation.

  Returns:
    (S, n), scattered.

  Raises:
    ValueError: if shapes disagree, the mesh lacks an axis, an axis does not
      divide what it splits, or an option is unknown or asks for grouped order.
    TypeError: if dtypes disagree, or what should be an array, axes or a mesh
      is not one.
  """
  name = "parallel_linear"
  mesh = context_mesh(name, mesh)
  axes = axes_of(name, axes, mesh)
  checks.check_one_of(name, "split", split, ("columns", "rows"))
  num_experts = checks.check_matrices(name, "w", w)
  routing = checked_routing(
    name, expert_ids, num_experts, x=x, w=w, optional={"bias": bias}
  )
  checks.check_rows(name, x, routing, grouped=False)
  checks.check_weights(name, "w", w, routing)
  checks.check_bias(name, "bias", bias, w)
  _check_scattered(**options)
  run = functools.partial(_local, axes=axes, split=split, options=options)
  expert_ids = local.here_or_nowhere(expert_ids, num_experts)
  if not axes.names:
    return run(x, expert_ids, w, bias)

  columns = split == "columns"
  d_in, d_out = ("fsdp", "tensor") if columns else ("tensor", "fsdp")
  check_divides(name, "num_experts", num_experts, axes.expert, mesh)
  check_divides(name, "d", w.shape[1], getattr(axes, d_in), mesh)
  check_divides(name, "n", w.shape[2], getattr(axes, d_out), mesh)
  shards = num_devices(axes.tokens, mesh)
  num_tokens = routing.num_tokens
  padded = local.num_padded(num_tokens, shards)
  rows_per_token = 1 if len(x) == num_tokens else routing.top_k
  y = run_on_mesh(
    run,
    mesh,
    in_specs=(
      axes.split("tokens", None if columns else "tensor"),
      axes.split("tokens", None),
      axes.split("expert", d_in, d_out),
      axes.split("expert", d_out),
    ),
    out_specs=axes.split("tokens", "tensor" if columns else None),
    arguments=(
      local.pad_tokens(x, padded * rows_per_token, mesh),
      local.pad_tokens(expert_ids, padded, mesh, fill=-1),
      w,
      bias,
    ),
  )
  return local.unpad_tokens(y, routing.num_rows, mesh)


def _local(x, expert_ids, w, bias, *, axes, split, options):
  """Runs the op on one device, between the collectives of its axes."""
  columns = split == "columns"
  w = local.gather_weight(w, axes, 1 if columns else 2)
  bias = local.gather_weight(bias, axes, None if columns else 1)
  x = vary_over(x, frozenset(axes.names))
  x, expert_ids = (local.gather(a, axes.expert, 0) for a in (x, expert_ids))
  first = local.first_expert(axes, w.shape[0])
  y = ops.parallel_linear(
    x,
    w,
    route_local(expert_ids, first, w.shape[0]),
    bias=bias if columns else local.first_only(bias, axes.tensor),
    **options,
  )
  y = local.scatter_sum(y, axes.expert)
  return y if columns else local.add_up(y, axes.tensor)


def _check_scattered(*, grouped_in=False, grouped_out=False, **_) -> None:
  if grouped_in or grouped_out:
    raise ValueError(
      "parallel_linear: got grouped_in or grouped_out, and a mesh has no "
      "grouped order; leave them out."
    )
