"""The Hopper backend: Pallas Mosaic GPU.

`check` asks for the features of JAX that the kernels were measured with, by
name. The kernels themselves are imported where they are called, so that a
machine without them can still ask.

Launches are jitted by what is static of them, their plan: the layers of a model
then share one kernel, which takes more than a second to lower and as long to
compile. (JAX numbers what it lowers, so that equal kernels differ: 0.11.)
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels import composed
from scattermoe_jax.kernels.composed import by_columns
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.contract import Columns, Problem
from scattermoe_jax.kernels.mosaic.lowering import lowers
from scattermoe_jax.kernels.schedule import places_in_windows
from scattermoe_jax.kernels.tuning import chosen_config
from scattermoe_jax.routing import Routing, take_rows

_DTYPES = ("bfloat16", "float16")
# Copies move 16 bytes of a row, or boxes of 8 rows.
_MULTIPLE = 8
# The tensor core reads tiles of 64 columns; other widths are padded to them.
_TILE_WIDTH = 64
# What 32 bits reach that count chunks of 8 elements (`layouts.at_chunk`).
_MOST_ELEMENTS = 2**35


def check(problem: Problem) -> str | None:
  """Returns why `problem` cannot run here, in words, or None."""
  capability = problem.device.capability
  if problem.device.platform != "gpu" or capability != (9, 0):
    return (
      "mosaic runs on Hopper GPUs (compute capability 9.0), this is "
      f"{problem.device.kind}"
    )
  if problem.dtype not in _DTYPES:
    return f"mosaic multiplies {' or '.join(_DTYPES)}, got {problem.dtype}"
  for name, width in (("d_in", problem.d_in), ("d_out", problem.d_out)):
    if width % _MULTIPLE or not width:
      return (
        f"mosaic needs widths that are multiples of {_MULTIPLE}, got "
        f"{name} = {width}"
      )
    if problem.num_rows * _padded(width) > _MOST_ELEMENTS:
      return (
        f"mosaic reaches {_MOST_ELEMENTS} elements of an array of rows, got "
        f"{problem.num_rows} rows of {name} = {width}"
      )
  return missing_feature()


@functools.cache
def missing_feature() -> str | None:
  """Returns what this JAX lacks, or None."""
  try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
  except Exception as error:
    return f"this JAX does not import Pallas Mosaic GPU ({error})"
  # JAX 0.11.2 has them all.
  for name in ("inline_mgpu", "force_gpu_interpret_mode"):
    if not hasattr(plgpu, name):
      return f"this JAX is too old for mosaic: Pallas has no {name}"
  arguments = (("kernel", "out_type"), ("barrier_arrive", "predicate"))
  for name, argument in arguments:
    function = getattr(plgpu, name, None)
    if not function or argument not in inspect.signature(function).parameters:
      return f"this JAX is too old for mosaic: its {name} takes no {argument}"
  return None


def scatter2scatter(
  x: Float[Array, "rows d"],
  w: Float[Array, "E _ _"],
  routing: Routing,
  *,
  bias: Float[Array, "E n"] | None = None,
  grouped_in: bool = False,
  grouped_out: bool = False,
  transpose_w: bool = False,
  columns: Columns | None = None,
  precision=None,
  config: TileConfig | None = None,
) -> Float[Array, "S _"]:
  """Returns y with y[row] = x[row] @ w[expert of row] + bias[expert of row].

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `grouped_in`.
    w: (E, d, n), or (E, n, d) if `transpose_w`.
    routing: the routing.
    bias: (E, n), added to the rows of its expert.
    grouped_in: whether x is in grouped order.
    grouped_out: whether y is.
    transpose_w: whether to multiply by the transpose of w[e].
    columns: the slice of y that is made; all of it if None.
    precision: unused; operands of 16 bits have one.
    config: the blocks; from the table or the heuristic if None.
  """
  del precision
  slice_index = None
  if columns is not None:
    bias = None if bias is None else columns.of(bias, 1)
    # What would have to be padded is copied: then rather the slice alone.
    if any(size % _TILE_WIDTH for size in (columns.width, *w.shape[1:])):
      w = columns.of(w, 1 if transpose_w else 2)
    else:
      slice_index = jnp.asarray(columns.slice_index, jnp.int32)
  d_out = columns.width if columns else w.shape[1 if transpose_w else 2]
  if routing.num_rows == 0:
    return jnp.zeros((0, d_out), x.dtype)
  plan = _plan(
    f"scatter2scatter_{'grouped' if grouped_in else 'gathered'}",
    x,
    w,
    routing,
    config,
    d_out=d_out,
    grouped_in=grouped_in,
    transpose_w=transpose_w,
  )

  return _store_rows(
    x,
    w,
    bias,
    routing,
    slice_index,
    plan=plan,
    grouped_out=grouped_out,
    d_out=d_out,
  )


@functools.partial(jax.jit, static_argnames=("plan", "grouped_out", "d_out"))
def _store_rows(
  x, w, bias, routing, slice_index, *, plan, grouped_out: bool, d_out: int
):
  from scattermoe_jax.kernels.mosaic import epilogues, grouped_matmul

  @jax.custom_batching.sequential_vmap
  def run(x, w, bias, routing, slice_index):
    epilogue = epilogues.StoreRows(
      bias=_pad(bias, 1),
      scattered_ids=None if grouped_out else routing.scattered_ids,
    )
    x = _pad(x, 1)
    x = _pad_rows(x) if plan.grouped_in else x
    w = _pad(w, 1, 2)
    [y] = grouped_matmul.multiply(x, w, routing, epilogue, plan, slice_index)
    return y[:, :d_out]

  return run(x, w, bias, routing, slice_index)


def up_projection(
  x: Float[Array, "rows d"],
  w: Float[Array, "E d m"],
  routing: Routing,
  *,
  bias: Float[Array, "E m"] | None,
  activation: Any,
  keep_h: bool,
  precision=None,
  config: TileConfig | None = None,
) -> tuple[Float[Array, "S m"] | None, Float[Array, "S n"]]:
  """Returns (h, a): h = x w_e (None unless `keep_h`) and a = activation(h).

  The activation is computed from the sums in float32, before h is rounded.
  """
  halves = 2 if activation.gated else 1
  if not _fuses(routing, activation, w.shape[2], halves * _TILE_WIDTH):
    return composed.up_projection(
      scatter2scatter,
      x,
      w,
      routing,
      bias=bias,
      activation=activation,
      keep_h=keep_h,
      precision=precision,
    )
  plan = _plan(
    "up_projection", x, w, routing, config, transpose_w=False, halves=halves
  )
  *h, a = _activate(
    x, w, bias, routing, plan=plan, activation=activation, keep_h=keep_h
  )
  return (h[0] if keep_h else None), a


@functools.partial(jax.jit, static_argnames=("plan", "activation", "keep_h"))
def _activate(x, w, bias, routing, *, plan, activation, keep_h: bool):
  from scattermoe_jax.kernels.mosaic import epilogues, grouped_matmul

  @jax.custom_batching.sequential_vmap
  def run(x, w, bias, routing):
    epilogue = epilogues.Activate(activation, keep_h, bias)
    return grouped_matmul.multiply(
      _pad(x, 1), _pad(w, 1), routing, epilogue, plan
    )

  return run(x, w, bias, routing)


def down_projection_grad(
  dy: Float[Array, "T d"],
  w: Float[Array, "E n d"],
  h: Float[Array, "S m"],
  gates: Float[Array, " S"],
  routing: Routing,
  *,
  activation: Any,
  precision=None,
  config: TileConfig | None = None,
) -> tuple[Float[Array, "S m"], Float[Array, "S n"], Float[Array, " S"]]:
  """Returns (dh, weighted_a, dgates), the backward down to the pre-activation.

  da' = dy w_e^T; dgates = <da', a>; dh = (gates da') dact/dh;
  weighted_a = gates a.
  """
  if not _fuses(routing, activation, w.shape[1], _TILE_WIDTH):
    return composed.down_projection_grad(
      scatter2scatter,
      dy,
      w,
      h,
      gates,
      routing,
      activation=activation,
      precision=precision,
    )
  plan = _plan("down_projection_grad", dy, w, routing, config, transpose_w=True)

  return _differentiate(
    dy, w, h, gates, routing, plan=plan, activation=activation
  )


@functools.partial(jax.jit, static_argnames=("plan", "activation"))
def _differentiate(dy, w, h, gates, routing, *, plan, activation):
  from scattermoe_jax.kernels.mosaic import epilogues, grouped_matmul

  @jax.custom_batching.sequential_vmap
  def run(dy, w, h, gates, routing):
    epilogue = epilogues.Differentiate(activation, _pad_rows(h), gates)
    dh, weighted_a, sums = grouped_matmul.multiply(
      _pad(dy, 1), _pad(w, 2), routing, epilogue, plan
    )
    places = places_in_windows(
      routing.expert_ids, routing.group_sizes, *plan.windows
    )
    # One partial sum for each tile of columns, added from the left: the order
    # of a reduction is the compiler's, and may differ between compilations.
    parts = [
      lax.index_in_dim(sums, tile, axis=1, keepdims=False)
      for tile in range(plan.num_tiles_n)
    ]
    sums = functools.reduce(jnp.add, parts).reshape(-1)
    return dh, weighted_a, take_rows(sums, places)

  return run(dy, w, h, gates, routing)


def group_xty(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  routing: Routing,
  *,
  x_grouped: bool = False,
  y_grouped: bool = False,
  precision=None,
  config: TileConfig | None = None,
) -> Float[Array, "E d n"]:
  """Returns xty[e] = x_e^T y_e over the rows of expert e.

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `x_grouped`.
    y: (T, n) or (S, n) scattered, or (S, n) if `y_grouped`.
    routing: the routing.
    x_grouped: whether x is in grouped order.
    y_grouped: whether y is.
    precision: unused; operands of 16 bits have one.
    config: the blocks; from the table or the heuristic if None.
  """
  del precision
  from scattermoe_jax.kernels.mosaic import grouped_xty

  return grouped_xty.group_xty(
    x, y, routing, x_grouped=x_grouped, y_grouped=y_grouped, config=config
  )


def group_xty_and_sum(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  rows_of: composed.RowsOf,
  routing: Routing,
  *,
  num_chunks: int = 1,
  at_once: bool = False,
  x_grouped: bool = False,
  y_grouped: bool = False,
  precision=None,
  config: TileConfig | None = None,
) -> tuple[Float[Array, "E d n"], Float[Array, "T d"]]:
  """Returns `group_xty`, and the sum of each token's k rows.

  Args:
    x: see `group_xty`.
    y: see there.
    rows_of: of y and a slice of the d columns, that slice of what is summed, in
      grouped order; zero where rows are of no group.
    routing: see there.
    num_chunks: in how many slices the rows are made.
    at_once: whether by one kernel, if that is faster.
    x_grouped: see there.
    y_grouped: see there.
    precision: see there.
    config: see there.
  """
  from scattermoe_jax.kernels.mosaic import grouped_xty

  del precision
  options: dict[str, Any] = dict(num_chunks=num_chunks, config=config)
  options |= dict(x_grouped=x_grouped, y_grouped=y_grouped)
  if at_once:
    both = grouped_xty.group_xty_and_sum(x, y, rows_of, routing, **options)
    if both is not None:
      return both
  return composed.group_xty_and_sum(
    group_xty, by_columns, x, y, rows_of, routing, **options
  )


def _fuses(routing: Routing, activation, width: int, multiple: int) -> bool:
  """Returns whether a fused kernel can run; else the composed form does."""
  fits = routing.num_rows > 0 and width % multiple == 0
  return fits and lowers(activation.value_and_slope)


def _plan(
  op: str, x, w, routing: Routing, config, *, transpose_w, d_out=None, **fields
):
  """Returns the launch plan of a product, its widths padded."""
  from scattermoe_jax.kernels.mosaic.matmul_tiles import Plan

  d_in, columns = w.shape[1:][::-1] if transpose_w else w.shape[1:]
  d_out = d_out or columns
  problem = Problem(
    routing.num_rows,
    routing.num_experts,
    d_in,
    d_out,
    str(x.dtype),
    current_device(),
  )
  return Plan(
    num_rows=routing.num_rows,
    num_experts=routing.num_experts,
    d_in=_padded(d_in),
    d_out=_padded(d_out),
    dtype=x.dtype,
    config=chosen_config(op, problem, config),
    transpose_w=transpose_w,
    **fields,
  )


def _padded(width: int) -> int:
  return -(-width // _TILE_WIDTH) * _TILE_WIDTH


def _pad(array, *axes: int):
  """Returns the array with zeros up to a multiple of 64 along `axes`."""
  if array is None:
    return None
  pad = [(0, 0)] * array.ndim
  for axis in axes:
    pad[axis] = (0, _padded(array.shape[axis]) - array.shape[axis])
  return jnp.pad(array, pad) if any(after for _, after in pad) else array


def _pad_rows(array: Float[Array, "S d"]) -> Float[Array, "_ d"]:
  """Returns the array with zero rows up to a multiple of 8, as TMA asks."""
  missing = -array.shape[0] % _MULTIPLE
  return jnp.pad(array, ((0, missing), (0, 0))) if missing else array
