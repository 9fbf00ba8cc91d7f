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
from scattermoe_jax.kernels.contract import Problem
from scattermoe_jax.kernels.mosaic import clusters, tickets, warpgroup_ops
from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic.partial_sums import PartialSums, workspace
from scattermoe_jax.kernels.mosaic.pieces import store_between
from scattermoe_jax.kernels.mosaic.xty_tiles import (
  LEFT_EACH,
  MULTIPLIERS,
  Plan,
  Tile,
  columns,
  make_plan,
  parts_of_groups,
  tile_at,
)
from scattermoe_jax.routing import Routing

# M = columns of left, N = columns of right, K = rows of one expert, G = E

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
  num_experts, num_rows = routing.num_experts, routing.num_rows
  shape = (num_experts, x.shape[1], y.shape[1])
  if num_rows == 0 or 0 in shape:
    return jnp.zeros(shape, x.dtype)
  op = f"group_xty_gathered_{'y' if x_grouped and not y_grouped else 'x'}"
  device, dtype = current_device(), str(x.dtype)
  problem = Problem(num_rows, num_experts, *shape[1:], dtype, device)
  config = tuning.chosen_config(op, problem, config)
  plan = make_plan(x, y, routing, x_grouped, y_grouped, config)
  return _launch(x, y, routing, plan=plan, ops=ops)


@functools.partial(jax.jit, static_argnames=("plan", "ops"))
def _launch(x, y, routing: Routing, *, plan: Plan, ops: Any):
  left, right = (y, x) if plan.transposed else (x, y)
  shape = (routing.num_experts, x.shape[1], y.shape[1])
  out = jax.ShapeDtypeStruct(shape, x.dtype)
  dw, *_ = _kernel(plan, out, ops)(
    left, right, routing.scattered_ids, parts_of_groups(plan, routing)
  )
  # plgpu.kernel forgets over which mesh axes its result differs.
  return vary_over(dw, varying_axes(x, y, routing))


