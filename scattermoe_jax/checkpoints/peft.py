"""LoRA adapters of experts in the folder layout of the PEFT library.

  directory/adapter_config.json + adapter_model.safetensors

One linear layer per expert (Mixtral, OLMoE, Qwen3-MoE), for W (n, d):

  base_model.model.<layer>.lora_A.weight  (r, d)     .lora_B.weight  (n, r)

One tensor for all experts (Granite, JetMoE), PEFT's "target parameters":

  base_model.model.<layer>.lora_A.weight  (E r, d), the experts one by one
  base_model.model.<layer>.lora_B.weight  (n, r E), the experts interleaved

Adapters of a model in our own names keep those. PEFT's factor alpha / r is
part of our B; what we write has alpha = r.
Source: PEFT 0.21, tuners/lora/layer.py (`Linear`, `ParamWrapper`).
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from scattermoe_jax.checkpoints.errors import CheckpointError
from scattermoe_jax.checkpoints.names import NAMES
from scattermoe_jax.checkpoints.plan import OWN_FAMILY, Piece, make_plan
from scattermoe_jax.checkpoints.reader import StoredTensor, read_header
from scattermoe_jax.checkpoints.writer import (
  TensorToWrite,
  new_folder,
  write_file,
  write_json,
)

Tree = Any

CONFIG_NAME = "adapter_config.json"
FILE_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LORA = "lora"


def save_adapters(
  directory: str | os.PathLike,
  adapters: Tree,
  *,
  family: str | None = None,
  base: str = "",
) -> None:
  """Writes adapters from `nn.init_adapters`, so that PEFT can read them.

  Args:
    directory: the folder; must not exist, or be empty.
    adapters: of expert weights.
    family: of the adapted model, a key of `FAMILIES`; None for our own names.
    base: where the adapted model is, for people and for PEFT.

  Raises:
    CheckpointError: if the folder exists, or PEFT has no layout for the family.
  """
  family = family or OWN_FAMILY
  pairs = _pairs(adapters)
  ranks = {a.shape[2] for a, _ in pairs.values()}
  if len(ranks) != 1:
    raise CheckpointError(
      f"{directory}: adapters of one folder have one rank, got {sorted(ranks)}."
    )
  tensors, modules = [], []
  shapes = {path: (*a.shape[:2], b.shape[2]) for path, (a, b) in pairs.items()}
  for path, pieces in _plan(family, shapes).items():
    a, b = (np.asarray(x) for x in pairs[path])
    for piece in pieces:
      module = piece.theirs.removesuffix(".weight")
      modules.append(module)
      for letter, matrix in zip("AB", _to_file(piece, a, b), strict=True):
        name = f"{_PREFIX}{module}.lora_{letter}.weight"
        tensors.append(_tensor(name, matrix))
  with new_folder(directory) as partial:
    write_file(partial / FILE_NAME, tensors)
    write_json(
      partial / CONFIG_NAME,
      {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": a.shape[2],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **_targets(modules, is_split=_is_split(family)),
      },
    )


def load_adapters(
  directory: str | os.PathLike,
  params: Tree,
  *,
  family: str | None = None,
) -> Tree:
  """Returns the adapters of a folder, for `nn.with_adapters`.

  Args:
    directory: from `save_adapters` or PEFT.
    params: of the model they adapt.
    family: of that model, unless the folder is in our own names.

  Raises:
    CheckpointError: if the folder is not whole, or adapts what is no expert
      weight of this model.
  """
  directory = Path(directory)
  scale = _read_scale(directory / CONFIG_NAME)
  rest = read_header(directory / FILE_NAME)
  if family is None or any(n.startswith(f"{_PREFIX}params.") for n in rest):
    family = OWN_FAMILY
  weights = {
    path: w for path, w in flatten_dict(params, sep="/").items() if w.ndim == 3
  }
  shapes = {path: tuple(w.shape) for path, w in weights.items()}
  adapters = {}
  for path, pieces in _plan(family, shapes).items():
    terms = [
      (piece, factors)
      for piece in pieces
      if (factors := _take(rest, piece)) is not None
    ]
    if terms:
      a, b = _from_file(terms, shapes[path])
      place = _adapter_path(path)
      dtype = weights[path].dtype
      adapters[f"{place}/a"] = jnp.asarray(a, dtype)
      adapters[f"{place}/b"] = jnp.asarray(b * np.float32(scale), dtype)
  for name, tensor in rest.items():
    raise CheckpointError(
      f"{tensor.path} holds tensor {name!r}, which adapts no expert weight of "
      "this model."
    )
  return unflatten_dict(adapters, sep="/")


def _plan(
  family: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Piece]]:
  if family == "gpt_oss":
    raise CheckpointError(
      "PEFT nests the adapters of gpt_oss by the order in which it met its "
      "weights; save them in our own names, with family=None."
    )
  plan = make_plan(
    family, {f"params/{path}": shape for path, shape in shapes.items()}
  )
  return {path.removeprefix("params/"): plan[path] for path in plan}


def _to_file(
  piece: Piece, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the file's A and B; B's columns lie as the weight's do."""
  if piece.expert is not None:
    return a[piece.expert].T, piece.view(b)
  num_experts, d_in, rank = a.shape
  return (
    a.swapaxes(1, 2).reshape(num_experts * rank, d_in),
    b.transpose(2, 1, 0).reshape(b.shape[2], rank * num_experts),
  )


