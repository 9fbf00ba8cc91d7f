"""What `grouped_xty` needs of a warpgroup and Pallas has no primitive for.

64 rows at a time into shared memory by cp.async, zero where there is none. For
a contraction over rows, what lies past the group's end must be zero in both
operands. A warpgroup's thread t of warp w holds the id of row 16 w + t % 16 of
the step; then warp w copies those 16 rows, four at once, 16 bytes a lane, and
cp.async writes zeros where told to read none:

    lane    0 to 7     row r        64 columns,       Rows lie as wgmma wants
            8 to 15    row r + 1    then the next     them, in tiles of 8 rows
           16 to 23    row r + 2    64 of the         by 64 columns
           24 to 31    row r + 3    block             (see `layouts`).

And numbers drawn from a counter that all blocks share (`tickets`), and rows
summed before products (`choice_sums`).

The interpreter cannot run these; tests exchange them (`ops` in `grouped_xty`).
"""

import math
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, nvvm

from scattermoe_jax.kernels.mosaic import choice_sums, clusters
from scattermoe_jax.kernels.mosaic import layouts as lt

ROWS = 64
# 64 grouped rows of a step: (first row, first row of the group, its end).
Window = tuple[Any, Any, Any]
_WARP = 32
_WARP_ROWS = 16
_ROWS_AT_ONCE = _WARP // lt.CHUNKS
_TILE_BYTES = 8 * 128
_WINDOW = (lt.SCALAR, lt.SCALAR, lt.SCALAR)


def load_ids(ids, window: Window):
  """Returns this thread's id of the 64 of a window, to be used a step later.

  Nothing is computed from them here: the thread would wait for memory.
  """

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), *_WINDOW), return_type=lt.per_thread_type(1)
  )
  def load(_, ids, *window):
    row, inside = _my_row(*window)
    # Outside, read the id of the group's first row, or of the last row if
    # the group is empty and past them all.
    safe = arith.select(inside, row, lt.scalar(window[1]))
    safe = arith.minsi(safe, lt.const(ir.MemRefType(ids.type).shape[0] - 1))
    return lt.pack([lt.load_id(ids, safe)], 1)

  return load(ids, *window)


def range_ids(window: Window):
  """Returns the rows of a window themselves as ids."""

  @plgpu.inline_mgpu(arg_types=_WINDOW, return_type=lt.per_thread_type(1))
  def count(_, *window):
    row, inside = _my_row(*window)
    return lt.pack([arith.select(inside, row, lt.scalar(window[1]))], 1)

  return count(*window)


