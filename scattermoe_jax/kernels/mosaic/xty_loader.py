"""The warpgroup of a weight gradient that loads: it keeps a ring full.

It draws the tiles, a few ahead. A step's gathered rows come by cp.async, and
are announced one step late, so that two steps are under way; TMA announces its
own.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic import tickets
from scattermoe_jax.kernels.mosaic.warpgroup_ops import ROWS
from scattermoe_jax.kernels.mosaic.xty_plan import Plan
from scattermoe_jax.kernels.mosaic.xty_tiles import Tile, columns, tile_at


def load_tiles(plan: Plan, ops, queue, parts, left, right, ids, scratch):
  """Fills a ring of stages with the steps of all tiles, one after another.

  Args:
    plan: the launch.
    ops: the module `warpgroup_ops`, or the like of it.
    queue: the numbers of the block's tiles.
    parts: of all groups.
    left: the operand of that side, in global memory.
    right: that of the other side.
    ids: the scattered row of each grouped row.
    scratch: stages in shared memory, and their barriers.
  """
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
  inside = (first_row >= t.first) & (first_row + ROWS <= t.end)

  @pl.when(inside)
  def _():
    rows = pl.ds(pl.multiple_of(first_row, 8), ROWS)
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
