"""Shared-memory layouts, and the words in which one thread addresses memory.

Mosaic GPU programs a warpgroup (128 threads) at a time. What one thread must do
by itself (copy its 16 bytes of a gathered row) is written here in MLIR, inside
`plgpu.inline_mgpu`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, vector

WARPGROUP = 128  # threads

# The tensor core reads 16-bit operands in tiles of 8 rows of 64 columns. Its
# 128-byte swizzle puts 16-byte chunk c of row r at chunk c ^ (r % 8), so that
# neither a row nor a column of chunks hits one bank twice.
#
#   chunk   0 1 2 3 4 5 6 7
#   row 0 | 0 1 2 3 4 5 6 7
#   row 1 | 1 0 3 2 5 4 7 6
#   row 2 | 2 3 0 1 6 7 4 5   ...
COLUMNS = 64  # 16-bit columns of one 128-byte row of a tile
CHUNK = 8  # 16-bit elements of one 16-byte chunk
CHUNKS = COLUMNS // CHUNK
OPERAND = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128))
# The same bytes for 64 columns, but any row may start a copy.
BY_ROW = (plgpu.TilingTransform((1, COLUMNS)), plgpu.SwizzleTransform(128))

# A scalar that all threads of a warpgroup hold.
SCALAR = plgpu.Layout.WG_SPLAT(())


def per_thread(count: int):
  """Returns the layout of an array that gives each thread `count` values."""
  return plgpu.Layout.WG_STRIDED((WARPGROUP * count,), vec_size=1)


def per_thread_type(count: int, dtype=jnp.int32):
  """Returns the return type of a function that gives `count` to each thread."""
  return plgpu.ShapeDtypeStruct(
    (WARPGROUP * count,), dtype, layout=per_thread(count)
  )


def pack(values: Sequence[ir.Value], count: int):
  """Returns each thread's own `values` as one array of `per_thread(count)`."""
  ones = [ir.VectorType.get((1,), value.type) for value in values]
  registers = [
    vector.broadcast(o, v) for o, v in zip(ones, values, strict=True)
  ]
  return mgpu.FragmentedArray(
    _registers=np.array(registers, dtype=object),
    _layout=per_thread(count).to_mgpu(),
    _is_signed=True,
  )


def unpack(array) -> list[ir.Value]:
  """Returns this thread's values of an array of `per_thread`."""
  return [elements(r)[0] for r in array.registers.flat]


def elements(values: ir.Value) -> list[ir.Value]:
  """Returns the elements of a vector."""
  [count] = ir.VectorType(values.type).shape
  return [
    vector.extract(
      values,
      dynamic_position=[],
      static_position=ir.DenseI64ArrayAttr.get([i]),
    )
    for i in range(count)
  ]


def scalar(array) -> ir.Value:
  """Returns the value of a scalar argument."""
  return array.registers.item()


def i8() -> ir.Type:
  return ir.IntegerType.get_signless(8)


def i32() -> ir.Type:
  return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
  return ir.IntegerType.get_signless(64)


def const(value: int) -> ir.Value:
  return mgpu_utils.c(value, i32())


def thread_index() -> ir.Value:
  """Returns the thread's index in its warpgroup."""
  thread = arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x))
  return arith.andi(thread, const(WARPGROUP - 1))


def global_pointer(ref) -> ir.Value:
  space = llvm.PointerType.get(address_space=1)
  return llvm.addrspacecast(space, mgpu_utils.memref_ptr(ref))


def shared_pointer(ref) -> ir.Value:
  return mgpu_utils.memref_ptr(ref)


def at_byte(pointer: ir.Value, offset: ir.Value | int) -> ir.Value:
  """Returns the pointer `offset` bytes on; an i32 offset is not negative."""
  if not isinstance(offset, int) and offset.type == i32():
    offset = arith.extui(i64(), offset)
  return mgpu_utils.getelementptr(pointer, [offset], i8())


def at_chunk(pointer: ir.Value, chunk: ir.Value) -> ir.Value:
  """Returns the pointer `chunk` times 16 bytes on.

  Counting 16-byte chunks, 32 bits reach 2^35 elements of 16 bits.
  """
  offset = arith.shli(arith.extui(i64(), chunk), mgpu_utils.c(4, i64()))
  return at_byte(pointer, offset)


def swizzled(row: ir.Value, chunk: ir.Value) -> ir.Value:
  """Returns the byte offset of a chunk in a tile of 64 columns."""
  place = arith.xori(chunk, arith.andi(row, const(7)))
  return arith.addi(arith.shli(row, const(7)), arith.shli(place, const(4)))


def fence_async_shared() -> None:
  """Makes this thread's writes to shared memory visible to wgmma and TMA."""
  nvvm.fence_proxy(
    nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta
  )


def is_thread(index: int) -> ir.Value:
  """Returns whether this thread has that index in its warpgroup."""
  return arith.cmpi(arith.CmpIPredicate.eq, thread_index(), const(index))


def run_ptx(text: str, constraints: str, operands: Sequence[ir.Value]) -> None:
  """Runs PTX that writes memory and returns nothing."""
  void = ir.Type.parse("!llvm.void")
  llvm.inline_asm(void, operands, text, constraints, has_side_effects=True)


def computed_here(word: ir.Value) -> ir.Value:
  """Returns an i32, of which nothing is computed before this is reached.

  What a branch in a loop makes of values that the loop does not change, the
  compiler would make before the loop, and hold in registers or spill.
  """
  return llvm.inline_asm(
    i32(), [word], "mov.b32 $0, $1;", "=r,r", has_side_effects=True
  )


def load_id(ids: ir.Value, position: ir.Value) -> ir.Value:
  """Returns the int32 at `position` of a global array."""
  offset = arith.shli(arith.extui(i64(), position), mgpu_utils.c(2, i64()))
  return llvm.load(i32(), at_byte(global_pointer(ids), offset))


def row_chunk(row_id: ir.Value, fan_out: int, width: int) -> ir.Value:
  """Returns the chunk at which the row of an id begins.

  Args:
    row_id: the row, times `fan_out`, or up to `fan_out` - 1 more.
    fan_out: ids that name the same row.
    width: columns of a row.
  """
  if fan_out > 1:
    row_id = arith.divui(row_id, const(fan_out))
  return arith.muli(row_id, const(width // CHUNK))


def wait_async_copies(in_flight: int) -> None:
  """Waits until at most `in_flight` groups of cp.async of this thread remain.

  What arrived is then visible to the tensor core.
  """

  @plgpu.inline_mgpu()
  def wait(_):
    nvvm.cp_async_wait_group(in_flight)
    fence_async_shared()
    return ()

  wait()


def rem(a, b: int):
  """Returns a % b for an a of 0 or more, an int32.

  Of a power of two by a mask: that of a signed a takes four instructions.
  """
  return a & (b - 1) if b & (b - 1) == 0 else lax.rem(a, jnp.int32(b))


def cdiv(a, b):
  return -(-a // b)


def int32(value) -> jax.Array:
  return jnp.asarray(value, jnp.int32)
