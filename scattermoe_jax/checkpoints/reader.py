"""Reads folders of safetensors files, tensor by tensor, never pickle.

  8 bytes   N, little-endian
  N bytes   JSON: {"name": {"dtype": "BF16", "shape": [..], "data_offsets":
            [begin, end]}, .., "__metadata__": {..}}
  the rest  the tensors' bytes, row-major, offsets counted from here

A file is read with `readinto` and not mapped into memory: mapped pages count
as this process's memory, and a model larger than it would seem to fit.
Source: the format's description, github.com/huggingface/safetensors.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from scattermoe_jax.checkpoints.errors import CheckpointError

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

_MAX_HEADER_BYTES = 100 * 2**20
_CHUNK_BYTES = 16 * 2**20


class StoredTensor(NamedTuple):
  """Where one tensor lies.

  Attributes:
    name: its name in the file.
    path: the file.
    dtype: of its elements.
    shape: its shape.
    offset: of its first byte from the start of the file.
  """

  name: str
  path: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def num_bytes(self) -> int:
    """Its size in the file."""
    return math.prod(self.shape) * self.dtype.itemsize

  def chunks(
    self, max_bytes: int = _CHUNK_BYTES
  ) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows): slices of the leading axis of bounded size.

    A row larger than the bound comes alone. The same buffer is used again for
    every slice.
    """
    if not self.shape or not self.num_bytes:
      yield 0, self.read()
      return
    row_bytes = self.num_bytes // self.shape[0]
    rows = min(max(max_bytes // row_bytes, 1), self.shape[0])
    buffer = np.empty((rows, *self.shape[1:]), self.dtype)
    with open(self.path, "rb", buffering=0) as file:
      file.seek(self.offset)
      for first in range(0, self.shape[0], rows):
        part = buffer[: min(rows, self.shape[0] - first)]
        _fill(file, part, self)
        yield first, part

  def read(self) -> np.ndarray:
    """Returns the whole tensor."""
    out = np.empty(self.shape, self.dtype)
    with open(self.path, "rb", buffering=0) as file:
      file.seek(self.offset)
      _fill(file, out, self)
    return out


def read_folder(directory: str | os.PathLike) -> dict[str, StoredTensor]:
  """Returns where each tensor of a folder lies; reads headers only.

  Args:
    directory: holds `model.safetensors`, or shards with their index, or files
      that end in `.safetensors`.

  Raises:
    CheckpointError: if a shard is missing, a file is truncated or no
      safetensors file is there.
  """
  directory = Path(directory)
  index = directory / INDEX_NAME
  if index.exists():
    return _read_shards(directory, index)
  paths = sorted(directory.glob("*.safetensors"))
  if directory / FILE_NAME in paths:
    paths = [directory / FILE_NAME]
  if not paths:
    pickles = sorted(p.name for p in directory.glob("*.bin"))
    hint = (
      f" {pickles[0]} is a pickle, which may run code when it is opened; let "
      "the program that wrote it save safetensors."
      if pickles
      else ""
    )
    raise CheckpointError(f"{directory} holds no .safetensors file.{hint}")
  tensors: dict[str, StoredTensor] = {}
  for path in paths:
    for name, tensor in read_header(path).items():
      if name in tensors:
        raise CheckpointError(
          f"{path} holds tensor {name!r}, which {tensors[name].path.name} "
          "holds as well."
        )
      tensors[name] = tensor
  return tensors


def _read_shards(directory: Path, index: Path) -> dict[str, StoredTensor]:
  try:
    weight_map = dict(json.loads(index.read_text())["weight_map"])
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(
      f"{index} is not an index of shards: {error}."
    ) from None
  headers = {}
  for name, file_name in weight_map.items():
    path = directory / file_name
    if path.parent != directory:
      raise CheckpointError(
        f"{index} places tensor {name!r} outside its folder: {file_name!r}."
      )
    if file_name not in headers:
      if not path.exists():
        raise CheckpointError(
          f"{path} is missing; {index.name} says that it holds tensor {name!r}."
        )
      headers[file_name] = read_header(path)
    if name not in headers[file_name]:
      raise CheckpointError(
        f"{path} lacks tensor {name!r}, which {index.name} says it holds."
      )
  for file_name, header in headers.items():
    for name in header:
      if weight_map.get(name) != file_name:
        raise CheckpointError(
          f"{directory / file_name} holds tensor {name!r}, of which "
          f"{index.name} says nothing."
        )
  return {name: headers[file][name] for name, file in weight_map.items()}


def read_header(path: str | os.PathLike) -> dict[str, StoredTensor]:
  """Returns where each tensor of one safetensors file lies.

  Raises:
    CheckpointError: if the file is truncated or not safetensors.
  """
  path = Path(path)
  if not path.exists():
    raise CheckpointError(f"{path} does not exist.")
  size = path.stat().st_size
  with open(path, "rb") as file:
    header_bytes = int.from_bytes(file.read(8), "little")
    if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
      raise CheckpointError(
        f"{path} is truncated, or no safetensors file: it has {size} bytes, "
        "too few for the header that it announces."
      )
    try:
      header = json.loads(file.read(header_bytes))
      header.pop("__metadata__", None)
      items = [
        (name, t["dtype"], tuple(t["shape"]), *t["data_offsets"])
        for name, t in header.items()
      ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise CheckpointError(
        f"{path} is no safetensors file: its header does not parse ({error})."
      ) from None
  start = 8 + header_bytes
  tensors = {}
  for name, dtype, shape, begin, end in items:
    if dtype not in DTYPES:
      raise CheckpointError(
        f"{path}: tensor {name!r} has dtype {dtype}; can read {list(DTYPES)}."
      )
    tensor = StoredTensor(name, path, DTYPES[dtype], shape, start + begin)
    if begin < 0 or end - begin != tensor.num_bytes:
      raise CheckpointError(
        f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} needs "
        f"{tensor.num_bytes} bytes; its header gives it {end - begin}."
      )
    if start + end > size:
      raise CheckpointError(
        f"{path} is truncated: tensor {name!r} ends at byte {start + end}, the "
        f"file at {size}."
      )
    tensors[name] = tensor
  return tensors


def _fill(file, out: np.ndarray, tensor: StoredTensor) -> None:
  view = memoryview(out.reshape(-1).view(np.uint8))
  while view:
    count = file.readinto(view)
    if not count:
      raise CheckpointError(
        f"{tensor.path} ended while tensor {tensor.name!r} was being read."
      )
    view = view[count:]
