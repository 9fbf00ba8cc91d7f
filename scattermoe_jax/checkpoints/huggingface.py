"""Loads and saves folders of weights, a tensor at a time.

  directory/config.json + *.safetensors   <->   ModelConfig, variables

Shapes and names are all checked before any weight is read or written.
"""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from scattermoe_jax.checkpoints.config_json import (
  CONFIG_NAME,
  config_from_entries,
  config_to_entries,
  get_family,
  read_dtype,
  read_entries,
)
from scattermoe_jax.checkpoints.errors import CheckpointError
from scattermoe_jax.checkpoints.layouts import copy_into, empty_aligned
from scattermoe_jax.checkpoints.mxfp4 import Mxfp4Tensor
from scattermoe_jax.checkpoints.names import IGNORED_SUFFIXES
from scattermoe_jax.checkpoints.plan import OWN_FAMILY, Piece, make_plan
from scattermoe_jax.checkpoints.reader import StoredTensor, read_folder
from scattermoe_jax.checkpoints.writer import (
  TensorToWrite,
  new_folder,
  write_json,
  write_tensors,
)
from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.models.transformer import Transformer

Variables = dict[str, Any]

# Path and values of one array -> where it shall live.
Place = Callable[[str, np.ndarray], jax.Array]

# Files beside the weights that go along when a model is saved like another.
_COMPANIONS = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.jinja",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
)


def load(
  directory: str | os.PathLike,
  *,
  dtype: str | None = None,
  place: Place | None = None,
  on_progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, Variables]:
  """Returns a model's config and variables, for `Transformer(config).apply`.

  Args:
    directory: with config.json and safetensors, of a family in `FAMILIES` or
      from `save`.
    dtype: of weights and arithmetic; None for what config.json says.
    place: puts one array on its device or devices, given its path
      ("params/layer_0/ffn/experts/w_gate_up"); by default on JAX's device.
    on_progress: called after each array with the bytes done and in all.

  Host memory: the arrays of a CPU, or one array at a time where they go to
  another device, and 16 MB of buffer.

  Raises:
    CheckpointError: if the folder is not whole or does not fit the model; the
      message names the file and the tensor.
  """
  directory = Path(directory)
  entries = read_entries(directory)
  config = read_config(directory, dtype=dtype)
  shapes = _variable_shapes(config)
  plan = make_plan(
    _table(entries), {path: leaf.shape for path, leaf in shapes.items()}
  )
  stored = _resolve(directory, plan, read_folder(directory))
  _check_shapes(plan, shapes, stored)

  total = sum(_num_bytes(leaf) for leaf in shapes.values())
  done = 0
  # `jnp.asarray` would copy; nobody else has this array.
  place = place or (lambda path, array: jax.device_put(array))
  arrays = {}
  for path, leaf in shapes.items():
    array = empty_aligned(leaf.shape, np.dtype(leaf.dtype))
    for piece in plan[path]:
      view = piece.view(array)
      for first, rows in stored[piece.theirs].chunks():
        copy_into(view[first : first + len(rows)] if view.ndim else view, rows)
    arrays[path] = place(path, array)
    done += _num_bytes(leaf)
    if on_progress:
      on_progress(done, total)
  return config, unflatten_dict(arrays, sep="/")


def read_config(
  directory: str | os.PathLike, *, dtype: str | None = None
) -> ModelConfig:
  """Returns the model that a folder's config.json describes.

  Args:
    directory: holds config.json.
    dtype: of weights and arithmetic; None for what config.json says.

  Raises:
    CheckpointError: if it is missing or describes no model of ours.
  """
  path = Path(directory) / CONFIG_NAME
  entries = read_entries(directory)
  config = config_from_entries(entries, str(path))
  if dtype is None:
    if entries["model_type"] == OWN_FAMILY:
      return config
    dtype = read_dtype(entries, str(path))
  return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def read_family(directory: str | os.PathLike) -> str:
  """Returns the family of a folder, its config.json's `model_type`.

  Raises:
    CheckpointError: if config.json is missing.
  """
  return str(read_entries(directory).get("model_type"))


