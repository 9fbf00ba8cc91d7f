"""Widths and rows as the Hopper kernels want them: padded with zeros."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Copies move 16 bytes of a row, or boxes of 8 rows.
MULTIPLE = 8
# The tensor core reads tiles of 64 columns; other widths are padded to them.
TILE_WIDTH = 64


def padded(width: int) -> int:
  """Returns the next multiple of 64."""
  return -(-width // TILE_WIDTH) * TILE_WIDTH


def pad(array, *axes: int):
  """Returns the array with zeros up to a multiple of 64 along `axes`."""
  if array is None:
    return None
  widths = [(0, 0)] * array.ndim
  for axis in axes:
    widths[axis] = (0, padded(array.shape[axis]) - array.shape[axis])
  return jnp.pad(array, widths) if any(after for _, after in widths) else array


def pad_rows(array: Float[Array, "S d"]) -> Float[Array, "_ d"]:
  """Returns the array with zero rows up to a multiple of 8, as TMA asks."""
  missing = -array.shape[0] % MULTIPLE
  return jnp.pad(array, ((0, missing), (0, 0))) if missing else array
