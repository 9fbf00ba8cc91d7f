"""Which tensors of a file make up an array of ours."""

import functools
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scattermoe_jax.checkpoints.errors import CheckpointError
from scattermoe_jax.checkpoints.layouts import LAYOUTS
from scattermoe_jax.checkpoints.names import NAMES, Name

# Files in our own names: every array as it is, "/" written as ".".
OWN_FAMILY = "scattermoe_jax"

_PARAMS = "params/"
_LAYER = re.compile(r"layer_(\d+)")


class Piece(NamedTuple):
  """A tensor of the file, as a part of one array of ours.

  Attributes:
    theirs: its name in the file.
    layout: a key of `LAYOUTS`.
    expert: index along the first axis of our array; None for all of it.
    is_mxfp4: see `Name`.
  """

  theirs: str
  layout: str
  expert: int | None = None
  is_mxfp4: bool = False

  def view(self, array: np.ndarray) -> np.ndarray:
    """Returns the part of our array, its elements in the file's order."""
    part = array if self.expert is None else array[self.expert]
    return LAYOUTS[self.layout].view(part)

  def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the file's tensor, given that of our array."""
    part = shape if self.expert is None else shape[1:]
    return LAYOUTS[self.layout].file_shape(part)


def make_plan(
  family: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Piece]]:
  """Returns the pieces of each of our arrays.

  Args:
    family: a key of `NAMES`, or `OWN_FAMILY`.
    shapes: of our arrays, by path: "params/layer_0/..".

  Raises:
    CheckpointError: if the family has no tensor for one of the paths.
  """
  if family == OWN_FAMILY:
    return {path: [Piece(path.replace("/", "."), "same")] for path in shapes}
  return {path: _pieces(family, path, shape) for path, shape in shapes.items()}


def _pieces(family: str, path: str, shape: tuple[int, ...]) -> list[Piece]:
  layers = _LAYER.findall(path)
  pattern = _LAYER.sub("layer_{layer}", path.removeprefix(_PARAMS))
  names = _by_pattern(family).get(pattern, ())
  if not names or not path.startswith(_PARAMS):
    raise CheckpointError(
      f"A checkpoint of family {family!r} has no tensor for {path!r}."
    )
  pieces = []
  # All parts of one expert side by side, as the families themselves write them.
  for expert in range(shape[0] if "{expert}" in names[0].theirs else 1):
    for name in names:
      split = "{expert}" in name.theirs
      theirs = name.theirs.format(
        layer=layers[0] if layers else "", expert=expert
      )
      pieces.append(
        Piece(theirs, name.layout, expert if split else None, name.is_mxfp4)
      )
  return pieces


@functools.cache
def _by_pattern(family: str) -> dict[str, tuple[Name, ...]]:
  table: dict[str, tuple[Name, ...]] = {}
  for name in NAMES[family]:
    table[name.ours] = (*table.get(name.ours, ()), name)
  return table
