"""The k rows of each token, summed by some blocks while others multiply.

A sum of k rows waits for memory, a product for the tensor core. In one kernel
both go on: a few blocks sum first, and multiply what is left then.

  block 0   sum sum sum tile tile        A thread sums 8 columns of a token at
        1   sum sum sum tile tile        a time, from k slots of 16 bytes in
        2   tile tile tile tile tile     shared memory that only it fills and
        3   tile tile tile tile tile     reads: no thread waits for another.

The slots are those of two stages or more at once, in the ring that operands of
products fill later. They are filled by cp.async: what goes by way of registers
has to pass L1, of which such a ring leaves little.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from scattermoe_jax.kernels.mosaic import layouts as lt

# Numbers that a block multiplies while another sums one: 650 TFLOP/s of 132
# blocks, and 85 GB/s of one, as measured on an H100.
_PRODUCTS_PER_SUM = 58
# How much of the time of the product the sum may take. Blocks that come later
# find too few tiles to catch up.
_SUM_TIME = 0.76
# Where more blocks would have to sum, or blocks have fewer tiles than this, the
# sum is better made by itself.
_MOST_BLOCKS, _LEAST_TILES_EACH = 1 / 4, 8
# Chunks of 16 bytes that 32 bits count, with some to spare.
_MOST_CHUNKS = 2**30
_SLOT_BYTES = 16 * lt.WARPGROUP


class SumPlan(NamedTuple):
  """A sum of k rows beside a product, as far as it is known while tracing.

  Attributes:
    num_tokens: T.
    top_k: k.
    width: columns of a row, a multiple of 8.
    num_slices: how many such widths a row of the sums has.
    dtype: of the rows and of their sums.
    blocks: how many blocks sum, the first ones.
    warpgroups: of each block.
    groups: k slots each, that a thread fills ahead of their sum.
  """

  num_tokens: int
  top_k: int
  width: int
  num_slices: int
  dtype: jnp.dtype
  blocks: int
  warpgroups: int
  groups: int

  @property
  def out_type(self) -> jax.ShapeDtypeStruct:
    """The type of the sums."""
    shape = (self.num_tokens, self.num_slices * self.width)
    return jax.ShapeDtypeStruct(shape, self.dtype)

  @property
  def chunks_to_sum(self) -> int:
    """Chunks of 8 columns of all tokens that are summed."""
    return self.num_tokens * self.chunks_of_row

  @property
  def chunks_of_row(self) -> int:
    """Chunks of 8 columns of one token."""
    return self.width // lt.CHUNK


def plan_sum(
  rows,
  top_k: int,
  num_slices: int = 1,
  *,
  products: int,
  num_tiles: int,
  num_blocks: int,
  warpgroups: int,
  ring_bytes: int,
) -> SumPlan | None:
  """Returns how rows are summed beside a product; None where it would not pay.

  Args:
    rows: (S, width), one for each choice.
    top_k: k.
    num_slices: how many such arrays are summed, one after the other.
    products: pairs of numbers that are multiplied.
    num_tiles: tiles of the product.
    num_blocks: blocks that multiply them.
    warpgroups: of each block.
    ring_bytes: of shared memory that each warpgroup may fill meanwhile.
  """
  num_rows, width = rows.shape
  share = _PRODUCTS_PER_SUM / _SUM_TIME * rows.size / products
  # Whole clusters of two sum, if there are any.
  blocks = min(2 * math.ceil(share * num_blocks / 2), num_blocks)
  groups = ring_bytes // (_SLOT_BYTES * top_k)
  if (
    share > _MOST_BLOCKS
    or num_tiles < _LEAST_TILES_EACH * num_blocks
    or groups < 2
    or width % lt.CHUNK
    or rows.dtype.itemsize != 2
    or rows.size * max(1, num_slices / top_k) / lt.CHUNK >= _MOST_CHUNKS
  ):
    return None
  return SumPlan(
    num_rows // top_k,
    top_k,
    width,
    num_slices,
    rows.dtype,
    blocks,
    warpgroups,
    groups,
  )


def sum_share(
  plan: SumPlan, worker, smem, first_byte, rows, places, out, slice_index
) -> None:
  """Sums this warpgroup's share of all chunks.

  Args:
    plan: what is summed.
    worker: which of the warpgroups that sum this is.
    smem: the first stage of a ring in shared memory; the others follow it.
    first_byte: of the warpgroup's part of the ring.
    rows: (S, width) in global memory.
    places: (T, k), the row of each choice.
    out: (T, num_slices width) in global memory.
    slice_index: which of these slices is summed.
  """
  workers = plan.blocks * plan.warpgroups
  turns = lt.cdiv(lt.cdiv(plan.chunks_to_sum, lt.WARPGROUP) - worker, workers)

  def first_chunk(turn):
    return (worker + turn * workers) * lt.WARPGROUP

  def slots(turn):
    group = lt.rem(jnp.int32(turn), plan.groups)
    return first_byte + group * plan.top_k * _SLOT_BYTES

  def copy(turn, found):
    _copy(plan, smem, slots(turn), rows, found, first_chunk(turn))

  for ahead in range(plan.groups):
    copy(ahead, _look_up(plan, places, first_chunk(ahead)))

  def sum_chunks(turn, found):
    # Places are a turn ahead of copies, and copies `groups` of the sum.
    soon = _look_up(plan, places, first_chunk(turn + plan.groups + 1))
    _sum(plan, smem, slots(turn), out, slice_index, first_chunk(turn))
    copy(turn + plan.groups, found)
    return soon

  found = _look_up(plan, places, first_chunk(plan.groups))
  lax.fori_loop(0, turns, sum_chunks, found)
  # Before others write to the slots, be it another block's TMA.
  lt.wait_async_copies(0)
  plgpu.commit_smem()


def _look_up(plan: SumPlan, places, first_chunk):
  """Returns the rows of the k choices of this thread's chunk."""
  in_quads = plan.top_k % 4 == 0

  @plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), lt.SCALAR),
    return_type=lt.per_thread_type(plan.top_k),
  )
  def look_up(_, places, first_chunk):
    _, token, _ = _my_chunk(plan, first_chunk)
    first = arith.muli(token, lt.const(plan.top_k))
    if not in_quads:
      positions = [arith.addi(first, lt.const(j)) for j in range(plan.top_k)]
      return lt.pack([lt.load_id(places, p) for p in positions], plan.top_k)
    quad = ir.VectorType.get((4,), lt.i32())
    begin = lt.at_chunk(
      lt.global_pointer(places), arith.shrui(first, lt.const(2))
    )
    found = []
    for j in range(0, plan.top_k, 4):
      four = llvm.load(quad, lt.at_byte(begin, 4 * j), alignment=16)
      found += lt.elements(four)
    return lt.pack(found, plan.top_k)

  return look_up(places, lt.int32(first_chunk))


