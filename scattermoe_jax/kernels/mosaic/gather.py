"""Rows that lie anywhere: loaded by cp.async, stored from registers.

TMA moves boxes, so a row of its own costs a copy of its own. cp.async moves 16
bytes for each thread from any address, writes them to shared memory where the
swizzle wants them, and needs no registers on the way:

  thread            t = 8 r + c         r in 0..15, c in 0..7
  global memory     row ids[r + 16 i]   chunk c of 64 columns   i = 0, 1, ...
  shared memory     row r + 16 i        chunk c ^ (r % 8)

Eight threads read one 128-byte line, and the row is the only thing that is
looked up: once per tile, not once per step.

The tensor core leaves sums in registers, two neighbours of a row in a thread,
eight in a quad of four threads. Four such groups of eight are transposed in the
quad, so that each thread stores 16 bytes, and a quad 64 bytes of one row:

  thread  q0  q1  q2  q3              q0   q1   q2   q3
  group 0 01  23  45  67              01   89   ..   ..
  group 1 89  ..  ..  ..     --->     23   ..   ..   ..
  group 2 ..  ..  ..  ..              45   ..   ..   ..
  group 3 ..  ..  ..  ..              67   ..   ..   ..

Such stores need no shared memory, no barrier and no wait, go to any row, and
end at any row: on an H200 they beat shared memory and TMA.
"""

from typing import NamedTuple

import jax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from scattermoe_jax.kernels.mosaic import layouts as lt

_ROWS_AT_ONCE = lt.WARPGROUP // lt.CHUNKS
_QUADS = lt.WARPGROUP // 4


