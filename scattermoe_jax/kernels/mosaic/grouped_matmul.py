"""The grouped matmul of scattered or grouped rows, on Hopper.

# M = S rows, K = d (contraction), N = n (columns), G = E

A persistent kernel: one block on each streaming multiprocessor, three
warpgroups in a block. The producer (`matmul_loader`) fills a ring of
shared-memory stages, the consumers multiply from it and store.

            ring of stages              full[s]: stage s holds data
  producer ---> x (m, 64) --> wgmma --> empty[s]: stage s may be filled
     TMA or     w (64, n)     acc (m, n) float32 in registers
     cp.async   x num_stages            --> epilogue --> global memory

Where matrices are large, blocks are clusters of two, on tiles one below the
other. If both are of one expert, each loads half of its w into both: half the
bytes from L2. A stage is empty once both blocks have multiplied it.

The consumers share each tile: one multiplies its upper rows, one its lower. A
sum that fits in registers beside the next one is stored while that is made.
The rows of one tile belong to one expert, and its epilogue stores no others.
Rows of no group are tiles without a step: their sum stays zero.
"""

import contextlib
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from scattermoe_jax._compat import vary_over, varying_axes
from scattermoe_jax.kernels.mosaic import clusters
from scattermoe_jax.kernels.mosaic import layouts as lt
from scattermoe_jax.kernels.mosaic.gather import RowCopies
from scattermoe_jax.kernels.mosaic.matmul_loader import (
  Loader,
  Sources,
  Stages,
  arrivals,
  copies_arrive,
)
from scattermoe_jax.kernels.mosaic.matmul_tiles import (
  CONSUMERS,
  Entry,
  Plan,
  Tile,
  Walk,
)
from scattermoe_jax.kernels.mosaic.pieces import store_between
from scattermoe_jax.kernels.schedule import WindowSchedule, window_schedule
from scattermoe_jax.routing import Routing

_PRODUCER = 2  # index of the warpgroup that loads


class _Registers(NamedTuple):
  """Registers of a thread: 64 Ki for 384 threads, mostly for sums."""

  producer: int
  consumer: int


# What is spilled goes by way of the little L1 that the ring leaves: dear, even
# where a tile spills once. A finished tile held beside the next sum takes the
# most; a fused product has some to spare for the addresses of gathered rows.
_REGISTERS = _Registers(56, 224)
_FUSED_GATHERED_REGISTERS = _Registers(72, 216)