def _copy(plan: SumPlan, smem, slots, rows, found, first_chunk) -> None:
  """Starts copying this thread's chunk of its k rows to its slots."""

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(lt.OPERAND),
      lt.SCALAR,
      plgpu.RefType(),
      lt.per_thread(plan.top_k),
      lt.SCALAR,
    )
  )
  def copy(_, smem, slots, rows, found, first_chunk):
    _, _, chunk = _my_chunk(plan, first_chunk)
    source = lt.at_chunk(lt.global_pointer(rows), chunk)
    target = _my_slots(smem, slots)
    for j, row in enumerate(lt.unpack(found)):
      nvvm.cp_async_shared_global(
        lt.at_byte(target, j * _SLOT_BYTES),
        lt.at_chunk(source, lt.row_chunk(row, 1, plan.width)),
        16,
        nvvm.LoadCacheModifierKind.CG,
      )
    nvvm.cp_async_commit_group()
    return ()

  copy(smem, lt.int32(slots), rows, found, lt.int32(first_chunk))


def _sum(plan: SumPlan, smem, slots, out, slice_index, first_chunk) -> None:
  """Stores the sum of this thread's slots, once they are filled."""

  @plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(lt.OPERAND),
      lt.SCALAR,
      plgpu.RefType(),
      lt.SCALAR,
      lt.SCALAR,
    )
  )
  def add_up(_, smem, slots, out, slice_index, first_chunk):
    narrow_type = ir.MemRefType(out.type).element_type
    narrow = ir.VectorType.get((lt.CHUNK,), narrow_type)
    wide = ir.VectorType.get((lt.CHUNK,), ir.F32Type.get())
    place, token, _ = _my_chunk(plan, first_chunk)
    if plan.num_slices > 1:
      # As many chunks of other slices for each token before, and for this one.
      others = arith.muli(token, lt.const(plan.num_slices - 1))
      others = arith.addi(others, lt.scalar(slice_index))
      others = arith.muli(others, lt.const(plan.chunks_of_row))
      place = arith.addi(place, others)
    source = _my_slots(smem, slots)
    nvvm.cp_async_wait_group(plan.groups - 1)
    chunks = [
      llvm.load(narrow, lt.at_byte(source, j * _SLOT_BYTES), alignment=16)
      for j in range(plan.top_k)
    ]
    total, *others = [arith.extf(wide, chunk) for chunk in chunks]
    for other in others:
      total = arith.addf(total, other)
    target = lt.at_chunk(lt.global_pointer(out), place)
    llvm.store(arith.truncf(narrow, total), target, alignment=16)
    return ()

  add_up(
    smem, lt.int32(slots), out, lt.int32(slice_index), lt.int32(first_chunk)
  )


def _my_chunk(plan: SumPlan, first_chunk) -> tuple[ir.Value, ...]:
  """Returns this thread's chunk: of all, its token, and of the token's."""
  place = arith.addi(lt.scalar(first_chunk), lt.thread_index())
  # Threads past the end sum the last chunk too, to the same bits.
  place = arith.minsi(place, lt.const(plan.chunks_to_sum - 1))
  token = arith.divui(place, lt.const(plan.chunks_of_row))
  before = arith.muli(token, lt.const(plan.chunks_of_row))
  return place, token, arith.subi(place, before)


def _my_slots(smem, slots) -> ir.Value:
  mine = arith.muli(lt.thread_index(), lt.const(16))
  return lt.at_byte(lt.shared_pointer(smem), arith.addi(lt.scalar(slots), mine))
