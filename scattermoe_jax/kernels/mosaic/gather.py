"""Rows that lie anywhere: loaded by cp.async, stored 16 bytes at a time.

TMA moves boxes, so a row of its own costs a copy of its own. cp.async moves 16
bytes for each thread from any address, writes them to shared memory where the
swizzle wants them, and needs no registers on the way:

  thread            t = 8 r + c         r in 0..15, c in 0..7
  global memory     row ids[r + 16 i]   chunk c of 64 columns   i = 0, 1, ...
  shared memory     row r + 16 i        chunk c ^ (r % 8)

Eight threads read one 128-byte line, and the row is the only thing that is
looked up: once per tile, not once per step, and a tile ahead.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from scattermoe_jax.kernels.mosaic import layouts as lt

_ROWS_AT_ONCE = lt.WARPGROUP // lt.CHUNKS

_BARRIER_BYTES = 8
_ARRIVE = "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];"
_ARRIVE_LANDED = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];"
_WAIT = """{
  .reg .pred done;
  look:
  mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;
  @done bra leave;
  bra look;
  leave:
}"""


class RowCopies(NamedTuple):
  """Loads and stores of gathered rows by one warpgroup.

  The one part of the kernels that Mosaic's interpreter cannot run; its tests
  put copies of single rows in its place.

  Attributes:
    width: columns of the array whose rows are moved, a multiple of 64.
    fan_out: ids that name the same row, one after another.
  """

  width: int
  fan_out: int = 1

  @property
  def arrivals(self) -> int:
    """Arrivals on a stage's barrier that stand for its gathered rows."""
    return 1

  def ids_type(self, block_rows: int) -> jax.ShapeDtypeStruct:
    """Returns the type of what `look_up` returns for so many rows."""
    count = block_rows // _ROWS_AT_ONCE
    return jax.ShapeDtypeStruct((count * lt.WARPGROUP,), jnp.int32)

  def look_up(self, ids, first, num_rows, block_rows: int) -> jax.Array:
    """Returns the ids of those of `block_rows` rows that this thread copies.

    Nothing is computed from them here: the thread would wait for memory.

    Args:
      ids: the row at each position, times `fan_out`, or up to `fan_out` - 1
        more; in global memory.
      first: position of the tile's first row.
      num_rows: rows of the tile that exist; later ones repeat the last, and
        what a tile of none repeats is not stored.
      block_rows: rows to look up.
    """
    count = block_rows // _ROWS_AT_ONCE
    last_id = ids.shape[0] - 1

    @plgpu.inline_mgpu(
      arg_types=(plgpu.RefType(), lt.SCALAR, lt.SCALAR),
      return_type=lt.per_thread_type(count),
    )
    def look_up(_, ids, first, num_rows):
      first, num_rows = lt.scalar(first), lt.scalar(num_rows)
      row, _ = _row_and_chunk()
      last = arith.maxsi(arith.subi(num_rows, lt.const(1)), lt.const(0))
      found = []
      for i in range(count):
        row_i = arith.addi(row, lt.const(i * _ROWS_AT_ONCE))
        position = arith.addi(first, arith.minsi(row_i, last))
        position = arith.minsi(position, lt.const(last_id))
        found.append(lt.load_id(ids, position))
      return lt.pack(found, count)

    return look_up(ids, lt.int32(first), lt.int32(num_rows))

  def consecutive(self, first, block_rows: int) -> jax.Array:
    """Returns what `look_up` would of ids that count up from `first`."""
    count = block_rows // _ROWS_AT_ONCE

    @plgpu.inline_mgpu(
      arg_types=(lt.SCALAR,), return_type=lt.per_thread_type(count)
    )
    def count_up(_, first):
      row, _ = _row_and_chunk()
      row = arith.addi(row, lt.computed_here(lt.scalar(first)))
      steps = [lt.const(i * _ROWS_AT_ONCE) for i in range(count)]
      return lt.pack([arith.addi(row, step) for step in steps], count)

    return count_up(lt.int32(first))

  def load(self, x, x_smem, my_ids, column, barrier, *, offset: int) -> None:
    """Starts the copy of 64 columns of the rows of `my_ids` into a stage.

    Announced by `arrive`, or by themselves by `arrive_landed`.

    Args:
      x: the rows, in global memory.
      x_smem: the stage.
      my_ids: from `look_up`.
      column: a column.
      barrier: of the stage; unused.
      offset: what is added to `column`, a constant, so that copies of the same
        `column` share their addresses.
    """
    del barrier
    count = my_ids.shape[0] // lt.WARPGROUP

    @plgpu.inline_mgpu(
      arg_types=(
        plgpu.RefType(),
        plgpu.RefType(lt.OPERAND),
        lt.per_thread(count),
        lt.SCALAR,
      )
    )
    def load(_, x, x_smem, my_ids, column):
      target = lt.at_byte(
        lt.shared_pointer(x_smem), lt.swizzled(*_row_and_chunk())
      )
      row_ids = lt.unpack(my_ids)
      for i, source in enumerate(self._addresses(x, row_ids, column)):
        nvvm.cp_async_shared_global(
          lt.at_byte(target, i * _ROWS_AT_ONCE * 128),
          lt.at_byte(source, offset // lt.CHUNK * 16),
          16,
          nvvm.LoadCacheModifierKind.CG,
        )
      nvvm.cp_async_commit_group()
      return ()

    load(x, x_smem, my_ids, lt.int32(column))

  def arrive(self, barrier, in_flight: int) -> None:
    """Reports the stage before the last `in_flight` ones to its barrier."""
    lt.wait_async_copies(in_flight)
    plgpu.barrier_arrive(barrier)

  def landed_type(self, stages: int) -> Any:
    """Returns the type of barriers at which copies arrive by themselves.

    Pallas hands out no address of its own ones: these are words of shared
    memory, two for each stage.
    """
    return plgpu.SMEM((2 * stages,), jnp.int32)

  def make_barriers(self, landed) -> None:
    """Makes barriers of the words; for the warpgroup that loads.

    Who waits for anything that it announces later, finds them made.
    """
    stages = landed.shape[0] // 2

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def make(_, landed):
      text = "@$0 mbarrier.init.shared::cta.b64 [$1], $2;"
      for slot in range(stages):
        barrier = _barrier(landed, lt.const(slot))
        operands = [lt.is_thread(0), barrier, lt.const(lt.WARPGROUP)]
        lt.run_ptx(text, "b,r,r", operands)
      return ()

    make(landed)
    plgpu.commit_smem()  # Until all threads may arrive.

  def arrive_landed(self, landed, slot) -> None:
    """Lets all copies that were started arrive at a barrier, once there."""
    _at_barrier(_ARRIVE_LANDED, landed, slot)

  def pass_landed(self, landed, slot) -> None:
    """Arrives at the barrier of a stage that is filled without gathered rows.

    At once, so that who waits for the stage's next rows finds this turn over.
    """
    _at_barrier(_ARRIVE, landed, slot)

  def wait_landed(self, landed, slot, turn) -> None:
    """Waits for copies into a stage; then the tensor core may read it.

    Args:
      landed: the barriers.
      slot: the stage.
      turn: how often the stage was filled before.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), lt.SCALAR, lt.SCALAR))
    def wait(_, landed, slot, turn):
      parity = arith.andi(lt.scalar(turn), lt.const(1))
      barrier = _barrier(landed, lt.scalar(slot))
      lt.run_ptx(_WAIT, "r,r", [barrier, parity])
      lt.fence_async_shared()
      return ()

    wait(landed, lt.int32(slot), lt.int32(turn))

  def store(self, y_smem, y, my_ids, column, begin, end) -> None:
    """Stores rows [begin, end) of 64 columns to the rows of `my_ids`."""
    count = my_ids.shape[0] // lt.WARPGROUP

    @plgpu.inline_mgpu(
      arg_types=(
        plgpu.RefType(lt.BY_ROW),
        plgpu.RefType(),
        lt.per_thread(count),
        lt.SCALAR,
        lt.SCALAR,
        lt.SCALAR,
      )
    )
    def store(_, y_smem, y, my_ids, column, begin, end):
      row, chunk = _row_and_chunk()
      source = lt.at_byte(lt.shared_pointer(y_smem), lt.swizzled(row, chunk))
      begin, end = lt.scalar(begin), lt.scalar(end)
      quad = ir.VectorType.get((4,), lt.i32())
      row_ids = [lt.computed_here(row_id) for row_id in lt.unpack(my_ids)]
      for i, target in enumerate(self._addresses(y, row_ids, column)):
        row_i = arith.addi(row, lt.const(i * _ROWS_AT_ONCE))
        live = arith.andi(
          arith.cmpi(arith.CmpIPredicate.sge, row_i, begin),
          arith.cmpi(arith.CmpIPredicate.slt, row_i, end),
        )
        words = llvm.load(
          quad, lt.at_byte(source, i * _ROWS_AT_ONCE * 128), alignment=16
        )
        _store_quad(live, target, words)
      return ()

    column, begin, end = map(lt.int32, (column, begin, end))
    store(y_smem, y, my_ids, column, begin, end)

  def _addresses(self, array, row_ids, column) -> list[ir.Value]:
    """Returns where this thread's chunks of 64 columns are."""
    _, chunk = _row_and_chunk()
    first = arith.divui(lt.scalar(column), lt.const(lt.CHUNK))
    # Added last is what differs by thread, in 32 bits and the same all along
    # the row: in 64 bits each pointer would be moved on by itself.
    pointer = lt.at_chunk(lt.global_pointer(array), first)
    rows = [
      lt.row_chunk(row_id, self.fan_out, self.width) for row_id in row_ids
    ]
    return [lt.at_chunk(pointer, arith.addi(row, chunk)) for row in rows]


def _at_barrier(text: str, landed, slot) -> None:
  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), lt.SCALAR))
  def run(_, landed, slot):
    lt.run_ptx(text, "r", [_barrier(landed, lt.scalar(slot))])
    return ()

  run(landed, lt.int32(slot))


def _barrier(landed, slot: ir.Value) -> ir.Value:
  place = arith.muli(slot, lt.const(_BARRIER_BYTES))
  return lt.at_byte(lt.shared_pointer(landed), place)


def _row_and_chunk() -> tuple[ir.Value, ir.Value]:
  thread = lt.thread_index()
  return (
    arith.shrui(thread, lt.const(3)),
    arith.andi(thread, lt.const(lt.CHUNKS - 1)),
  )


def _store_quad(live: ir.Value, pointer: ir.Value, quad: ir.Value) -> None:
  # A predicated store: a branch around each would cost more than the store.
  lt.run_ptx(
    "@$0 st.global.v4.b32 [$1], {$2, $3, $4, $5};",
    "b,l,r,r,r,r",
    [live, pointer, *lt.elements(quad)],
  )
