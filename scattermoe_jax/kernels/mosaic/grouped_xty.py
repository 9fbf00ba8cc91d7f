"""dw[e] = x_e^T y_e on Hopper: one persistent kernel, rows gathered on load.

A tile is 128 columns of one operand (left) by up to 256 of the other (right),
of one expert, contracted over that expert's rows, 64 a step:

       rows of e, 64 a step           right: 256 columns
      +----+----+----+-  -+          +----------------+   Two warpgroups hold
      |0///|////|////|  /0|   left:  |  warpgroup 0   |   64 of the 128 rows
      |0///|////|////|  /0|   128    |----------------|   each, in registers;
      +----+----+----+-  -+          |  warpgroup 1   |   a third only loads.
       0: zero, outside of e         +----------------+

Gathered rows come by cp.async, which zero-fills rows outside of the group;
grouped rows by TMA, but in the first and the last step of a group by cp.async
too: TMA would load a neighbour's rows, and zero times its NaN would be NaN.
The gathered operand wants the narrow side, where it is a third of the loads. If
that is y, the tile is one of the transpose, and is transposed when stored.

A cluster of two blocks draws neighbours along left together. Each loads half of
right's rows into both: half the bytes from L2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from scattermoe_jax._compat import current_device, vary_over, varying_axes
from scattermoe_jax.kernels import tuning
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.contract import Columns, Problem
from scattermoe_jax.kernels.mosaic import clusters, tickets, warpgroup_ops
from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic.partial_sums import PartialSums, workspace
from scattermoe_jax.kernels.mosaic.pieces import store_between
from scattermoe_jax.kernels.mosaic.xty_loader import load_tiles
from scattermoe_jax.kernels.mosaic.xty_plan import (
  LEFT_EACH,
  MULTIPLIERS,
  Plan,
  make_plan,
)
from scattermoe_jax.kernels.mosaic.xty_tiles import (
  Tile,
  columns,
  parts_of_groups,
  tile_at,
)
from scattermoe_jax.routing import Routing

# M = columns of left, N = columns of right, K = rows of one expert, G = E

# Returns the slice `columns` of S grouped rows, all of it if None.
RowsOf = Callable[[Float[Array, "S _"], Columns | None], Float[Array, "S _"]]

_ROWS = warpgroup_ops.ROWS


def group_xty(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  routing: Routing,
  *,
  x_grouped: bool = False,
  y_grouped: bool = False,
  config: TileConfig | None = None,
  ops: Any = warpgroup_ops,
) -> Float[Array, "E d n"]:
  """Returns xty[e] = x_e^T y_e over the rows of expert e.

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `x_grouped`.
    y: (T, n) or (S, n) scattered, or (S, n) if `y_grouped`.
    routing: the routing.
    x_grouped: whether x is in grouped order.
    y_grouped: whether y is.
    config: block_m columns of x and block_n of y: one of them 128, the other
      64, 128 or 256; num_stages steps of 64 rows in flight; num_sms blocks.
    ops: what Pallas has no primitive for: the module `warpgroup_ops`, or for
      the interpreter, which cannot run it, the like of it.
  """
  shape = (routing.num_experts, x.shape[1], y.shape[1])
  if routing.num_rows == 0 or 0 in shape:
    return jnp.zeros(shape, x.dtype)
  plan = _plan(x, y, routing, x_grouped, y_grouped, config)
  [xty] = _launch(x, y, None, routing, plan=plan, ops=ops)
  return xty


def group_xty_and_sum(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  rows_of: RowsOf,
  routing: Routing,
  *,
  num_chunks: int = 1,
  x_grouped: bool = False,
  y_grouped: bool = False,
  config: TileConfig | None = None,
  ops: Any = warpgroup_ops,
) -> tuple[Float[Array, "E d n"], Float[Array, "T d"]] | None:
  """Returns `group_xty`, and the sum of each token's k rows, of one kernel.

  None where it would take longer than two (`choice_sums`). In chunks it is
  launched once for each slice of columns, which it sums beside a share of the
  experts' products; all launches write what the first one made.

  Args:
    x: see `group_xty`.
    y: see there.
    rows_of: of y and a slice of the d columns, grouped rows, which are summed.
    routing: see there.
    num_chunks: slices of the columns.
    x_grouped: see `group_xty`.
    y_grouped: see there.
    config: see there.
    ops: see there.
  """
  width = x.shape[1] // num_chunks
  if 0 in (routing.num_rows, width, y.shape[1]):
    return None
  plan = _plan(x, y, routing, x_grouped, y_grouped, config)
  rows_type = jax.ShapeDtypeStruct((routing.num_rows, width), x.dtype)
  plan = plan.with_sum(rows_type, routing, num_chunks)
  if plan.sum_plan is None:
    return None
  launch = functools.partial(_launch, plan=plan, ops=ops)
  if num_chunks == 1:
    return tuple(launch(x, y, rows_of(y, None), routing))
  xty_and_sums = None
  for i in range(num_chunks):
    index = jnp.int32(i)
    rows = rows_of(y, Columns(index, width))
    made = launch(x, y, rows, routing, index, xty_and_sums)
    # The next rows may have the memory of these.
    xty_and_sums, y = lax.optimization_barrier((tuple(made), y))
  return xty_and_sums


def _plan(x, y, routing: Routing, x_grouped, y_grouped, config) -> Plan:
  op = f"group_xty_gathered_{'y' if x_grouped and not y_grouped else 'x'}"
  widths, dtype = (x.shape[1], y.shape[1]), str(x.dtype)
  problem = Problem(
    routing.num_rows, routing.num_experts, *widths, dtype, current_device()
  )
  config = tuning.chosen_config(op, problem, config)
  return make_plan(x, y, routing, x_grouped, y_grouped, config)


@functools.partial(jax.jit, static_argnames=("plan", "ops"))
def _launch(
  x, y, rows, routing: Routing, index=None, made=None, *, plan: Plan, ops: Any
):
  """Returns xty, and sums if rows are given.

  With an index, of that slice and share: in place of `made`, the results of the
  launch before, if there was one.
  """
  # Launches of one grid would draw tiles from one counter.
  run = functools.partial(_run, plan, ops)
  run = jax.custom_batching.sequential_vmap(run)
  return run(x, y, rows, routing, index, made)


def _run(
  plan: Plan, ops, x, y, rows, routing: Routing, index, made
) -> list[Array]:
  left, right = (y, x) if plan.transposed else (x, y)
  shape = (routing.num_experts, x.shape[1], y.shape[1])
  outs = [jax.ShapeDtypeStruct(shape, x.dtype)]
  summed = None
  if plan.sum_plan is not None:
    outs.append(plan.sum_plan.out_type)
    summed = rows, routing.grouped_ids, None if index is None else index[None]
  parts = parts_of_groups(plan, routing, index)
  operands = (left, right, routing.scattered_ids, parts, summed)
  if made is not None:
    refs = [jax.new_ref(array) for array in made]
    _kernel(plan, [], ops)(*operands, *refs)
    return [jax.freeze(ref) for ref in refs]
  results = _kernel(plan, outs, ops)(*operands)
  # plgpu.kernel forgets over which mesh axes its results differ.
  return vary_over(results[: len(outs)], varying_axes(x, y, rows, routing))


def _kernel(plan: Plan, outs: list[jax.ShapeDtypeStruct], ops):
  """Returns the launch: (left, right, ids, parts, summed) -> [*outs, ...].

  Without outs it takes references to them as its last operands.
  """
  width = plan.left.width if plan.transposed else plan.right.width
  stages = plan.config.num_stages
  return plgpu.kernel(
    functools.partial(_body, plan, ops),
    out_type=[*outs, *workspace(plan)],
    scratch_types=dict(
      left_smem=plgpu.SMEM(
        (stages, _ROWS, plan.left.block),
        plan.dtype,
        transforms=lt.OPERAND,
      ),
      right_smem=plgpu.SMEM(
        (stages, _ROWS, plan.right.block),
        plan.dtype,
        transforms=lt.OPERAND,
      ),
      out_smem=plgpu.SMEM(
        (MULTIPLIERS, 2, LEFT_EACH, lt.COLUMNS),
        plan.dtype,
        transforms=_store_transforms(width),
      ),
      full=plgpu.Barrier(
        num_arrivals=1 + plan.left.by_tma + plan.right.by_tma,
        num_barriers=stages,
      ),
      empty=clusters.barriers(plan.cluster, MULTIPLIERS, stages),
      **tickets.scratch_types(plan.cluster, readers=MULTIPLIERS),
    ),
    **clusters.grid(plan.config.num_sms, plan.cluster),
    num_threads=MULTIPLIERS + 1,
    thread_name="warpgroup",
    kernel_name="group_xty",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      unsafe_no_auto_barriers=True,
    ),
  )


def _store_transforms(width: int):
  # TMA wants whole tiles of the output too; narrower ones for odd widths.
  cols = next(c for c in (64, 32, 16, 8) if width % c == 0)
  swizzle = [plgpu.SwizzleTransform(2 * cols)] if cols > 8 else []
  return (plgpu.TilingTransform((8, cols)), *swizzle)


def _body(plan, ops, left, right, ids, parts, summed, out, *refs, **scratch):
  """One block: a loader and two multipliers, each walking the same tiles."""
  warpgroup = lax.axis_index("warpgroup")
  sums, *of_parts = (None, *refs) if summed is None else refs
  partial_sums = PartialSums.of(plan, ops, of_parts, warpgroup)
  queue = tickets.Queue.of(plan.cluster, scratch)

  def sum_first(ring, first_byte):
    """Sums rows by way of a part of a ring, if this block is to."""
    if summed is None:
      return
    rows, places, index = summed
    block = lax.axis_index("cluster") * plan.cluster + lax.axis_index("block")

    @pl.when(block < plan.sum_plan.blocks)
    def _():
      worker = block * (MULTIPLIERS + 1) + warpgroup
      ops.sum_share(
        plan.sum_plan,
        worker,
        ring.at[0],
        first_byte,
        rows,
        places,
        sums,
        0 if index is None else index[0],
      )

  @pl.when(warpgroup == MULTIPLIERS)
  def _():
    # Before it draws tiles: others may take them meanwhile.
    sum_first(scratch["left_smem"], 0)
    plgpu.set_max_registers(72, action="decrease")
    load_tiles(plan, ops, queue, parts, left, right, ids, scratch)

  @pl.when(warpgroup < MULTIPLIERS)
  def _():
    sum_first(scratch["right_smem"], warpgroup * plan.ring_shares[1])
    plgpu.set_max_registers(216, action="increase")
    _multiply_tiles(plan, queue, parts, warpgroup, out, partial_sums, scratch)

  if plan.cluster > 1:
    ops.meet_cluster()  # An arrival needs its barrier, be it another block's.


def _multiply_tiles(plan, queue, parts, warpgroup, out, partial_sums, scratch):
  """Sums left^T right over the steps of each tile; stores the tile before.

  A finished tile is held in 16 bits, and its pieces leave between the first
  products of the next one: the tensor core does not wait for them.
  """
  left_smem, right_smem = scratch["left_smem"], scratch["right_smem"]
  full, empty = scratch["full"], scratch["empty"]
  stages = plan.config.num_stages
  for slot in range(stages):  # At first all are empty.
    plgpu.barrier_arrive(empty.at[slot])
  my_cols = pl.ds(warpgroup * LEFT_EACH, LEFT_EACH)
  columns_of_chunks = range(0, plan.right.block, lt.COLUMNS)

  def tile(i) -> Tile:
    t = tile_at(plan, parts, queue.read(i))
    queue.release(i)
    return t

  def is_tile(t: Tile):
    return (t.number >= 0) & (t.number < plan.num_tiles)

  def multiply_tile(carry):
    i, step, t, held, before = carry
    # After the last comes a turn without a tile, which stores that.
    following = lax.cond(is_tile(t), lambda: tile(i + 1), lambda: t)
    t = t._replace(num_steps=jnp.where(is_tile(t), t.num_steps, 0))
    pieces = _pieces(plan, before, held, warpgroup, out, scratch["out_smem"])
    in_turn = t.num_steps >= len(pieces)

    @pl.when(jnp.logical_not(in_turn))
    def _():
      for store in pieces:
        store()

    def multiply(acc):
      def multiply_step(k, carry):
        step, before = carry
        slot = lt.rem(step, stages)
        plgpu.barrier_wait(full.at[slot])
        plgpu.wgmma(
          acc,
          left_smem.at[slot, :, my_cols].transpose((1, 0)),
          right_smem.at[slot],
        )
        # One product in flight: the one before is done, its slot free.
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(empty.at[before], predicate=k > 0)
        store_between(pieces, jnp.where(in_turn, k, len(pieces)))
        return step + 1, slot

      _, last = lax.fori_loop(
        0, t.num_steps, multiply_step, (step, jnp.int32(0))
      )
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(empty.at[last], predicate=t.num_steps > 0)
      return acc[...]

    shape = (LEFT_EACH, plan.right.block)
    sums = pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
    chunks, done = [sums[:, i : i + lt.COLUMNS] for i in columns_of_chunks], t
    if partial_sums is not None:
      t = t._replace(others=jnp.where(is_tile(t), t.others, 0))
      chunks = partial_sums.join(t, chunks)
      done = t._replace(number=jnp.where(t.others < 0, -1, t.number))
    held = [chunk.astype(plan.dtype) for chunk in chunks]
    return i + 1, step + t.num_steps, following, held, done

  zero, first = jnp.int32(0), tile(0)
  none = first._replace(number=jnp.int32(-1))
  held = [
    jnp.zeros((LEFT_EACH, lt.COLUMNS), plan.dtype) for _ in columns_of_chunks
  ]
  lax.while_loop(
    lambda carry: is_tile(carry[2]) | is_tile(carry[4]),
    multiply_tile,
    (zero, zero, first, held, none),
  )
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _pieces(plan, t: Tile, held, warpgroup, out, out_smem) -> list:
  """Returns functions that store a warpgroup's half of a tile, in order.

  A tile of a negative number is none. TMA drops what lies past the edges.
  """
  left_col, right_col = columns(plan, t)
  rows_out = pl.ds(left_col + warpgroup * LEFT_EACH, LEFT_EACH)
  num_pieces = plan.right.block // lt.COLUMNS
  buffers = min(2, num_pieces)

  def store(i):
    cols_out = pl.ds(right_col + i * lt.COLUMNS, lt.COLUMNS)
    buffer = out_smem.at[warpgroup, i % buffers]
    # Wait until TMA has read what this buffer held, be it the last tile's.
    plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
    if plan.transposed:
      buffer.transpose((1, 0))[...] = held[i]
      target = out.at[t.expert, cols_out, rows_out]
    else:
      buffer[...] = held[i]
      target = out.at[t.expert, rows_out, cols_out]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)

  def store_if_any(i):
    # Whole: a wait for the last but one counts copies, not pieces.
    pl.when(t.number >= 0)(functools.partial(store, i))

  return [functools.partial(store_if_any, i) for i in range(num_pieces)]
