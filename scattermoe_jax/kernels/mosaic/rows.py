"""64 gathered rows at a time into shared memory, by cp.async with zero-fill.

What Pallas has no primitive for: a warpgroup's 128 threads copy 16 bytes each.
Thread t of warp w holds the id of row 16 w + t % 16 of the step, or -1 for none,
and warp w copies those 16 rows, its lanes side by side along a row:

    lane   0      1     ...                     Rows lie as wgmma wants them,
    row r  [16 B] [16 B] ... block columns      swizzled: piece c of row r, of
                                                each 8 rows by 64 columns, at
                                                piece c ^ (r % 8).

The interpreter cannot run these; tests exchange them (see `group_xty.build`).
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, nvvm, vector

_SCALAR = plgpu.Layout.WG_SPLAT(())
_PER_THREAD = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
_IDS = plgpu.ShapeDtypeStruct((128,), jnp.int32, layout=_PER_THREAD)
_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Bytes of one swizzled tile of 8 rows by 64 columns.
_TILE_BYTES = 1024


def load_ids(ids_ref, first_row, group_first, group_end):
  """Returns ids of 64 rows from `first_row`; -1 outside of the group's."""

  def load(ctx, ids_ref, first_row, group_first, group_end):
    del ctx
    row, inside = _my_row(first_row, group_first, group_end)
    # Outside, read the group's first id, which exists.
    safe = arith.select(inside, row, _scalar(group_first))
    base = _global_pointer(ids_ref)
    row_id = llvm.load(_i32(), _offset(base, _wide(safe), _i32()))
    return _per_thread(arith.select(inside, row_id, _constant(-1)))

  return plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR), return_type=_IDS
  )(load)(ids_ref, first_row, group_first, group_end)


def range_ids(first_row, group_first, group_end):
  """Returns the rows from `first_row` themselves; -1 outside of the group's."""

  def compute(ctx, first_row, group_first, group_end):
    del ctx
    row, inside = _my_row(first_row, group_first, group_end)
    return _per_thread(arith.select(inside, row, _constant(-1)))

  return plgpu.inline_mgpu(
    arg_types=(_SCALAR, _SCALAR, _SCALAR), return_type=_IDS
  )(compute)(first_row, group_first, group_end)


def copy(source, smem, ids, *, col, width):
  """Starts copying columns [col, col + block) of the rows `ids` to `smem`.

  Rows of id -1, and columns past `width`, become zero.
  """
  block = smem.shape[-1]
  pieces = block // 8
  rows_at_once = 32 // pieces
  tile_row_bytes = block // 64 * _TILE_BYTES

  def issue(ctx, source, smem, ids, col):
    del ctx
    i8, element = _integer(8), ir.MemRefType(source.type).element_type
    thread = _thread()
    lane = arith.andi(thread, _constant(31))
    warp = arith.shrui(thread, _constant(5))
    piece = arith.remui(lane, _constant(pieces))
    sub_row = arith.divui(lane, _constant(pieces))
    my_col = arith.addi(_scalar(col), arith.muli(piece, _constant(8)))
    in_width = arith.cmpi(
      arith.CmpIPredicate.slt, my_col, _constant(width)
    )
    # Past the width read column 0 of the row (zero bytes of it).
    my_col = arith.select(in_width, my_col, _constant(0))
    from_col = _offset(_global_pointer(source), _wide(my_col), element)
    to_tile = _offset(
      utils.memref_ptr(smem),
      _wide(
        arith.addi(
          arith.muli(warp, _constant(2 * tile_row_bytes)),
          arith.muli(
            arith.divui(piece, _constant(8)), _constant(_TILE_BYTES)
          ),
        )
      ),
      i8,
    )
    my_id = vector.extract(
      ids.registers[0],
      dynamic_position=[],
      static_position=ir.DenseI64ArrayAttr.get([0]),
    )
    for i in range(16 // rows_at_once):
      row = arith.addi(sub_row, _constant(i * rows_at_once))
      row_id = nvvm.shfl_sync(
        _constant(-1), my_id, row, _constant(31), nvvm.ShflKind.idx
      )
      valid = arith.andi(
        arith.cmpi(arith.CmpIPredicate.sge, row_id, _constant(0)), in_width
      )
      in_tile = arith.andi(row, _constant(7))
      to = arith.addi(
        arith.muli(arith.shrui(row, _constant(3)), _constant(tile_row_bytes)),
        arith.addi(
          arith.muli(in_tile, _constant(128)),
          arith.muli(
            arith.xori(arith.andi(piece, _constant(7)), in_tile),
            _constant(16),
          ),
        ),
      )
      # In 64 bits: rows times width may pass 2^31.
      from_row = arith.muli(
        _wide(arith.maxsi(row_id, _constant(0))),
        utils.c(width, _integer(64)),
      )
      nvvm.cp_async_shared_global(
        _offset(to_tile, _wide(to), i8),
        _offset(from_col, from_row, element),
        16,
        nvvm.LoadCacheModifierKind.CG,
        cp_size=arith.select(valid, _constant(16), _constant(0)),
      )
    return ()

  plgpu.inline_mgpu(
    arg_types=(
      plgpu.RefType(),
      plgpu.RefType(_SWIZZLED),
      _PER_THREAD,
      _SCALAR,
    ),
    return_type=(),
  )(issue)(source, smem, ids, col)


def commit():
  """Closes a group of copies."""

  def close(ctx):
    del ctx
    nvvm.cp_async_commit_group()
    return ()

  plgpu.inline_mgpu(arg_types=(), return_type=())(close)()


def wait(groups: int):
  """Waits for all but the newest `groups` groups; wgmma may then read them."""

  def wait_and_fence(ctx):
    del ctx
    nvvm.cp_async_wait_group(groups)
    nvvm.fence_proxy(
      nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta
    )
    return ()

  plgpu.inline_mgpu(arg_types=(), return_type=())(wait_and_fence)()


def _my_row(first_row, group_first, group_end):
  thread = _thread()
  row = arith.addi(
    _scalar(first_row),
    arith.addi(
      arith.muli(arith.shrui(thread, _constant(5)), _constant(16)),
      arith.andi(thread, _constant(15)),
    ),
  )
  inside = arith.andi(
    arith.cmpi(arith.CmpIPredicate.sge, row, _scalar(group_first)),
    arith.cmpi(arith.CmpIPredicate.slt, row, _scalar(group_end)),
  )
  return row, inside


def _per_thread(value):
  one = vector.broadcast(ir.VectorType.get((1,), value.type), value)
  return mgpu.FragmentedArray(
    _registers=np.array([one], dtype=object),
    _layout=_PER_THREAD.to_mgpu(),
    _is_signed=True,
  )


def _thread():
  thread = arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x))
  return arith.andi(thread, _constant(127))


def _scalar(array):
  return array.registers.item()


def _global_pointer(ref):
  return llvm.addrspacecast(
    llvm.PointerType.get(address_space=1), utils.memref_ptr(ref)
  )


def _offset(pointer, index, element):
  return utils.getelementptr(pointer, [index], element)


def _wide(value):
  return arith.extsi(_integer(64), value)


def _constant(value):
  return utils.c(value, _i32())


def _integer(bits):
  return ir.IntegerType.get_signless(bits)


def _i32():
  return _integer(32)