def save(
  directory: str | os.PathLike,
  config: ModelConfig,
  variables: Variables,
  *,
  family: str | None = None,
  like: str | os.PathLike | None = None,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a folder that `load` reads and, in a family, transformers as well.

  Args:
    directory: the folder; must not exist, or be empty. It appears under this
      name only when all of it is written.
    config: the model.
    variables: its variables, in the shapes of one device.
    family: a key of `FAMILIES`; None for our own names.
    like: a folder of that family, instead of `family`: its other entries of
      config.json and its tokenizer go along.
    max_shard_bytes: of weights in one file.

  Raises:
    CheckpointError: if the folder exists, the variables are not those of the
      config's model, the family cannot express it, or `like` is of none.
  """
  others: dict[str, Any] = {}
  if like is not None:
    others = read_entries(like)
    if family is None:
      family = others.get("model_type")
      if family != OWN_FAMILY:
        get_family(family, str(Path(like) / CONFIG_NAME))
    # What is written is never quantised, nor said in the newer words.
    for key in ("quantization_config", "rope_parameters", "dtype"):
      others.pop(key, None)
  family = family or OWN_FAMILY
  entries = others | config_to_entries(config, family)
  arrays = flatten_dict(nn.unbox(variables), sep="/")
  _check_variables(arrays, _variable_shapes(config))
  plan = make_plan(family, {path: np.shape(a) for path, a in arrays.items()})
  with new_folder(directory) as partial:
    write_tensors(
      partial,
      list(_to_write(plan, arrays)),
      max_shard_bytes=max_shard_bytes,
    )
    write_json(partial / CONFIG_NAME, entries)
    for name in _COMPANIONS:
      if like is not None and (Path(like) / name).exists():
        shutil.copy(Path(like) / name, partial / name)


def _to_write(
  plan: Mapping[str, list[Piece]], arrays: Mapping[str, jax.Array]
) -> Iterator[TensorToWrite]:
  # Pieces of one array follow each other: it is fetched from its device once.
  fetched: dict[str, np.ndarray] = {}

  def fetch(path: str) -> np.ndarray:
    if path not in fetched:
      fetched.clear()
      fetched[path] = np.asarray(arrays[path])
    return fetched[path]

  def view(path: str, piece: Piece) -> np.ndarray:
    return piece.view(fetch(path))

  for path, pieces in plan.items():
    for piece in pieces:
      yield TensorToWrite(
        piece.theirs,
        np.dtype(arrays[path].dtype),
        piece.file_shape(tuple(arrays[path].shape)),
        functools.partial(view, path, piece),
      )


def _check_variables(
  arrays: Mapping[str, Any],
  expected: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
  """Raises CheckpointError if `load` would refuse what is to be saved."""
  # Names before shapes: what is not the model's may be no array (`sow`).
  for path in arrays:
    if "/lora/" in path:
      raise CheckpointError(
        f"save: {path!r} belongs to an adapter; merge it into its weight "
        "(nn.lora.merge), or write adapters apart (save_adapters)."
      )
    if f"params/{path}" in expected:
      raise CheckpointError(
        f"save: {path!r} is in no collection; pass {{'params': params}} for "
        "parameters alone."
      )
    if path not in expected:
      raise CheckpointError(
        f"save: the config's model has no {path!r}; it has the collections "
        f"{sorted({name.partition('/')[0] for name in expected})}."
      )
  for path, leaf in expected.items():
    if path not in arrays:
      raise CheckpointError(
        f"save: the variables lack {path!r}, which the config's model has."
      )
    shape = np.shape(arrays[path])
    if shape == leaf.shape:
      continue
    is_split = (*shape[:-2], math.prod(shape[-2:])) == leaf.shape
    join = "join what a mesh splits: sharding.join_gate(variables)"
    raise CheckpointError(
      f"save: {path!r} has shape {shape}; the config's model has {leaf.shape}"
      f"{f'; {join}' if is_split else ''}."
    )


def _variable_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  # They do not depend on the backend, and that of the CPU runs everywhere.
  model = Transformer(dataclasses.replace(config, implementation="xla"))
  input_ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), input_ids)
  return flatten_dict(variables, sep="/")


def _table(entries: Mapping[str, Any]) -> str:
  """Returns the key of `NAMES` for a config.json."""
  quantisation = entries.get("quantization_config")
  if quantisation is None:
    return entries["model_type"]
  method = quantisation.get("quant_method")
  if (entries["model_type"], method) != ("gpt_oss", "mxfp4"):
    raise CheckpointError(
      f"{CONFIG_NAME}: weights quantised as {method!r} are not supported, only "
      "'mxfp4' of gpt_oss."
    )
  return "gpt_oss_mxfp4"


def _resolve(
  directory: Path,
  plan: Mapping[str, list[Piece]],
  stored: Mapping[str, StoredTensor],
) -> dict[str, StoredTensor | Mxfp4Tensor]:
  """Returns the tensor of each piece; refuses missing and unexpected ones."""
  rest = dict(stored)

  def take(name: str, path: str) -> StoredTensor:
    if name not in rest:
      raise CheckpointError(
        f"{directory} lacks tensor {name!r}, which holds {path!r}."
      )
    return rest.pop(name)

  resolved: dict[str, StoredTensor | Mxfp4Tensor] = {}
  for path, pieces in plan.items():
    for piece in pieces:
      name = piece.theirs
      if piece.is_mxfp4:
        resolved[name] = Mxfp4Tensor(
          take(f"{name}_blocks", path), take(f"{name}_scales", path)
        )
      else:
        resolved[name] = take(name, path)
  if "params/lm_head/kernel" not in plan:
    rest.pop("lm_head.weight", None)  # A second copy of tied embeddings.
  for name, tensor in rest.items():
    if not name.endswith(IGNORED_SUFFIXES):
      raise CheckpointError(
        f"{tensor.path} holds tensor {name!r}, which this model does not have."
      )
  return resolved


def _check_shapes(plan, shapes, stored) -> None:
  for path, pieces in plan.items():
    for piece in pieces:
      tensor = stored[piece.theirs]
      expected = piece.file_shape(shapes[path].shape)
      if tensor.shape != expected:
        raise CheckpointError(
          f"{tensor.path}: tensor {tensor.name!r} has shape {tensor.shape}; "
          f"config.json says {expected}."
        )


def _num_bytes(leaf: jax.ShapeDtypeStruct) -> int:
  return leaf.size * np.dtype(leaf.dtype).itemsize
