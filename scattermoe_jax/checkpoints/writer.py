"""Writes folders of safetensors files, tensor by tensor, all or nothing.

The header comes first and needs only shapes, so no two tensors have to be in
memory at once. Everything goes to a temporary folder beside the wanted one,
which takes the wanted name when it is complete.
"""

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scattermoe_jax.checkpoints.errors import CheckpointError
from scattermoe_jax.checkpoints.reader import DTYPES, FILE_NAME, INDEX_NAME

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorToWrite(NamedTuple):
  """A tensor that is made when its turn comes.

  Attributes:
    name: its name in the file.
    dtype: of its elements.
    shape: its shape.
    make: returns its values, of as many elements in row-major order.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    """Its size in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def new_folder(directory: str | os.PathLike) -> Iterator[Path]:
  """Yields a temporary folder that becomes `directory` if all goes well.

  Raises:
    CheckpointError: if `directory` exists and is not empty.
  """
  directory = Path(directory)
  _check_free(directory)
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = directory.parent / f".{directory.name}.partial-{uuid.uuid4().hex}"
  partial.mkdir()
  try:
    yield partial
    _check_free(directory)
    if directory.exists():
      directory.rmdir()
    partial.rename(directory)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def write_tensors(
  directory: Path,
  tensors: Sequence[TensorToWrite],
  *,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes `model.safetensors`, or shards with their index if it is too large.

  Args:
    directory: an existing folder.
    tensors: what to write, in this order.
    max_shard_bytes: where to begin a new file; a larger tensor has its own.
  """
  shards: list[list[TensorToWrite]] = [[]]
  room = max_shard_bytes
  for tensor in tensors:
    if shards[-1] and tensor.num_bytes > room:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(tensor)
    room -= tensor.num_bytes
  if len(shards) == 1:
    write_file(directory / FILE_NAME, shards[0])
    return
  weight_map = {}
  for i, shard in enumerate(shards, start=1):
    file_name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    write_file(directory / file_name, shard)
    weight_map.update({tensor.name: file_name for tensor in shard})
  total = sum(tensor.num_bytes for tensor in tensors)
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(directory / INDEX_NAME, index)


def write_file(path: Path, tensors: Sequence[TensorToWrite]) -> None:
  """Writes one safetensors file, one tensor at a time."""
  # Readers of the format in PyTorch programs ask for this entry.
  header: dict[str, object] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for tensor in tensors:
    header[tensor.name] = {
      "dtype": _NAMES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [offset, offset + tensor.num_bytes],
    }
    offset += tensor.num_bytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # The data begins on a multiple of 8 bytes.
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
      values = np.ascontiguousarray(tensor.make(), tensor.dtype)
      if values.nbytes != tensor.num_bytes:
        raise CheckpointError(
          f"{path}: tensor {tensor.name!r} was announced with shape "
          f"{tensor.shape} and came with {values.size} elements."
        )
      file.write(values.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
  """Writes JSON that people can read."""
  path.write_text(json.dumps(value, indent=2) + "\n")


def _check_free(directory: Path) -> None:
  if directory.exists() and not (
    directory.is_dir() and not any(directory.iterdir())
  ):
    raise CheckpointError(
      f"{directory} already exists; name a folder that does not, so that "
      "nothing is overwritten."
    )
