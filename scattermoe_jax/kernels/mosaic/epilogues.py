"""What becomes of a tile of products: stored, activated or differentiated.

An epilogue gets the float32 sums of one consumer's part of a tile and stores
what it makes of them, 64 columns at a time.

  StoreRows        y = acc + bias
  Activate         h = acc + bias, a = f(h)
  Differentiate    da' = acc; dh = (gates da') f'(h), gates a, <da', a>
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from scattermoe_jax.kernels.mosaic import layouts as lt


class Epilogue:
  """What the kernel asks of an epilogue.

  Attributes:
    name: of the kernel that it makes.
  """

  name: str

  def operands(self, plan) -> list[Array]:
    """Returns the arrays that it reads, `extra` below."""
    raise NotImplementedError

  def out_types(self, plan) -> list[jax.ShapeDtypeStruct]:
    """Returns the types of its results, `outs` below."""
    raise NotImplementedError

  def num_loads(self, plan) -> int:
    """Returns how many stages it wants filled after those of a tile."""
    return 0

  def load(self, plan, j, row, index_n, extra, stage, barrier) -> int:
    """Fills one (x, w) stage; returns how many copies arrive at `barrier`."""
    raise NotImplementedError

  def store(self, plan, accs, tile, extra, outs, rows, loaded) -> None:
    """Stores one consumer's part of a tile.

    Args:
      plan: the launch.
      accs: the sums, one array for each half of w.
      tile: where they belong.
      extra: the operands, in global memory.
      outs: the results, in global memory.
      rows: how rows are stored.
      loaded: lends, for chunk j, this part's rows of what `load` filled.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class StoreRows(Epilogue):
  """Stores products, plus a bias, in grouped or in scattered order.

  Attributes:
    bias: one per expert and column, or None.
    scattered_ids: the scattered row of each grouped row; None to store in
      grouped order.
  """

  bias: Float[Array, "E n"] | None = None
  scattered_ids: Int[Array, " S"] | None = None
  name = "scatter2scatter"

  def operands(self, plan):
    bias = [] if self.bias is None else [_pad_bias(self.bias, plan)]
    return bias + ([] if self.scattered_ids is None else [self.scattered_ids])

  def out_types(self, plan):
    return [jax.ShapeDtypeStruct((plan.num_rows, plan.d_out), plan.dtype)]

  def store(self, plan, accs, tile, extra, outs, rows, loaded):
    extra = list(extra)
    bias = extra.pop(0) if self.bias is not None else None
    ids = extra.pop(0) if self.scattered_ids is not None else None
    [acc], [y] = accs, outs
    store = _RowStore(plan, tile, rows, y, ids)
    for columns, column in _chunks(plan, tile):

      @_when_inside(plan, column)
      def _(columns=columns, column=column):
        chunk = acc[:, columns] + _bias_rows(bias, plan, tile, column)
        store(chunk, column)


