"""MXFP4: 32 four-bit floats that share an eight-bit exponent.

  value = FP4(nibble) * 2^(scale - 127)     low nibble: the even element

Source: OCP Microscaling Formats (MX) 1.0; the order of nibbles is gpt-oss's.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from scattermoe_jax.checkpoints.reader import StoredTensor

# Sign, two bits of exponent, one of mantissa.
_FP4 = np.array(
  [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6],
  np.float32,
)
# Both values of a byte, low nibble first.
_PAIRS = np.stack(
  [_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]], axis=-1
)


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """Returns the values, exact in float32.

  Args:
    blocks: (.., blocks, 16) uint8, two values a byte.
    scales: (.., blocks) uint8, exponents.

  Returns:
    (.., blocks * 32) float32.
  """
  values = _PAIRS[blocks].reshape(*blocks.shape[:-1], 32)
  values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
  return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * 32)


class Mxfp4Tensor(NamedTuple):
  """Blocks and scales of one tensor, read as if it were stored in float32."""

  blocks: StoredTensor
  scales: StoredTensor

  @property
  def name(self) -> str:
    """The name of the blocks."""
    return self.blocks.name

  @property
  def path(self):
    """The file."""
    return self.blocks.path

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the values."""
    *rows, num_blocks, half = self.blocks.shape
    return (*rows, num_blocks * half * 2)

  def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, values): slices of the leading axis."""
    scales = self.scales.read()
    # The values take eight times the bytes of the blocks.
    for first, blocks in self.blocks.chunks(max_bytes=2 * 2**20):
      yield first, dequantise(blocks, scales[first : first + len(blocks)])