def multiply(
  x: Float[Array, "rows d"],
  w: Float[Array, "E _ _"],
  routing: Routing,
  epilogue: Any,
  plan: Plan,
  slice_index: Int[Array, ""] | None = None,
) -> list[Array]:
  """Multiplies every row by its expert's matrix; returns what is stored.

  Args:
    x: the rows.
    w: the matrices.
    routing: which row belongs to which expert.
    epilogue: what is made of the products (`epilogues`).
    plan: the launch.
    slice_index: which slice of `plan.d_out` columns of w is multiplied; None if
      w has no more.
  """
  config, stages = plan.config, plan.config.num_stages
  schedule = window_schedule(routing.group_sizes, plan.num_rows, *plan.windows)
  slices = [] if slice_index is None else [slice_index[None]]
  lands = copies_arrive(plan, epilogue)
  rows = RowCopies(plan.d_in, plan.num_rows // x.shape[0])
  registers = _REGISTERS
  if not (plan.grouped_in or epilogue.holds):
    registers = _FUSED_GATHERED_REGISTERS

  def body(x, w, ids, *refs):
    windows, refs = refs[: len(schedule)], refs[len(schedule) :]
    index, refs = refs[: len(slices)], refs[len(slices) :]
    extra, refs = refs[: len(operands)], refs[len(operands) :]
    outs, refs = refs[: len(out_types)], refs[len(out_types) :]
    x_smem, w_smem, full, empty, *scratch = refs
    landed = scratch.pop() if lands else None
    warpgroup = lax.axis_index("warpgroup")
    walk = Walk.of(plan, WindowSchedule(*windows))

    @pl.when(warpgroup == _PRODUCER)
    def produce():
      plgpu.set_max_registers(registers.producer, action="decrease")
      sources = Sources(x, w, ids, index[0] if index else None, extra)
      ring = Stages(x_smem, w_smem, full, empty, landed)
      Loader(plan, epilogue, rows, walk, sources, ring).load_tiles()

    @pl.when(warpgroup != _PRODUCER)
    def consume():
      plgpu.set_max_registers(registers.consumer, action="increase")
      # At first all stages are empty.
      for slot in range(stages):
        plgpu.barrier_arrive(empty.at[slot])
      part = warpgroup * plan.part_m

      def tile_of(t, now: Entry):
        index_m, index_n = walk.index_of(t)
        return Tile(
          expert=now.expert,
          row=now.first + part,
          begin=jnp.clip(now.begin - part, 0, plan.part_m),
          end=jnp.clip(now.end - part, 0, plan.part_m),
          index_m=index_m + walk.block_index,
          index_n=index_n,
          part=part,
          consumer=warpgroup,
        )

      def products(step, steps_here, pieces=()):
        """Returns a tile's sums; stores `pieces` between its products."""
        at_once = max(lt.cdiv(len(pieces), plan.steps), 1)

        @pl.when(steps_here == 0)
        def _():
          for store in pieces:
            store()

        def accumulate(*accs):
          def multiply_step(k, carry):
            step, before = carry
            slot = lt.rem(step, stages)
            plgpu.barrier_wait(full.at[slot])
            if lands:
              rows.wait_landed(landed, slot, step // stages)
            x_part = x_smem.at[slot, pl.ds(part, plan.part_m)]
            for half, acc in enumerate(accs):
              w_half = w_smem.at[slot, half]
              if plan.transpose_w:
                w_half = w_half.transpose((1, 0))
              plgpu.wgmma(acc, x_part, w_half)
            # The step before this one is done: its stage can be refilled.
            plgpu.wgmma_wait(plan.halves)
            plgpu.barrier_arrive(empty.at[before], predicate=k > 0)
            store_between(pieces, k, at_once=at_once)
            return step + 1, slot

          _, last = lax.fori_loop(
            0, steps_here, multiply_step, (step, jnp.int32(0))
          )
          plgpu.wgmma_wait(0)
          plgpu.barrier_arrive(empty.at[last], predicate=steps_here > 0)
          return [acc[...] for acc in accs]

        acc_type = plgpu.ACC((plan.part_m, plan.part_n), jnp.float32)
        return pl.run_scoped(accumulate, *[acc_type] * plan.halves)

      def store_pieces(held, tile):
        return epilogue.pieces(plan, held, tile, extra, outs, scratch, rows)

      def multiply_and_hold(t, carry):
        """Stores the tile before between the products of this one, if any."""
        step, now, held, before = carry
        soon = walk.entry(t + 1)
        here = jnp.where(t < walk.num_tiles, walk.num_steps(now.expert), 0)
        accs = products(step, here, store_pieces(held, before))
        tile = tile_of(t, now)
        held = epilogue.hold(plan, accs, tile, extra, rows)
        return step + here, soon, held, tile

      def multiply_and_store(t, carry):
        step, now = carry
        soon = walk.entry(t + 1)
        here = walk.num_steps(now.expert)
        accs = products(step, here)
        step += here

        @contextlib.contextmanager
        def loaded(j):
          """Lends this consumer's rows of what `load` put into a stage."""
          slot = lt.rem(step + j, stages)
          plgpu.barrier_wait(full.at[slot])
          part_rows = pl.ds(part, plan.part_m)
          yield x_smem.at[slot, part_rows], w_smem.at[slot, 0, part_rows]
          # TMA may write only after all threads have read.
          plgpu.commit_smem()
          plgpu.barrier_arrive(empty.at[slot])

        epilogue.store(
          plan, accs, tile_of(t, now), extra, outs, scratch, rows, loaded
        )
        return step + epilogue.num_loads(plan), soon

      start = (jnp.int32(0), walk.entry(0))
      if not epilogue.holds:
        lax.fori_loop(0, walk.num_tiles, multiply_and_store, start)
      else:
        # Before the first tile there is one without rows; a turn more stores
        # the last, where code of its own would be compiled once more.
        tile = tile_of(0, start[1])
        tile = tile._replace(end=tile.begin)
        held = [
          jnp.zeros(a.shape, a.dtype) for a in epilogue.held_types(plan, rows)
        ]
        lax.fori_loop(
          0, walk.num_tiles + 1, multiply_and_hold, (*start, held, tile)
        )

      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  operands, out_types = epilogue.operands(plan), epilogue.out_types(plan)
  w_stage = (config.block_k, plan.part_n)
  kernel = plgpu.kernel(
    body,
    out_type=out_types,
    scratch_types=[
      plgpu.SMEM(
        (stages, config.block_m, config.block_k),
        plan.dtype,
        transforms=lt.OPERAND,
      ),
      plgpu.SMEM(
        (
          stages,
          plan.halves,
          *(w_stage[::-1] if plan.transpose_w else w_stage),
        ),
        plan.dtype,
        transforms=lt.OPERAND,
      ),
      plgpu.Barrier(num_arrivals=arrivals(plan, rows), num_barriers=stages),
      clusters.barriers(plan.cluster, CONSUMERS, stages),
      *epilogue.scratch_types(plan),
      *([rows.landed_type(stages)] if lands else []),
    ],
    **clusters.grid(config.num_sms, plan.cluster),
    num_threads=CONSUMERS + 1,
    thread_name="warpgroup",
    kernel_name=epilogue.name,
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      unsafe_no_auto_barriers=True,
      approx_math=epilogue.approximates,
      # Threads that hold a row are of one warp: they sum by shuffles.
      reduction_scratch_bytes=0,
    ),
  )
  outs = kernel(x, w, routing.scattered_ids, *schedule, *slices, *operands)
  # plgpu.kernel forgets over which mesh axes its results differ.
  return vary_over(outs, varying_axes(x, w, routing, operands))