@dataclasses.dataclass(frozen=True, eq=False)
class Activate(Epilogue):
  """Stores a = f(h), and h where it is wanted, in grouped order.

  With a gate, a tile holds the same columns of both halves of h, so that gate
  and up of a value are in registers of one thread.

  Attributes:
    activation: f.
    keep_h: whether to store h.
    bias: one per expert and column of h, or None.
  """

  activation: object
  keep_h: bool
  bias: Float[Array, "E m"] | None = None
  name = "up_projection"

  def operands(self, plan):
    return [] if self.bias is None else [_pad_bias(self.bias, plan)]

  def out_types(self, plan):
    rows, width = plan.num_rows, plan.d_out
    h = jax.ShapeDtypeStruct((rows, width), plan.dtype)
    a = jax.ShapeDtypeStruct((rows, width // plan.halves), plan.dtype)
    return [h, a] if self.keep_h else [a]

  def store(self, plan, accs, tile, extra, outs, rows, loaded):
    bias = extra[0] if extra else None
    *h_out, a_out = outs
    store_a = _RowStore(plan, tile, rows, a_out)
    if self.keep_h:
      store_h = _RowStore(plan, tile, rows, *h_out)
    half = plan.d_out // plan.halves
    for columns, column in _chunks(plan, tile):

      @_when_inside(plan, column)
      def _(columns=columns, column=column):
        h = []
        for i in range(plan.halves):
          h.append(
            accs[i][:, columns]
            + _bias_rows(bias, plan, tile, column + i * half)
          )
          if self.keep_h:
            store_h(h[i], column + i * half)
        store_a(_activate(self.activation, h), column)


@dataclasses.dataclass(frozen=True, eq=False)
class Differentiate(Epilogue):
  """Stores the backward down to h: of products da', gates and a kept h.

    dh = (gates da') f'(h); weighted a = gates f(h); sums = <da', f(h)>

  The producer loads h through the stages of the ring, in the turn after the
  tile's last product, so that it is there when the sum is.

  Attributes:
    activation: f.
    h: the pre-activation, grouped.
    gates: one per grouped row.
  """

  activation: object
  h: Float[Array, "S m"]
  gates: Float[Array, " S"]
  name = "down_projection_grad"

  def operands(self, plan):
    # A part may reach past the last row; what it reads there is not stored.
    gates = self.gates.astype(jnp.float32)
    return [self.h, jnp.pad(gates, (0, plan.config.block_m))]

  def out_types(self, plan):
    a = jax.ShapeDtypeStruct((plan.num_rows, plan.d_out), plan.dtype)
    sums = (plan.num_windows, plan.num_tiles_n, plan.config.block_m)
    return [
      jax.ShapeDtypeStruct(self.h.shape, plan.dtype),
      a,
      jax.ShapeDtypeStruct(sums, jnp.float32),
    ]

  def num_loads(self, plan):
    return plan.config.block_n // lt.COLUMNS

  def load(self, plan, j, row, index_n, extra, stage, barrier):
    h, block_m = extra[0], plan.config.block_m
    column = index_n * plan.config.block_n + j * lt.COLUMNS
    copies = self.h.shape[1] // plan.d_out
    for i in range(copies):
      plgpu.copy_gmem_to_smem(
        h.at[pl.ds(row, block_m), pl.ds(column + i * plan.d_out, lt.COLUMNS)],
        stage[i].at[pl.ds(0, block_m)],
        barrier,
      )
    return copies

  def store(self, plan, accs, tile, extra, outs, rows, loaded):
    [acc], (dh_out, a_out, sums_out) = accs, outs
    store_dh = _RowStore(plan, tile, rows, dh_out)
    store_a = _RowStore(plan, tile, rows, a_out)
    shape = (plan.part_m, lt.COLUMNS)
    gates = plgpu.load(
      extra[1].at[pl.ds(tile.row, plan.part_m)], optimized=False
    )
    gate = lax.broadcast_in_dim(gates, shape, (0,))
    sums = jnp.zeros((plan.part_m,), jnp.float32)
    copies = self.h.shape[1] // plan.d_out
    for j, (columns, column) in enumerate(_chunks(plan, tile)):
      da = acc[:, columns]
      with loaded(j) as stage:
        h = [stage[i][...].astype(jnp.float32) for i in range(copies)]
      a, *dh = _activate_vjp(self.activation, h, gate * da)
      sums += jnp.sum(da * a, axis=1)

      @_when_inside(plan, column)
      def _(column=column, a=a, dh=dh):
        for i in range(copies):
          store_dh(dh[i], column + i * plan.d_out)
        store_a(gate * a, column)

    place = pl.ds(tile.part, plan.part_m)
    sums_out[tile.index_m, tile.index_n, place] = sums


def _activate(activation, h: list):
  if activation.gated:
    return activation.of_gate(*h)
  return activation.value_and_slope(*h)[0]


def _activate_vjp(activation, h: list, da) -> tuple:
  """Returns (a, dh) or (a, dgate, dup)."""
  if activation.gated:
    return activation.of_gate_and_vjp(*h, da)
  a, slope = activation.value_and_slope(*h)
  return a, da * slope


def _chunks(plan, tile) -> Iterator:
  """Yields 64 columns at a time: where in a sum, where in a half of h or y."""
  for j in range(plan.part_n // lt.COLUMNS):
    columns = slice(j * lt.COLUMNS, (j + 1) * lt.COLUMNS)
    yield columns, tile.index_n * plan.part_n + columns.start


def _when_inside(plan, column):
  """Runs the function if the chunk is one of the results' columns."""
  width = plan.d_out // plan.halves
  if width % plan.part_n == 0:
    return lambda function: function()
  return pl.when(column < width)


def _pad_bias(bias: Float[Array, "E n"], plan) -> Float[Array, "E+1 n"]:
  """Returns the bias with a row of zeros, E, for rows of no group."""
  return jnp.pad(bias, ((0, 1), (0, 0)))


def _bias_rows(bias, plan, tile, column):
  """Returns 64 columns of the expert's bias, once for every row."""
  if bias is None:
    return 0.0
  columns = bias.at[tile.expert, pl.ds(column, lt.COLUMNS)]
  values = plgpu.load(columns, optimized=False).astype(jnp.float32)
  return lax.broadcast_in_dim(values, (plan.part_m, lt.COLUMNS), (1,))


class _RowStore:
  """Stores chunks of a part's rows to one result."""

  def __init__(self, plan, tile, rows, y, ids=None):
    self.plan, self.tile, self.y = plan, tile, y
    self.rows = rows._replace(width=y.shape[1])
    self.places = self.rows.locate_out(ids, tile.row, plan.part_m)

  def __call__(self, chunk, column) -> None:
    self.rows.store(
      chunk.astype(self.plan.dtype),
      self.y,
      self.places,
      column,
      self.tile.begin,
      self.tile.end,
    )
