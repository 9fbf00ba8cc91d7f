"""dw[e] = x_e^T y_e on Hopper: one persistent kernel, rows gathered on load.

One tile is 128 columns of one operand (left) by up to 256 of the other (right),
of one expert, contracted over that expert's rows, 64 at a time:

       rows of e, 64 a step            right: 256 columns     Two warpgroups hold
      +----+----+----+-  -+           +----------------+      64 of the 128 rows
      |////|    |    |  //| <- zero   |                |      each, in registers;
      +----+----+----+-  -+    left   |   warpgroup 0  |      a third only loads.
       ^ lo, not aligned   ^ hi 128   |----------------|
                                      |   warpgroup 1  |
                                      +----------------+

Gathered rows come by cp.async, 16 bytes a thread, which zero-fills rows outside
of [lo, hi); grouped rows by TMA, but for the first and the last step of a group:
there TMA would load a neighbour's rows, and zero times a neighbour's NaN is NaN.
The gathered operand wants the narrow side, where it costs a third of the loads.
If that is y, the tile is of the transpose, and is transposed when stored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic import row_steps
from scattermoe_jax.routing import Routing, group_offsets, input_rows

# M = columns of left, N = columns of right, K = rows of one expert, G = E

_BLOCK_LEFT = 128
_BLOCK_ROWS = row_steps.ROWS
_WARPGROUP_ROWS = _BLOCK_LEFT // 2
_STORE_COLS = 64


def group_xty(
  x: Float[Array, "rows_x d"],
  y: Float[Array, "rows_y n"],
  routing: Routing,
  *,
  x_grouped: bool = False,
  y_grouped: bool = False,
  config: TileConfig,
) -> Float[Array, "E d n"]:
  """Returns xty[e] = x_e^T y_e over the rows of expert e.

  Args:
    x: (T, d) or (S, d) scattered, or (S, d) if `x_grouped`.
    y: (T, n) or (S, n) scattered, or (S, n) if `y_grouped`.
    routing: the routing.
    x_grouped: whether x is in grouped order.
    y_grouped: whether y is.
    config: block_m columns of x and block_n of y: one of them 128, the other 64,
      128 or 256; num_stages steps of 64 rows in flight; num_sms blocks.
  """
  num_experts, num_rows = routing.num_experts, routing.num_rows
  if num_rows == 0 or 0 in (x.shape[1], y.shape[1]):
    return jnp.zeros((num_experts, x.shape[1], y.shape[1]), x.dtype)
  x_side = _side(x, x_grouped, config.block_m, num_rows)
  y_side = _side(y, y_grouped, config.block_n, num_rows)
  x_ids = input_rows(routing, x.shape[0], grouped=False)
  y_ids = input_rows(routing, y.shape[0], grouped=False)
  transposed = _is_transposed(x_side, y_side)
  plan = _Plan(
    left=y_side if transposed else x_side,
    right=x_side if transposed else y_side,
    transposed=transposed,
    num_experts=num_experts,
    dtype=jnp.dtype(x.dtype),
    num_stages=config.num_stages,
    num_sms=config.num_sms,
  )
  offsets = group_offsets(routing)
  if transposed:
    return build(plan)(y, x, y_ids, x_ids, offsets)
  return build(plan)(x, y, x_ids, y_ids, offsets)


class _Side(NamedTuple):
  """One operand: its width, its columns of a tile, and how its rows come."""

  width: int
  block: int
  gathered: bool
  by_tma: bool


class _Plan(NamedTuple):
  """All that the kernel depends on: equal plans are one compilation."""

  left: _Side
  right: _Side
  transposed: bool
  num_experts: int
  dtype: jnp.dtype
  num_stages: int
  num_sms: int

  @property
  def tiles_left(self) -> int:
    return pl.cdiv(self.left.width, self.left.block)

  @property
  def tiles_right(self) -> int:
    return pl.cdiv(self.right.width, self.right.block)

  @property
  def num_tiles(self) -> int:
    return self.num_experts * self.tiles_left * self.tiles_right

  @property
  def lag(self) -> int:
    """Steps between issuing a cp.async and announcing its arrival.

    Waiting for older copies only keeps newer ones in flight. More than stages
    less two would wait for a slot whose release waits for this announcement.
    """
    if self.left.by_tma and self.right.by_tma:
      return 0
    return min(2, self.num_stages - 2)


def _side(operand, grouped: bool, block: int, num_rows: int) -> _Side:
  width = operand.shape[1]
  # TMA reads tiles of 8 rows by 64 columns, and wants whole ones.
  by_tma = grouped and num_rows % 8 == 0 and width % 64 == 0
  return _Side(width, block, not grouped, by_tma)


def _is_transposed(x: _Side, y: _Side) -> bool:
  if x.block == y.block:
    return y.gathered and not x.gathered
  return y.block == _BLOCK_LEFT and x.block != _BLOCK_LEFT


class _Tile(NamedTuple):
  expert: Int[Array, ""]
  left_col: Int[Array, ""]
  right_col: Int[Array, ""]
  first: Int[Array, ""]  # of the group's rows
  end: Int[Array, ""]
  start: Int[Array, ""]  # of the first step, at or before `first`
  num_steps: Int[Array, ""]


def _columns(plan: _Plan, t: _Tile):
  # Said where it is used: a loop's carry forgets what divides it.
  return (
    pl.multiple_of(t.left_col, plan.left.block),
    pl.multiple_of(t.right_col, plan.right.block),
  )


@functools.cache
def build(plan: _Plan, rows=row_steps):
  """Returns the kernel for `plan`: (left, right, ids, ids, offsets) -> dw.

  Args:
    plan: everything static.
    rows: how rows are gathered: the module `row_steps`, or for the interpreter, which
      cannot run cp.async, something with the same functions.
  """
  stages, num_sms = plan.num_stages, plan.num_sms
  left_width, right_width = plan.left.width, plan.right.width
  shape = (left_width, right_width)
  if plan.transposed:
    shape = shape[::-1]
  return plgpu.kernel(
    functools.partial(_body, plan, rows),
    out_type=jax.ShapeDtypeStruct((plan.num_experts, *shape), plan.dtype),
    scratch_types=dict(
      left_smem=plgpu.SMEM(
        (stages, _BLOCK_ROWS, _BLOCK_LEFT), plan.dtype, transforms=lt.OPERAND
      ),
      right_smem=plgpu.SMEM(
        (stages, _BLOCK_ROWS, plan.right.block),
        plan.dtype,
        transforms=lt.OPERAND,
      ),
      out_smem=plgpu.SMEM(
        (2, 2, _WARPGROUP_ROWS, _STORE_COLS),
        plan.dtype,
        transforms=_store_transforms(shape[1]),
      ),
      full=plgpu.Barrier(
        num_arrivals=1 + plan.left.by_tma + plan.right.by_tma,
        num_barriers=stages,
      ),
      empty=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    ),
    grid=(num_sms,),
    grid_names=("sm",),
    num_threads=3,
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
  tiling = plgpu.TilingTransform((8, cols))
  if cols == 8:
    return (tiling,)
  return (tiling, plgpu.SwizzleTransform(2 * cols))


def _body(
  plan, rows, left, right, left_ids, right_ids, offsets, out, **scratch
):
  """One block: a loader and two multipliers, each walking the same tiles."""
  warpgroup = lax.axis_index("warpgroup")
  block = lax.axis_index("sm")
  num_tiles = (plan.num_tiles - block + (plan.num_sms - 1)) // plan.num_sms

  def tile(i) -> _Tile:
    index = jnp.minimum(block + i * plan.num_sms, plan.num_tiles - 1)
    per_expert = plan.tiles_left * plan.tiles_right
    expert, within = index // per_expert, lax.rem(index, per_expert)
    first, end = offsets[expert], offsets[expert + 1]
    start = first
    if plan.left.by_tma or plan.right.by_tma:
      start = pl.multiple_of(first // 8 * 8, 8)
    num_steps = (end - start + (_BLOCK_ROWS - 1)) // _BLOCK_ROWS
    return _Tile(
      expert,
      within // plan.tiles_right * plan.left.block,
      lax.rem(within, plan.tiles_right) * plan.right.block,
      first,
      end,
      start,
      jnp.where(end > first, num_steps, 0),
    )

  @pl.when(warpgroup == 2)
  def _():
    plgpu.set_max_registers(72, action="decrease")
    _load_tiles(
      plan, rows, tile, num_tiles, (left, left_ids), (right, right_ids), scratch
    )

  @pl.when(warpgroup < 2)
  def _():
    plgpu.set_max_registers(216, action="increase")
    _multiply_tiles(plan, tile, num_tiles, warpgroup, out, scratch)


def _load_tiles(plan, rows, tile, num_tiles, left, right, scratch):
  """Fills a ring of stages with the steps of all tiles, one after another."""
  left_smem, right_smem = scratch["left_smem"], scratch["right_smem"]
  full, empty = scratch["full"], scratch["empty"]
  stages, lag = plan.num_stages, plan.lag
  sides = (
    (plan.left, *left, left_smem),
    (plan.right, *right, right_smem),
  )

  def row_ids(t: _Tile, k):
    """Ids of the rows of step k, for the operands that read them."""
    first_row = t.start + k * _BLOCK_ROWS
    return tuple(
      rows.load_ids(ids, first_row, t.first, t.end) if side.gathered else ()
      for side, _, ids, _ in sides
    )

  def load_tile(i, carry):
    step, t, ids, after = carry
    # Ids a tile ahead, its group's offsets two: their latency is not waited for.
    next_ids, after_next = row_ids(after, 0), tile(i + 2)
    cols = _columns(plan, t)

    def load_step(k, carry):
      step, ids = carry
      slot = lax.rem(step, stages)
      next_ids = row_ids(t, k + 1)
      first_row = t.start + k * _BLOCK_ROWS
      inside = (first_row >= t.first) & (first_row + _BLOCK_ROWS <= t.end)

      # Wait until both multipliers are done with what was in this slot.
      @pl.when(step >= stages)
      def _():
        plgpu.barrier_wait(empty.at[slot])

      for (side, source, _, smem), col, my_ids in zip(
        sides, cols, ids, strict=True
      ):
        copy_rows = functools.partial(
          rows.copy, source, smem.at[slot], column=col, width=side.width
        )
        if side.gathered:
          copy_rows(my_ids)
        elif not side.by_tma:
          copy_rows(rows.range_ids(first_row, t.first, t.end))
        else:

          @pl.when(inside)
          def _(source=source, smem=smem, side=side, col=col):
            start = pl.multiple_of(first_row, 8)
            plgpu.copy_gmem_to_smem(
              source.at[pl.ds(start, _BLOCK_ROWS), pl.ds(col, side.block)],
              smem.at[slot],
              full.at[slot],
            )

          @pl.when(jnp.logical_not(inside))
          def _(copy_rows=copy_rows):
            copy_rows(rows.range_ids(first_row, t.first, t.end))
            # In place of TMA's arrival; the last one, below, is what counts.
            plgpu.barrier_arrive(full.at[slot])

      rows.commit()

      @pl.when(step >= lag)
      def _():
        rows.wait(lag)
        plgpu.barrier_arrive(full.at[lax.rem(step - lag, stages)])

      return step + 1, next_ids

    step, _ = lax.fori_loop(0, t.num_steps, load_step, (step, ids))
    return step, after, next_ids, after_next

  first = tile(0)
  num_steps, *_ = lax.fori_loop(
    0, num_tiles, load_tile, (jnp.int32(0), first, row_ids(first, 0), tile(1))
  )

  for behind in range(lag, 0, -1):

    @pl.when(num_steps >= behind)
    def _(behind=behind):
      rows.wait(behind - 1)
      plgpu.barrier_arrive(full.at[lax.rem(num_steps - behind, stages)])

  # See every release before leaving: an arrival needs its barrier.
  for i in range(stages):

    @pl.when(num_steps > i)
    def _(i=i):
      slot = lax.rem(jnp.maximum(num_steps - stages, 0) + i, stages)
      plgpu.barrier_wait(empty.at[slot])


def _multiply_tiles(plan, tile, num_tiles, warpgroup, out, scratch):
  """Sums left^T right over the steps of each tile, and stores it."""
  left_smem, right_smem = scratch["left_smem"], scratch["right_smem"]
  full, empty = scratch["full"], scratch["empty"]
  stages = plan.num_stages
  my_cols = pl.ds(warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)

  def multiply_tile(i, carry):
    step, t = carry
    following = tile(i + 1)

    def multiply(acc):
      def multiply_step(k, step):
        slot = lax.rem(step, stages)
        plgpu.barrier_wait(full.at[slot])
        plgpu.wgmma(
          acc,
          left_smem.at[slot, :, my_cols].transpose((1, 0)),
          right_smem.at[slot],
        )
        # One product in flight: the one before is done, its slot free.
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(
          empty.at[lax.rem(step + (stages - 1), stages)], predicate=k > 0
        )
        return step + 1

      last = lax.fori_loop(0, t.num_steps, multiply_step, step)
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(
        empty.at[lax.rem(last + (stages - 1), stages)],
        predicate=t.num_steps > 0,
      )
      return acc[...]

    acc = pl.run_scoped(
      multiply, plgpu.ACC((_WARPGROUP_ROWS, plan.right.block), jnp.float32)
    )
    _store_tile(plan, t, acc, warpgroup, out, scratch["out_smem"])
    return step + t.num_steps, following

  lax.fori_loop(0, num_tiles, multiply_tile, (jnp.int32(0), tile(0)))
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store_tile(plan, t: _Tile, acc, warpgroup, out, out_smem):
  """Stores a warpgroup's part of a tile; TMA drops what lies past the edges."""
  left_col, right_col = _columns(plan, t)
  rows_out = pl.ds(left_col + warpgroup * _WARPGROUP_ROWS, _WARPGROUP_ROWS)
  for i in range(plan.right.block // _STORE_COLS):
    piece = acc[:, i * _STORE_COLS : (i + 1) * _STORE_COLS].astype(plan.dtype)
    cols_out = pl.ds(right_col + i * _STORE_COLS, _STORE_COLS)
    buffer = out_smem.at[warpgroup, i % 2]
    # Two buffers: wait until TMA has read the one before last.
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    if plan.transposed:
      buffer.transpose((1, 0))[...] = piece
      target = out.at[t.expert, cols_out, rows_out]
    else:
      buffer[...] = piece
      target = out.at[t.expert, rows_out, cols_out]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)