def _kernel(plan: Plan, out: jax.ShapeDtypeStruct, ops):
  """Returns the launch: (left, right, ids, parts) -> [xty, ...]."""
  stages = plan.config.num_stages
  return plgpu.kernel(
    functools.partial(_body, plan, ops),
    out_type=[out, *workspace(plan)],
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
        transforms=_store_transforms(out.shape[2]),
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


def _body(plan, ops, left, right, ids, parts, out, *sums, **scratch):
  """One block: a loader and two multipliers, each walking the same tiles."""
  warpgroup = lax.axis_index("warpgroup")
  partial_sums = PartialSums.of(plan, ops, sums, warpgroup)
  queue = tickets.Queue.of(plan.cluster, scratch)

  @pl.when(warpgroup == MULTIPLIERS)
  def _():
    plgpu.set_max_registers(72, action="decrease")
    _load_tiles(plan, ops, queue, parts, left, right, ids, scratch)

  @pl.when(warpgroup < MULTIPLIERS)
  def _():
    plgpu.set_max_registers(216, action="increase")
    _multiply_tiles(plan, queue, parts, warpgroup, out, partial_sums, scratch)

  if plan.cluster > 1:
    ops.meet_cluster()  # An arrival needs its barrier, be it another block's.


def _load_tiles(plan, ops, queue, parts, left, right, ids, scratch):
  """Fills a ring of stages with the steps of all tiles, one after another."""
  stages, lag = plan.config.num_stages, plan.lag
  full, empty = scratch["full"], scratch["empty"]
  sides = (
    (plan.left, left, scratch["left_smem"]),
    (plan.right, right, scratch["right_smem"]),
  )
  draw = functools.partial(queue.draw, ops.new_counter(), ops.increment)

  def tile(i) -> Tile:
    return tile_at(plan, parts, queue.read(i))

  def row_ids(t: Tile, k):
    """Ids of the rows of step k, if an operand reads them."""
    if not (plan.left.gathered or plan.right.gathered):
      return ()
    return ops.load_ids(ids, t.window(k))

  def load_tile(carry):
    i, step, t, ids, after = carry
    # Ids a tile ahead, its group's rows two: nobody waits for them.
    draw(i + tickets.AHEAD)
    next_ids, after_next = row_ids(after, 0), tile(i + 2)

    def load_step(k, carry):
      step, ids = carry
      slot = lt.rem(step, stages)
      next_ids = row_ids(t, k + 1)

      # All multipliers, of all blocks, are done with this slot.
      plgpu.barrier_wait(empty.at[slot])

      loads = zip(sides, columns(plan, t), strict=True)
      # TMA first: one instruction, which runs while rows are copied.
      for side, col in sorted(loads, key=lambda load: not load[0][0].by_tma):
        _load_step(ops, side, t, k, col, ids, slot, full)
      ops.commit()

      @pl.when(step >= lag)
      def _():
        ops.wait(lag)
        plgpu.barrier_arrive(full.at[lt.rem(step - lag, stages)])

      return step + 1, next_ids

    step, _ = lax.fori_loop(0, t.num_steps, load_step, (step, ids))
    return i + 1, step, after, next_ids, after_next

  for turn in range(tickets.AHEAD):
    draw(jnp.int32(turn))
  zero, first = jnp.int32(0), tile(0)
  i, num_steps, t, _, after = lax.while_loop(
    lambda carry: (carry[2].number < plan.num_tiles) & (carry[2].num_steps > 0),
    load_tile,
    (zero, zero, first, row_ids(first, 0), tile(1)),
  )

  for behind in range(lag, 0, -1):

    @pl.when(num_steps >= behind)
    def _(behind=behind):
      ops.wait(behind - 1)
      plgpu.barrier_arrive(full.at[lt.rem(num_steps - behind, stages)])

  # The tiles without rows come last. A draw may wait until the multipliers have
  # read older tickets, and they do once every loaded step is announced.
  def pass_tile(carry):
    i, _, after = carry
    draw(i + tickets.AHEAD)
    return i + 1, after, tile(i + 2)

  lax.while_loop(
    lambda carry: carry[1].number < plan.num_tiles, pass_tile, (i, t, after)
  )

  # See every release before leaving: an arrival needs its barrier.
  for slot in range(stages):
    plgpu.barrier_wait(empty.at[slot])


def _load_step(ops, side_refs, t: Tile, k, col, ids, slot, full):
  """Starts loading one operand of step k of a tile to a slot."""
  side, source, smem = side_refs
  window = t.window(k)

  def copy_rows(ids, fan_out=1):
    place = dict(column=col, width=side.width, fan_out=fan_out)
    ops.copy(source, smem.at[slot], ids, window, **place)

  if side.gathered:
    return copy_rows(ids, side.fan_out)
  if not side.by_tma:
    return copy_rows(ops.range_ids(window))
  first_row = window[0]
  inside = (first_row >= t.first) & (first_row + _ROWS <= t.end)

  @pl.when(inside)
  def _():
    rows = pl.ds(pl.multiple_of(first_row, 8), _ROWS)
    plgpu.copy_gmem_to_smem(
      source.at[rows, pl.ds(col, side.block)],
      smem.at[slot],
      full.at[slot],
      collective_axes="block" if side.shared else None,
    )

  @pl.when(jnp.logical_not(inside))
  def _():
    copy_rows(ops.range_ids(window))
    # In place of TMA's arrival; the one after the copies is what counts.
    plgpu.barrier_arrive(full.at[slot])


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

  def multiply_tile(carry):
    i, step, t, held, before = carry
    following = tile(i + 1)
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
      chunks = partial_sums.join(t, chunks)
      done = t._replace(number=jnp.where(t.others < 0, -1, t.number))
    held = [chunk.astype(plan.dtype) for chunk in chunks]
    return i + 1, step + t.num_steps, following, held, done

  zero, first = jnp.int32(0), tile(0)
  none = first._replace(number=jnp.int32(-1))
  held = [
    jnp.zeros((LEFT_EACH, lt.COLUMNS), plan.dtype) for _ in columns_of_chunks
  ]
  *_, held, last = lax.while_loop(
    lambda carry: carry[2].number < plan.num_tiles,
    multiply_tile,
    (zero, zero, first, held, none),
  )
  for store in _pieces(plan, last, held, warpgroup, out, scratch["out_smem"]):
    store()
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
