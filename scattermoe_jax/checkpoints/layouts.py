"""How a file's tensor lies in an array of ours: as a view of it.

Each function takes one of our arrays (or one expert's matrix of it) and returns
a NumPy view whose elements, in row-major order, are the file's tensor. The same
view reads (`view[...] = file`) and writes (`file = view`), so the two
directions cannot disagree.

                ours (d_in, d_out)            the file
  transposed    kernel (d, n)                 (n, d), PyTorch's Linear
  gate, up      w_gate_up (d, 2n), [g | u]    (n, d) each, split
  transposed    w_gate_up (E, d, 2n)          (E, 2n, d), fused: rows [g; u]
  interleaved   w_gate_up (E, d, 2n)          (E, d, 2n), columns g0 u0 g1 u1 ..
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
  """A view, and which of its axes the file merges with the next one.

  Attributes:
    view: our array -> the view.
    merged_axis: counted from the end; None if the view has the file's shape.
  """

  view: Callable[[np.ndarray], np.ndarray]
  merged_axis: int | None = None

  def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the file's tensor for an array of ours."""
    dims = self.view(np.broadcast_to(np.int8(0), shape)).shape
    if self.merged_axis is None:
      return dims
    axis = len(dims) + self.merged_axis
    return (*dims[:axis], dims[axis] * dims[axis + 1], *dims[axis + 2 :])


def _same(w: np.ndarray) -> np.ndarray:
  return w


def _transposed(w: np.ndarray) -> np.ndarray:
  return w.swapaxes(-1, -2)


def _gate(w: np.ndarray) -> np.ndarray:
  return w[..., : w.shape[-1] // 2]


def _up(w: np.ndarray) -> np.ndarray:
  return w[..., w.shape[-1] // 2 :]


def _gate_transposed(w: np.ndarray) -> np.ndarray:
  return _transposed(_gate(w))


def _up_transposed(w: np.ndarray) -> np.ndarray:
  return _transposed(_up(w))


def _interleaved(w: np.ndarray) -> np.ndarray:
  """(.., [g | u]) as (.., n, 2): g0 u0 g1 u1 .. in row-major order."""
  return w.reshape(*w.shape[:-1], 2, w.shape[-1] // 2).swapaxes(-1, -2)


def _interleaved_transposed(w: np.ndarray) -> np.ndarray:
  """(E, d, [g | u]) as (E, n, 2, d): rows g0 u0 g1 u1 .."""
  return np.moveaxis(_interleaved(w), -3, -1)


LAYOUTS = {
  "same": Layout(_same),
  "transposed": Layout(_transposed),
  "gate": Layout(_gate_transposed),
  "up": Layout(_up_transposed),
  "interleaved": Layout(_interleaved, -2),
  "interleaved_transposed": Layout(_interleaved_transposed, -3),
}


def copy_into(view: np.ndarray, rows: np.ndarray) -> None:
  """Writes `rows`, in row-major order, over `view`, casting to its dtype.

  Sixteen rows at a time where the view is transposed: a write then fills whole
  cache lines of the array behind it, five times faster than row by row. Cast
  before, since NumPy casts three times slower on the way to strided memory.
  """
  rows = rows.reshape(view.shape)
  strides = view.strides
  if view.ndim >= 2 and strides[0] == view.itemsize:
    for first in range(0, view.shape[0], 16):
      block = rows[first : first + 16].astype(view.dtype, copy=False)
      view[first : first + 16] = block
  elif view.ndim >= 3 and strides[-1] == max(strides[1:]):
    for matrix, matrix_rows in zip(view, rows, strict=True):
      copy_into(matrix, matrix_rows)
  else:
    view[...] = rows


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an uninitialised array that JAX on a CPU takes without a copy."""
  alignment = 64  # Bytes; XLA's on CPUs.
  num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  buffer = np.empty(num_bytes + alignment, np.uint8)
  start = -buffer.ctypes.data % alignment
  return buffer[start : start + num_bytes].view(dtype).reshape(shape)