def _from_file(
  terms: list[tuple[Piece, tuple[np.ndarray, np.ndarray]]],
  shape: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
  """Returns our A and B of one weight, in float32.

  Gate and up have an A each in the file. Where these differ, ours holds both,
  of twice the rank, and each B sees its own.
  """
  num_experts, d_in, d_out = shape
  first_piece, (first_a, _) = terms[0]
  if first_piece.expert is None:
    file_a, file_b = terms[0][1]
    rank = len(file_a) // num_experts
    return (
      file_a.reshape(num_experts, rank, d_in).swapaxes(1, 2),
      file_b.reshape(d_out, rank, num_experts).transpose(2, 1, 0),
    )
  rank = len(first_a)
  layouts = sorted({piece.layout for piece, _ in terms})
  by_expert: dict[int | None, list[np.ndarray]] = {}
  for piece, (file_a, _) in terms:
    by_expert.setdefault(piece.expert, []).append(file_a)
  one_a = all(
    len(group) == len(layouts)
    and all(np.array_equal(group[0], other) for other in group)
    for group in by_expert.values()
  )
  places = {name: 0 if one_a else i for i, name in enumerate(layouts)}
  width = rank * (max(places.values()) + 1)
  a = np.zeros((num_experts, d_in, width), np.float32)
  b = np.zeros((num_experts, width, d_out), np.float32)
  for piece, (file_a, file_b) in terms:
    first = places[piece.layout] * rank
    a[piece.expert, :, first : first + rank] = file_a.T
    piece.view(b[:, first : first + rank])[...] = file_b
  return a, b


def _take(
  rest: dict[str, StoredTensor], piece: Piece
) -> tuple[np.ndarray, np.ndarray] | None:
  module = _PREFIX + piece.theirs.removesuffix(".weight")
  names = [f"{module}.lora_{letter}.weight" for letter in "AB"]
  found = [rest.pop(name, None) for name in names]
  if found == [None, None]:
    return None
  for name, tensor, other in zip(names, found, reversed(found), strict=True):
    if tensor is None:
      raise CheckpointError(f"{other.path} lacks tensor {name!r}.")
  a, b = (tensor.read().astype(np.float32) for tensor in found)
  return a, b


def _read_scale(path: Path) -> float:
  try:
    entries = json.loads(path.read_text())
    rank, alpha = entries["r"], entries["lora_alpha"]
  except (OSError, ValueError, KeyError) as error:
    raise CheckpointError(
      f"{path} is no adapter's config: {error!r}."
    ) from None
  if entries.get("peft_type") != "LORA":
    raise CheckpointError(
      f"{path}: peft_type {entries.get('peft_type')!r} is not supported, only "
      "'LORA'."
    )
  for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
    if entries.get(key):
      raise CheckpointError(
        f"{path}: {key} = {entries[key]!r} is not supported."
      )
  return alpha / (math.sqrt(rank) if entries.get("use_rslora") else rank)


def _targets(modules: list[str], *, is_split: bool) -> dict[str, Any]:
  """Returns the entries by which PEFT finds the modules again."""
  if not is_split:
    parameters = sorted({f"{module}.weight" for module in modules})
    return {"target_modules": [], "target_parameters": parameters}
  # A pattern, since a dense layer's modules have the same last names.
  patterns = {re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(m)) for m in modules}
  return {"target_modules": f"(.*\\.)?({'|'.join(sorted(patterns))})"}


def _is_split(family: str) -> bool:
  """Returns whether the family has a linear layer per expert."""
  return any("{expert}" in name.theirs for name in NAMES.get(family, ()))


def _pairs(adapters: Tree) -> dict[str, tuple[Any, Any]]:
  """Returns (A, B) by the path of the weight."""
  flat = flatten_dict(adapters)
  return {
    "/".join((*path[:-3], path[-2])): (a, flat[(*path[:-1], "b")])
    for path, a in flat.items()
    if path[-1] == "a"
  }


def _adapter_path(path: str) -> str:
  parent, _, name = path.rpartition("/")
  return f"{parent}/{_LORA}/{name}"


def _tensor(name: str, matrix: np.ndarray) -> TensorToWrite:
  return TensorToWrite(name, matrix.dtype, matrix.shape, lambda: matrix)