class RowCopies(NamedTuple):
  """Loads and stores of gathered rows by one warpgroup.

  The one part of the kernels that Mosaic's interpreter cannot run; its tests
  put copies of single rows in its place.

  Attributes:
    width: columns of the array whose rows are moved, a multiple of 64.
  """

  width: int

  # Arrivals on a stage's barrier that stand for its gathered rows.
  arrivals = 1

  def locate(self, ids, first, num_rows, block_rows: int) -> jax.Array:
    """Returns where this thread's chunks of `block_rows` rows begin.

    Args:
      ids: the row at each position; in global memory.
      first: position of the tile's first row.
      num_rows: rows of the tile that exist; later ones repeat the last, and
        what a tile of none repeats is not stored.
      block_rows: rows to locate.
    """
    count = block_rows // _ROWS_AT_ONCE
    last_id = ids.shape[0] - 1

    @plgpu.inline_mgpu(
      arg_types=(plgpu.RefType(), lt.SCALAR, lt.SCALAR),
      return_type=lt.per_thread_type(count),
    )
    def locate(_, ids, first, num_rows):
      first, num_rows = lt.scalar(first), lt.scalar(num_rows)
      row, chunk = _row_and_chunk()
      last = arith.maxsi(arith.subi(num_rows, lt.const(1)), lt.const(0))
      chunks = []
      for i in range(count):
        row_i = arith.addi(row, lt.const(i * _ROWS_AT_ONCE))
        position = arith.addi(first, arith.minsi(row_i, last))
        position = arith.minsi(position, lt.const(last_id))
        start = arith.muli(
          lt.load_id(ids, position), lt.const(self.width // lt.CHUNK)
        )
        chunks.append(arith.addi(start, chunk))
      return lt.pack(chunks, count)

    return locate(ids, lt.int32(first), lt.int32(num_rows))

  def load(self, x, x_smem, places, column, barrier) -> None:
    """Starts the copy of 64 columns of the rows at `places` into a stage.

    Counted by `arrive`, not by `barrier`.
    """
    del barrier
    count = places.shape[0] // lt.WARPGROUP

    @plgpu.inline_mgpu(
      arg_types=(
        plgpu.RefType(),
        plgpu.RefType(lt.OPERAND),
        lt.per_thread(count),
        lt.SCALAR,
      )
    )
    def load(_, x, x_smem, places, column):
      source = lt.global_pointer(x)
      target = lt.at_byte(
        lt.shared_pointer(x_smem), lt.swizzled(*_row_and_chunk())
      )
      first = arith.divui(lt.scalar(column), lt.const(lt.CHUNK))
      for i, place in enumerate(lt.unpack(places)):
        nvvm.cp_async_shared_global(
          lt.at_byte(target, i * _ROWS_AT_ONCE * 128),
          lt.at_chunk(source, arith.addi(place, first)),
          16,
          nvvm.LoadCacheModifierKind.CG,
        )
      nvvm.cp_async_commit_group()
      return ()

    load(x, x_smem, places, lt.int32(column))

  def arrive(self, barrier, in_flight: int) -> None:
    """Reports the stage before the last `in_flight` ones to its barrier."""
    lt.wait_async_copies(in_flight)
    plgpu.barrier_arrive(barrier)

  def locate_out(self, ids, row, block_rows: int) -> jax.Array:
    """Returns where this thread's parts of `block_rows` stored rows begin.

    Args:
      ids: the row at each position, in global memory; None for the identity.
      row: position of the first row.
      block_rows: rows to locate, a multiple of 64.
    """
    count = block_rows // _QUADS
    refs = [] if ids is None else [ids]

    @plgpu.inline_mgpu(
      arg_types=(*[plgpu.RefType() for _ in refs], lt.SCALAR),
      return_type=lt.per_thread_type(count),
    )
    def locate(_, *args):
      *refs, first = args
      lane = arith.andi(lt.thread_index(), lt.const(3))
      places = []
      for row in _quad_rows(count):
        place = arith.addi(lt.scalar(first), row)
        for ref in refs:
          last = lt.const(ids.shape[0] - 1)
          place = lt.load_id(ref, arith.minsi(place, last))
        place = arith.muli(place, lt.const(self.width // lt.CHUNK))
        places.append(arith.addi(place, lane))
      return lt.pack(places, count)

    return locate(*refs, lt.int32(row))

  def store(self, values, y, places, column, begin, end) -> None:
    """Stores rows [begin, end) of 64 columns to the rows at `places`.

    Args:
      values: (block_rows, 64) of 16 bits, as the tensor core leaves them.
      y: where to, in global memory.
      places: from `locate_out`.
      column: first of the columns.
      begin: first row that is stored.
      end: row after the last that is.
    """
    count = places.shape[0] // lt.WARPGROUP

    @plgpu.inline_mgpu(
      arg_types=(
        plgpu.Layout.WGMMA,
        plgpu.RefType(),
        lt.per_thread(count),
        lt.SCALAR,
        lt.SCALAR,
        lt.SCALAR,
      )
    )
    def store(_, values, y, places, column, begin, end):
      target = lt.global_pointer(y)
      first = arith.divui(lt.scalar(column), lt.const(lt.CHUNK))
      begin, end = lt.scalar(begin), lt.scalar(end)
      # (block of 64 rows, group of 8 columns, half of 16 rows) of a thread
      words = values.registers.reshape(-1, lt.CHUNKS, 2)
      located = zip(_quad_rows(count), lt.unpack(places), strict=True)
      for i, (row, place) in enumerate(located):
        live = arith.andi(
          arith.cmpi(arith.CmpIPredicate.sge, row, begin),
          arith.cmpi(arith.CmpIPredicate.slt, row, end),
        )
        start = lt.at_chunk(target, arith.addi(place, first))
        for group in range(0, lt.CHUNKS, 4):
          quad = _transpose_quad(list(words[i // 2, group : group + 4, i % 2]))
          _store_quad(live, lt.at_byte(start, group * 16), quad)
      return ()

    column, begin, end = map(lt.int32, (column, begin, end))
    store(values, y, places, column, begin, end)


def _row_and_chunk() -> tuple[ir.Value, ir.Value]:
  thread = lt.thread_index()
  return (
    arith.shrui(thread, lt.const(3)),
    arith.andi(thread, lt.const(lt.CHUNKS - 1)),
  )


def _quad_rows(count: int) -> list[ir.Value]:
  """Returns the rows whose sums this thread's quad holds.

  A warp holds 16 rows of each 64, a quad rows r and r + 8 of them.
  """
  thread = lt.thread_index()
  warp = arith.shrui(thread, lt.const(5))
  quad = arith.andi(arith.shrui(thread, lt.const(2)), lt.const(7))
  row = arith.addi(arith.shli(warp, lt.const(4)), quad)
  return [
    arith.addi(row, lt.const(64 * (i // 2) + 8 * (i % 2))) for i in range(count)
  ]


def _transpose_quad(words: list[ir.Value]) -> list[ir.Value]:
  """Transposes the 4 words of each of 4 neighbouring threads."""
  words = [mgpu_utils.bitcast(word, lt.i32()) for word in words]
  thread = lt.thread_index()
  for bit in (1, 2):
    upper = arith.cmpi(
      arith.CmpIPredicate.ne,
      arith.andi(thread, lt.const(bit)),
      lt.const(0),
    )
    # A thread of the lower half gives the upper word of a pair, and gets the
    # lower word of its partner; the other way round in the upper half.
    for low in range(4):
      if low & bit:
        continue
      high = low | bit
      given = arith.select(upper, words[low], words[high])
      got = mgpu_utils.shfl_bfly(given, bit)
      words[low] = arith.select(upper, got, words[low])
      words[high] = arith.select(upper, words[high], got)
  return words


def _store_quad(live: ir.Value, pointer: ir.Value, words: list) -> None:
  # A predicated store: a branch around each would cost more than the store.
  llvm.inline_asm(
    ir.Type.parse("!llvm.void"),
    [live, pointer, *words],
    "@$0 st.global.v4.b32 [$1], {$2, $3, $4, $5};",
    "b,l,r,r,r,r",
    has_side_effects=True,
  )
