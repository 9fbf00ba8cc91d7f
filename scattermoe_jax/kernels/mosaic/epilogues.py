"""What becomes of a tile of products: stored, activated or differentiated.

An epilogue gets the float32 sums of one consumer's part of a tile and writes to
global memory, 64 columns at a time through a small ring of shared memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from scattermoe_jax.kernels.mosaic import layouts as lt



@dataclasses.dataclass(frozen=True, eq=False)
class StoreRows:
  """Stores products, plus a bias, in grouped or in scattered order.

  Attributes:
    bias: one per expert and column, or None.
    scattered_ids: the scattered row of each grouped row; None to store in
      grouped order.
  """

  bias: Float[Array, "E n"] | None = None
  scattered_ids: Int[Array, " S"] | None = None
  name = "scatter2scatter"

  def operands(self, plan) -> list[Array]:
    """Returns the arrays that the epilogue reads."""
    bias = [] if self.bias is None else [pad_bias(self.bias, plan)]
    ids = [] if self.scattered_ids is None else [self.scattered_ids]
    return bias + ids

  def out_types(self, plan) -> list[jax.ShapeDtypeStruct]:
    """Returns the types of the results: y."""
    return [jax.ShapeDtypeStruct((plan.num_rows, plan.d_out), plan.dtype)]

  def scratch_types(self, plan) -> list:
    """Returns the ring through which chunks leave."""
    return [staging(plan)]

  def store(self, plan, acc, tile, extra, outs, scratch, rows) -> None:
    """Stores one consumer's part of a tile."""
    extra = list(extra)
    bias = extra.pop(0) if self.bias is not None else None
    ids = extra.pop(0) if self.scattered_ids is not None else None
    [y], [ring] = outs, scratch
    out_rows = rows._replace(width=plan.d_out)
    if ids is not None:
      places = out_rows.locate(ids, tile.row, tile.end, plan.part_m)
    for j in range(plan.config.block_n // lt.COLUMNS):
      columns = slice(j * lt.COLUMNS, (j + 1) * lt.COLUMNS)
      column = tile.index_n * plan.config.block_n + j * lt.COLUMNS
      chunk = acc[:, columns]
      if bias is not None:
        chunk += bias_rows(bias, tile, column, plan.part_m)
      stage = ring.at[tile.consumer, j % plan.store_slots]
      if ids is None:
        put_chunk(stage, chunk.astype(plan.dtype), plan.store_slots)
        send_chunk(stage, y, tile, column)
      else:
        stage[...] = chunk.astype(plan.dtype)
        plgpu.commit_smem()

        @pl.when(column < plan.d_out)
        def _(stage=stage, column=column):
          out_rows.store(stage, y, places, column, tile.begin, tile.end)


def staging(plan, columns: int = lt.COLUMNS):
  """Returns the type of the ring through which chunks leave."""
  return plgpu.SMEM(
    (2, plan.store_slots, plan.part_m, columns), plan.dtype, transforms=lt.BY_ROW
  )


def pad_bias(bias: Float[Array, "E n"], plan) -> Float[Array, "E+1 _"]:
  """Returns the bias as wide as the tiles are; row E, for no group, is zero."""
  width = plan.num_tiles_n * plan.config.block_n
  return jnp.pad(bias, ((0, 1), (0, width - bias.shape[1])))


def bias_rows(bias, tile, column, num_rows: int):
  """Returns 64 columns of the expert's bias, once for every row."""
  values = plgpu.load(bias.at[tile.expert, pl.ds(column, lt.COLUMNS)])
  return lax.broadcast_in_dim(
    values.astype(jnp.float32), (num_rows, lt.COLUMNS), (1,)
  )


def put_chunk(stage, chunk, slots: int) -> None:
  """Writes a chunk to a stage of the ring, once its last copy has left."""
  plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
  stage[...] = chunk
  plgpu.commit_smem()


def send_chunk(stage, y, tile, column) -> None:
  """Starts the copy of rows [begin, end) of a stage to grouped rows of y.

  A copy has a static height. A full part takes one; another is the sum of
  powers of two, and takes a copy for each that is in it.
  """
  height = stage.shape[0]
  columns = pl.ds(column, lt.COLUMNS)
  num_rows = tile.end - tile.begin

  def copy(first, length):
    plgpu.copy_smem_to_gmem(
      stage.at[pl.ds(first, length)],
      y.at[pl.ds(tile.row + first, length), columns],
      commit_group=False,
    )

  @pl.when(num_rows == height)
  def _():
    copy(0, height)

  @pl.when(num_rows < height)
  def _():
    first, length = tile.begin, height // 2
    while length > 0:

      @pl.when((num_rows & length) != 0)
      def _(first=first, length=length):
        copy(first, length)

      first = first + (num_rows & length)
      length //= 2

  plgpu.commit_smem_to_gmem_group()
