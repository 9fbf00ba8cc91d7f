"""What becomes of a tile of products: stored, activated or differentiated.

An epilogue gets the float32 sums of one consumer's part of a tile and writes to
global memory, 64 columns at a time through a small ring of shared memory.

  StoreRows        y = acc + bias, or gates (acc + bias)
  Activate         h = acc + bias, a = f(h)
  Differentiate    da' = acc; dh = (gates da') f'(h), gates a, <da', a>

The first holds its results in 16 bits, so that the registers of the sums are
free for the next tile, and its pieces leave one by one between that tile's
products: the tensor core does not wait for them. The others, which have more to
write or to read than registers hold, store at once.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from scattermoe_jax.kernels.mosaic import layouts as lt

_SLOTS = 2  # chunks of 64 columns of a consumer on their way out


class Epilogue:
  """What the kernel asks of an epilogue.

  Attributes:
    name: of the kernel that it makes.
    holds: whether a tile is stored between the products of the next one, by
      `hold` and `pieces`; else at once, by `store`.
  """

  name: str
  holds = False

  @property
  def approximates(self) -> bool:
    """Whether it takes the device's own exp."""
    return False

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

  def scratch_types(self, plan) -> list:
    """Returns the shared memory it wants: the ring through which it stores."""
    stages = (2, _SLOTS, plan.part_m, lt.COLUMNS)
    return [plgpu.SMEM(stages, plan.dtype, transforms=lt.BY_ROW)]

  def held_types(self, plan, rows) -> list[jax.ShapeDtypeStruct]:
    """Returns the types of what `hold` returns."""
    raise NotImplementedError

  def hold(self, plan, accs, tile, extra, rows) -> list[Array]:
    """Returns what of a tile is kept in registers until it is stored."""
    raise NotImplementedError

  def pieces(self, plan, held, tile, extra, outs, scratch, rows) -> list:
    """Returns functions that together store a tile, to be called in order."""
    raise NotImplementedError

  def store(self, plan, accs, tile, extra, outs, scratch, rows, loaded):
    """Stores one consumer's part of a tile."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class StoreRows(Epilogue):
  """Stores products, plus a bias, times gates, in grouped or scattered order.

  Attributes:
    bias: one per expert and column, or None.
    gates: one per grouped row, or None.
    scattered_ids: the scattered row of each grouped row; None to store in
      grouped order.
  """

  bias: Float[Array, "E n"] | None = None
  gates: Float[Array, " S"] | None = None
  scattered_ids: Int[Array, " S"] | None = None
  name = "scatter2scatter"
  holds = True

  def operands(self, plan):
    # The bias of a whole tile is read, which may reach past the last column.
    width = plan.num_tiles_n * plan.part_n
    bias = [] if self.bias is None else [_pad_bias(self.bias, width)]
    gates = [] if self.gates is None else [_pad_gates(self.gates, plan)]
    ids = [] if self.scattered_ids is None else [self.scattered_ids]
    return bias + gates + ids

  def out_types(self, plan):
    return [jax.ShapeDtypeStruct((plan.num_rows, plan.d_out), plan.dtype)]

  def held_types(self, plan, rows):
    y = jax.ShapeDtypeStruct((plan.part_m, plan.part_n), plan.dtype)
    if self.scattered_ids is None:
      return [y]
    return [y, rows.ids_type(plan.part_m)]

  def hold(self, plan, accs, tile, extra, rows):
    operands = iter(extra)
    bias = next(operands) if self.bias is not None else None
    column = tile.index_n * plan.part_n
    y = _add_bias(accs[0], bias, tile, column)
    if self.gates is not None:
      y = _gates_of_rows(plan, next(operands), tile, y.shape) * y
    held = [y.astype(plan.dtype)]
    if self.scattered_ids is not None:
      ids = next(operands)
      held.append(rows.look_up(ids, tile.row, tile.end, plan.part_m))
    return held

  def pieces(self, plan, held, tile, extra, outs, scratch, rows):
    y, *ids = held
    ring = _Ring(plan, tile, rows, *scratch)

    def send(columns, column):
      if not ids:
        ring.send(y[:, columns], outs[0], column)
      else:
        ring.store(ring.put(y[:, columns]), outs[0], ids[0], column)

    return [
      functools.partial(
        _when_inside(plan, column), functools.partial(send, columns, column)
      )
      for columns, column in _chunks(plan, tile)
    ]


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

  activation: Any
  keep_h: bool
  bias: Float[Array, "E m"] | None = None
  name = "up_projection"

  @property
  def approximates(self):
    return self.activation.is_exponential

  def operands(self, plan):
    return [] if self.bias is None else [_pad_bias(self.bias, plan.d_out)]

  def out_types(self, plan):
    rows, width = plan.num_rows, plan.d_out
    h = jax.ShapeDtypeStruct((rows, width), plan.dtype)
    a = jax.ShapeDtypeStruct((rows, width // plan.halves), plan.dtype)
    return [h, a] if self.keep_h else [a]

  def store(self, plan, accs, tile, extra, outs, scratch, rows, loaded):
    bias = extra[0] if extra else None
    *h_out, a_out = outs
    ring = _Ring(plan, tile, rows, *scratch)
    half = plan.d_out // plan.halves
    for columns, column in _chunks(plan, tile):

      @_when_inside(plan, column)
      def _(columns=columns, column=column):
        h = []
        for i in range(plan.halves):
          sums, first = accs[i][:, columns], column + i * half
          h.append(_add_bias(sums, bias, tile, first))
          if self.keep_h:
            ring.send(h[i], h_out[0], first)
        ring.send(_activate(self.activation, h), a_out, column)


@dataclasses.dataclass(frozen=True, eq=False)
class Differentiate(Epilogue):
  """Stores the backward down to h: of products da', gates and a kept h.

    dh = (gates da') f'(h); weighted a = gates f(h); sums = <da', f(h)>

  The producer loads h through the stages of the ring, in the turn after the
  tile's last product, so that it is there when the sum is.

  Attributes:
    activation: f.
    h: the pre-activation, grouped; S rows, and more up to a multiple of 8.
    gates: one per grouped row.
  """

  activation: Any
  h: Float[Array, "rows m"]
  gates: Float[Array, " S"]
  name = "down_projection_grad"

  @property
  def approximates(self):
    return self.activation.is_exponential

  def operands(self, plan):
    return [self.h, _pad_gates(self.gates, plan)]

  def out_types(self, plan):
    a = jax.ShapeDtypeStruct((plan.num_rows, plan.d_out), plan.dtype)
    sums = (plan.num_windows, plan.num_tiles_n, plan.config.block_m)
    return [
      jax.ShapeDtypeStruct((plan.num_rows, self.h.shape[1]), plan.dtype),
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

  def store(self, plan, accs, tile, extra, outs, scratch, rows, loaded):
    [acc], (dh_out, a_out, sums_out) = accs, outs
    ring = _Ring(plan, tile, rows, *scratch)
    shape = (plan.part_m, lt.COLUMNS)
    gate = _gates_of_rows(plan, extra[1], tile, shape)
    sums = jnp.zeros((plan.part_m,), jnp.float32)
    copies = self.h.shape[1] // plan.d_out
    for j, (columns, column) in enumerate(_chunks(plan, tile)):
      da = acc[:, columns]
      with loaded(j) as stage:
        h = [stage[i][...].astype(jnp.float32) for i in range(copies)]
      a, *dh = _activate_vjp(self.activation, h, gate * da)
      sums += jnp.sum(da * a, axis=1)
      a = (gate * a).astype(plan.dtype)
      dh = [half.astype(plan.dtype) for half in dh]

      @_when_inside(plan, column)
      def _(column=column, a=a, dh=dh):
        for i in range(copies):
          ring.send(dh[i], dh_out, column + i * plan.d_out)
        ring.send(a, a_out, column)

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


def _pad_bias(bias: Float[Array, "E n"], width: int) -> Float[Array, "E+1 _"]:
  """Returns the bias with a row of zeros, E, for rows of no group."""
  return jnp.pad(bias, ((0, 1), (0, width - bias.shape[1])))


def _add_bias(sums, bias, tile, column):
  """Adds the expert's bias, from that column on, to every row of sums."""
  if bias is None:
    return sums
  columns = bias.at[tile.expert, pl.ds(column, sums.shape[1])]
  values = plgpu.load(columns, optimized=False).astype(jnp.float32)
  return sums + lax.broadcast_in_dim(values, sums.shape, (1,))


def _pad_gates(gates: Float[Array, " S"], plan) -> Float[Array, " _"]:
  """Returns the gates of S rows and of those that a part may have past them."""
  # What it reads there is not stored.
  return jnp.pad(gates.astype(jnp.float32), (0, plan.config.block_m))


def _gates_of_rows(plan, gates, tile, shape):
  """Returns the gate of each row of a part, in all columns."""
  rows = gates.at[pl.ds(tile.row, plan.part_m)]
  return lax.broadcast_in_dim(plgpu.load(rows, optimized=False), shape, (0,))


class _Ring:
  """The stages through which one consumer's chunks leave."""

  def __init__(self, plan, tile, rows, ring):
    self.plan, self.tile, self.rows, self.ring = plan, tile, rows, ring
    self.turns = itertools.cycle(range(_SLOTS))
    # The last tile's chunks left while this one was multiplied; since their
    # number may be odd, the ring starts over with all slots free.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def put(self, chunk):
    """Writes a chunk to the next stage, once its last copy has left."""
    plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
    stage = self.ring.at[self.tile.consumer, next(self.turns)]
    stage[...] = chunk.astype(self.plan.dtype)
    plgpu.commit_smem()
    return stage

  def send(self, chunk, y, column) -> None:
    """Stores rows [begin, end) of a chunk to grouped rows of y.

    By TMA, whose copies have a static height, if those are all; else row by
    row: copies of every power of two were two fifths of what was compiled.
    """
    stage, tile, height = self.put(chunk), self.tile, self.plan.part_m
    num_rows = tile.end - tile.begin

    @pl.when(num_rows == height)
    def _():
      target = y.at[pl.ds(tile.row, height), pl.ds(column, lt.COLUMNS)]
      plgpu.copy_smem_to_gmem(stage, target)

    @pl.when((num_rows > 0) & (num_rows < height))
    def _():
      self.store(stage, y, self.rows.consecutive(tile.row, height), column)

  def store(self, stage, y, ids, column) -> None:
    """Stores rows [begin, end) of a stage to the rows `ids` of y."""
    rows = self.rows._replace(width=y.shape[1], fan_out=1)
    rows.store(stage, y, ids, column, self.tile.begin, self.tile.end)