def copy(source, smem, ids, window: Window, *, column, width, fan_out):
  """Starts copying columns [column, column + block) of the rows `ids` to smem.

  Args:
    source: (rows, width) in global memory, width a multiple of 8.
    smem: (64, block) in shared memory, in the layout of an operand.
    ids: from `load_ids` or `range_ids`, of the same window.
    window: which of the rows are the group's; the others become zero.
    column: the first, a multiple of 8.
    width: of `source`; what lies past it becomes zero.
    fan_out: by what ids are divided, rounding down, to name rows of `source`.
  """
  block = smem.shape[-1]
  tiles = block // lt.COLUMNS

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.RefType(lt.OPERAND),
      lt.per_thread(1),
      lt.SCALAR,
      *_WINDOW,
    ),
  )
  def issue(_, source, smem, ids, column, *window):
    thread = lt.thread_index()
    warp = arith.shrui(thread, lt.const(5))
    lane = arith.andi(thread, lt.const(_WARP - 1))
    lane_row = arith.shrui(lane, lt.const(3))
    chunk = arith.andi(lane, lt.const(lt.CHUNKS - 1))
    source_chunk = arith.addi(
      arith.divui(lt.scalar(column), lt.const(lt.CHUNK)), chunk
    )
    first_row = lt.at_chunk(lt.global_pointer(source), source_chunk)
    warp_smem = lt.at_byte(
      lt.shared_pointer(smem),
      arith.muli(warp, lt.const(_WARP_ROWS // 8 * tiles * _TILE_BYTES)),
    )
    # Where this lane writes in a tile of 8 rows: in its upper half or lower.
    halves = [
      lt.at_byte(warp_smem, lt.swizzled(row, chunk))
      for row in (lane_row, arith.addi(lane_row, lt.const(_ROWS_AT_ONCE)))
    ]
    # Each lane knows a row: where it begins, or -1 if it is to be zero. From
    # chunk 2^31 on others are negative too.
    [my_id] = lt.unpack(ids)
    my_start = arith.select(
      _my_row(*window)[1],
      lt.row_chunk(my_id, fan_out, width),
      lt.const(-1),
    )
    for i in range(_WARP_ROWS // _ROWS_AT_ONCE):
      start = nvvm.shfl_sync(
        lt.const(-1),
        my_start,
        arith.addi(lane_row, lt.const(i * _ROWS_AT_ONCE)),
        lt.const(_WARP - 1),
        nvvm.ShflKind.idx,
      )
      exists = arith.cmpi(arith.CmpIPredicate.ne, start, lt.const(-1))
      # Far outside for the start -1 of no row, of which nothing is read.
      row_source = lt.at_chunk(first_row, start)
      for j in range(tiles):
        live = exists
        if width % block:
          tile_chunk = arith.addi(source_chunk, lt.const(j * lt.CHUNKS))
          live = arith.andi(live, _is_below(tile_chunk, width // lt.CHUNK))
        tile_bytes = (i // 2 * tiles + j) * _TILE_BYTES
        # Of what is not live nothing is read, wherever it may point.
        nvvm.cp_async_shared_global(
          lt.at_byte(halves[i % 2], tile_bytes),
          lt.at_byte(row_source, j * 2 * lt.COLUMNS),
          16,
          nvvm.LoadCacheModifierKind.CG,
          cp_size=arith.select(live, lt.const(16), lt.const(0)),
        )
    return ()

  issue(source, smem, ids, lt.int32(column), *window)


def commit():
  """Closes a group of copies."""

  @plgpu.inline_mgpu()
  def close(_):
    nvvm.cp_async_commit_group()
    return ()

  close()


wait = lt.wait_async_copies
sum_share = choice_sums.sum_share


def new_counter():
  """Returns a counter in global memory, zero when the kernel starts."""
  return pl.get_global(plgpu.SemaphoreType.REGULAR)


def new_flags(count: int):
  """Returns flags in global memory, unset when the kernel starts."""
  return pl.get_global(plgpu.SemaphoreType.REGULAR((count,)))


def signal(flags, i) -> None:
  """Sets flags[i], after all that this warpgroup has stored."""
  plgpu.commit_smem()  # Until all of its threads have.
  pl.semaphore_signal(flags.at[i])


def wait_for(flags, i) -> None:
  """Waits until flags[i] is set."""
  pl.semaphore_wait(flags.at[i])


def increment(counter, ring, place, turn) -> None:
  """Writes the counter's next number to ring[place].

  In a cluster all blocks call this, the first draws, for all of them.

  The interpreter, which has no counter that blocks share, deals by `turn`
  instead: how many numbers this block has drawn before.
  """
  del turn

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), plgpu.RefType(), lt.SCALAR),
  )
  def add(context, counter, ring, place):
    blocks = math.prod(context.cluster_size)
    offset = arith.muli(lt.scalar(place), lt.const(4))
    here = lt.at_byte(lt.shared_pointer(ring), offset)
    # The thread that will arrive at a block's barrier writes its number.
    writes = [
      _is_thread_of_first_block(block * clusters.THREADS_TO_ARRIVE, blocks)
      for block in range(blocks)
    ]
    operands = [lt.global_pointer(counter), here, *writes]
    lt.run_ptx(_draw(blocks), "l,r" + ",b" * blocks, operands)
    return ()

  add(counter, ring, place)


def _is_thread_of_first_block(thread: int, blocks: int) -> ir.Value:
  is_thread = lt.is_thread(thread)
  if blocks == 1:
    return is_thread
  block = arith.index_cast(lt.i32(), mgpu_utils.cluster_idx(gpu.Dimension.x))
  is_first = arith.cmpi(arith.CmpIPredicate.eq, block, lt.const(0))
  return arith.andi(is_thread, is_first)


def _draw(blocks: int) -> str:
  """Returns PTX that draws a number for all blocks of a cluster.

  Predicated, for a branch might be copied with the barriers behind it, and all
  threads of a warp must come to the same one.
  """
  lines = [
    ".reg .u32 number, there;",
    "mov.u32 number, 0;",
    "@$2 atom.relaxed.gpu.global.add.u32 number, [$0], 1;",
    "@$2 st.shared.u32 [$1], number;",
  ]
  if blocks > 1:
    lines.append("shfl.sync.idx.b32 number, number, 0, 31, 0xffffffff;")
  for block in range(1, blocks):
    lines += [
      f"@${2 + block} mapa.shared::cluster.u32 there, $1, {block};",
      f"@${2 + block} st.shared::cluster.u32 [there], number;",
      f"@${2 + block} fence.acq_rel.cluster;",
    ]
  return "{\n" + "\n".join(lines) + "\n}"


def meet_cluster() -> None:
  """Waits until all warpgroups of all blocks of the cluster are here."""

  @plgpu.inline_mgpu()
  def meet(_):
    lt.run_ptx("barrier.cluster.arrive.aligned;", "", [])
    lt.run_ptx("barrier.cluster.wait.aligned;", "", [])
    return ()

  meet()


def _my_row(first_row, group_first, group_end):
  """Returns the row of this thread's id, and whether it is the group's."""
  thread = lt.thread_index()
  warp = arith.shrui(thread, lt.const(5))
  row = arith.addi(
    lt.scalar(first_row),
    arith.addi(
      arith.muli(warp, lt.const(_WARP_ROWS)),
      arith.andi(thread, lt.const(_WARP_ROWS - 1)),
    ),
  )
  return row, _inside(row, group_first, group_end)


def _is_below(a: ir.Value, limit: int) -> ir.Value:
  return arith.cmpi(arith.CmpIPredicate.ult, a, lt.const(limit))


def _inside(row: ir.Value, group_first, group_end) -> ir.Value:
  return arith.andi(
    arith.cmpi(arith.CmpIPredicate.sge, row, lt.scalar(group_first)),
    arith.cmpi(arith.CmpIPredicate.slt, row, lt.scalar(group_end)),
  )
