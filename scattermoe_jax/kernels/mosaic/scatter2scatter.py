"""The grouped matmul of scattered or grouped rows, on Hopper.

# M = S rows, K = d (contraction), N = n (columns), G = E

A persistent kernel: one block on each streaming multiprocessor, three
warpgroups in a block. The producer fills a ring of shared-memory stages, the
consumers multiply from it and store.

            ring of stages              full[s]: stage s holds data
  producer ---> x (m, 64) --> wgmma --> empty[s]: stage s has been multiplied
     TMA or     w (64, n)     acc (m, n) float32 in registers
     cp.async   x num_stages            --> epilogue --> global memory

  cooperative   each tile is shared: consumer 0 multiplies its upper rows,
                consumer 1 its lower ones
  ping-pong     tiles alternate; each consumer has a ring of its own, and stores
                while the other multiplies

The rows of one tile belong to one expert, and its epilogue stores no others.
Rows of no group are tiles without a step: their sum stays zero.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic.gather import RowCopies
from scattermoe_jax.kernels.schedule import window_schedule
from scattermoe_jax.routing import Routing, input_rows

_CONSUMERS = 2
_PRODUCER = 2  # index of the warpgroup that loads
# One k-step of cp.async is in flight while the next is issued.
_IN_FLIGHT = 1
# Registers of a thread: 64 Ki for 384 threads, mostly for the accumulators.
_PRODUCER_REGISTERS = 56
_CONSUMER_REGISTERS = 224


class Tile(NamedTuple):
  """What a consumer's epilogue knows about the tile in its registers.

  Attributes:
    expert: its expert; E for rows of no group.
    row: grouped row of its first row, in this consumer's part.
    begin: first row of the part that is to be stored.
    end: row after the last that is to be stored.
    index_n: which tile of columns.
    consumer: which of the two consumers holds it.
  """

  expert: Array
  row: Array
  begin: Array
  end: Array
  index_n: Array
  consumer: Array


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything about a launch that is known when it is traced.

  Attributes:
    num_rows: S.
    num_experts: E.
    d_in: contraction, a multiple of 64.
    d_out: columns of w that are multiplied, a multiple of 64.
    dtype: of the operands and the stored results.
    config: the blocks.
    grouped_in: whether rows of x are grouped (TMA) or gathered (cp.async).
    transpose_w: whether w is (E, d_out, d_in).
    halves: 2 if a tile takes half of its columns from each half of w, so that
      gate and up of the same column meet in one thread; else 1.
  """

  num_rows: int
  num_experts: int
  d_in: int
  d_out: int
  dtype: Any
  config: TileConfig
  grouped_in: bool = False
  transpose_w: bool = False
  halves: int = 1

  @property
  def teams(self) -> int:
    """Rings of stages: one for each consumer in ping-pong, else one."""
    return _CONSUMERS if self.config.ping_pong else 1

  @property
  def part_m(self) -> int:
    """Rows of a tile that one consumer holds."""
    return self.config.block_m // (_CONSUMERS // self.teams)

  @property
  def part_n(self) -> int:
    """Columns of a tile in one half of w."""
    return self.config.block_n // self.halves

  @property
  def num_tiles_n(self) -> int:
    """Tiles of columns."""
    return lt.cdiv(self.d_out // self.halves, self.part_n)

  @property
  def store_slots(self) -> int:
    """Chunks of 64 columns on their way out, of each consumer."""
    return 1 if self.config.ping_pong else 2

  @property
  def num_slots(self) -> int:
    """Stages of all rings."""
    return self.teams * self.config.num_stages


def multiply(
  x: Float[Array, "rows d"],
  w: Float[Array, "E _ _"],
  routing: Routing,
  epilogue: Any,
  plan: Plan,
  rows_type: Any = RowCopies,
) -> list[Array]:
  """Multiplies every row by its expert's matrix; returns what is stored.

  Args:
    x: the rows.
    w: the matrices.
    routing: which row belongs to which expert.
    epilogue: what is made of the products (`epilogues`).
    plan: the launch.
    rows_type: how gathered rows are copied.
  """
  config, teams = plan.config, plan.teams
  stages = config.num_stages
  align = 8 if plan.grouped_in else 1
  windows = window_schedule(
    routing.group_sizes, plan.num_rows, config.block_m, align
  )
  length = windows.expert_ids.shape[0]
  steps_k = plan.d_in // config.block_k
  rows = rows_type(plan.d_in)

  def body(x, w, ids, *refs):
    schedule, refs = refs[:5], refs[5:]
    extra, refs = refs[: len(operands)], refs[len(operands) :]
    outs, refs = refs[: len(out_types)], refs[len(out_types) :]
    x_smem, w_smem, full, empty, *scratch = refs
    warpgroup = lax.axis_index("warpgroup")
    block = lax.axis_index("block")
    num_tiles_m = schedule[4][0]
    num_tiles = num_tiles_m * plan.num_tiles_n
    mine = (num_tiles - block + config.num_sms - 1) // config.num_sms

    def index_of(t):
      """Returns (row tile, column tile) of this block's t-th tile."""
      linear = block + t * config.num_sms
      band, place = _divide(linear, config.band_m * plan.num_tiles_n)
      first = band * config.band_m
      height = jnp.minimum(config.band_m, num_tiles_m - first)
      height = jnp.maximum(height, 1)
      return first + lax.rem(place, height), place // height

    def entry(t):
      """Loads the t-th tile's row of the schedule; used a tile later."""
      index_m = jnp.clip(index_of(t)[0], 0, length - 1)
      return tuple(ref[index_m] for ref in schedule[:4])

    def num_steps(expert):
      return jnp.where(expert < plan.num_experts, steps_k, 0)

    @pl.when(warpgroup == _PRODUCER)
    def produce():
      plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

      def locate(loaded):
        _, first, _, end = loaded
        if plan.grouped_in:
          return ()
        return rows.locate(ids, first, end, config.block_m)

      def load_tile(t, carry):
        steps, previous, now, places, soon = carry
        # One tile ahead: its rows' places, and the entry after that.
        next_places, later = locate(soon), entry(t + 2)
        expert, first, _, _ = now
        team = lax.rem(t, teams)
        index_n = index_of(t)[1]
        first = pl.multiple_of(first, align)

        def load_step(k, carry):
          step, previous = carry
          slot = team * stages + lax.rem(step, stages)
          column = k * config.block_k

          # Wait until the consumers have multiplied what the stage held.
          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(empty.at[slot])

          for half in range(plan.halves):
            source, target = _w_slices(plan, expert, column, index_n, half)
            plgpu.copy_gmem_to_smem(
              w.at[source], w_smem.at[slot, *target], full.at[slot]
            )
          if plan.grouped_in:
            plgpu.copy_gmem_to_smem(
              x.at[pl.ds(first, config.block_m), pl.ds(column, config.block_k)],
              x_smem.at[slot],
              full.at[slot],
            )
          else:
            rows.load(x, x_smem.at[slot], places, column, full.at[slot])

            @pl.when(previous >= 0)
            def _():
              rows.arrive(full.at[jnp.maximum(previous, 0)], _IN_FLIGHT)

          return step + 1, slot

        step, previous = lax.fori_loop(
          0, num_steps(expert), load_step, (_pick(steps, team), previous)
        )
        return _put(steps, team, step), previous, soon, next_places, later

      zero = jnp.int32(0)
      now = entry(0)
      steps, previous, *_ = lax.fori_loop(
        0,
        mine,
        load_tile,
        ((zero,) * teams, jnp.int32(-1), now, locate(now), entry(1)),
      )
      if not plan.grouped_in:

        @pl.when(previous >= 0)
        def _():
          rows.arrive(full.at[jnp.maximum(previous, 0)], 0)

      # Wait for the release of every stage that was used: a barrier may not
      # go while someone is about to arrive at it.
      for team in range(teams):
        for s in range(stages):

          @pl.when(steps[team] > s)
          def _(team=team, s=s):
            oldest = jnp.maximum(steps[team] - stages, 0)
            slot = team * stages + lax.rem(oldest + s, stages)
            plgpu.barrier_wait(empty.at[slot])

    @pl.when(warpgroup != _PRODUCER)
    def consume():
      plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
      # Ping-pong: the whole of every other tile. Else a part of every tile.
      team = warpgroup if teams > 1 else jnp.int32(0)
      part = 0 if teams > 1 else warpgroup * plan.part_m

      def multiply_tile(i, carry):
        step, now = carry
        t = i * teams + team
        soon = entry(t + teams)
        expert, first, begin, end = now
        steps_here = num_steps(expert)

        def accumulate(acc):
          def multiply_step(k, step):
            slot = team * stages + lax.rem(step, stages)
            plgpu.barrier_wait(full.at[slot])
            x_part = x_smem.at[slot, pl.ds(part, plan.part_m)]
            w_part = w_smem.at[slot]
            if plan.transpose_w:
              w_part = w_part.transpose((1, 0))
            plgpu.wgmma(acc, x_part, w_part)
            # The product before this one is done: its stage can be refilled.
            plgpu.wgmma_wait(1)
            before = team * stages + lax.rem(step + stages - 1, stages)
            plgpu.barrier_arrive(empty.at[before], predicate=k > 0)
            return step + 1

          last = lax.fori_loop(0, steps_here, multiply_step, step)
          plgpu.wgmma_wait(0)
          before = team * stages + lax.rem(last + stages - 1, stages)
          plgpu.barrier_arrive(empty.at[before], predicate=steps_here > 0)
          return acc[...]

        acc = pl.run_scoped(
          accumulate, plgpu.ACC((plan.part_m, config.block_n), jnp.float32)
        )
        tile = Tile(
          expert=expert,
          row=first + part,
          begin=jnp.clip(begin - part, 0, plan.part_m),
          end=jnp.clip(end - part, 0, plan.part_m),
          index_n=index_of(t)[1],
          consumer=warpgroup,
        )
        epilogue.store(plan, acc, tile, extra, outs, scratch, rows)
        return step + steps_here, soon

      tiles = (mine - team + teams - 1) // teams
      lax.fori_loop(0, tiles, multiply_tile, (jnp.int32(0), entry(team)))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  operands = epilogue.operands(plan)
  out_types = epilogue.out_types(plan)
  w_stage = (config.block_k, config.block_n)
  kernel = plgpu.kernel(
    body,
    out_type=out_types,
    scratch_types=[
      plgpu.SMEM(
        (plan.num_slots, config.block_m, config.block_k),
        plan.dtype,
        transforms=lt.OPERAND,
      ),
      plgpu.SMEM(
        (plan.num_slots, *(w_stage[::-1] if plan.transpose_w else w_stage)),
        plan.dtype,
        transforms=lt.OPERAND,
      ),
      plgpu.Barrier(
        num_arrivals=plan.halves + (1 if plan.grouped_in else rows.arrivals),
        num_barriers=plan.num_slots,
      ),
      plgpu.Barrier(
        num_arrivals=_CONSUMERS // teams, num_barriers=plan.num_slots
      ),
      *epilogue.scratch_types(plan),
    ],
    grid=(config.num_sms,),
    grid_names=("block",),
    num_threads=_CONSUMERS + 1,
    thread_name="warpgroup",
    kernel_name=epilogue.name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      unsafe_no_auto_barriers=True,
    ),
  )
  ids = input_rows(routing, x.shape[0], grouped=plan.grouped_in)
  *schedule, num_tiles = windows
  return kernel(x, w, ids, *schedule, num_tiles[None], *operands)


def _w_slices(plan: Plan, expert, column, index_n, half: int):
  """Returns the slices of w and of its stage for one half of a k-step."""
  ks = pl.ds(column, plan.config.block_k)
  first = index_n * plan.part_n + half * (plan.d_out // plan.halves)
  ns = pl.ds(first, plan.part_n)
  target = pl.ds(half * plan.part_n, plan.part_n)
  if plan.transpose_w:
    return (expert, ns, ks), (target, slice(None))
  return (expert, ks, ns), (slice(None), target)


def _divide(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
  return a // b, lax.rem(a, b)


def _pick(values: tuple, index):
  return values[0] if len(values) == 1 else jnp.where(index == 0, *values)


def _put(values: tuple, index, value) -> tuple:
  if len(values) == 1:
    return (value,)
  return tuple(
    jnp.where(index == i, value, old) for i, old in enumerate(values)
  )
