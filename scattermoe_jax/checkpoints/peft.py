"""LoRA adapters of experts in the folder layout of the PEFT library.

  directory/adapter_config.json + adapter_model.safetensors

Each adapted weight has two tensors, `<module>.lora_A.weight` and
`<module>.lora_B.weight`; the module is one of three kinds:

  a linear layer per expert           ..experts.3.w1, W (n, d)
      A (r, d), B (n, r)              what we write: Mixtral, OLMoE, Qwen3-MoE
  a module with one 3-D parameter     ..mlp.input_linear
      A (E r, d), the experts one by one; B (n, r E), interleaved      JetMoE
  a module with two, wrapped twice    ..experts.base_layer, gate and up inside
      A and B as before               ..experts, down outside
                                      Granite, gpt-oss

transformers 5 has the last kind in every family but JetMoE, and PEFT turns
files of the first kind into it as it reads them, with twice the rank: gate and
up have an A each. We read all three. Adapters of a model in our own names keep
those. PEFT's factor alpha / r is part of our B; what we write has alpha = r.
Source: PEFT 0.21, tuners/lora/layer.py (`Linear`, `ParamWrapper`) and
utils/transformers_weight_conversion.py.
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
from scattermoe_jax.checkpoints.layouts import LAYOUTS, copy_into
from scattermoe_jax.checkpoints.peft_places import (
  PREFIX,
  Place,
  has_wrapped_module,
  is_split,
  linear_places,
  parameters_of,
  targets,
  tensor_names,
  wrapped_parameters,
  wrapped_places,
)
from scattermoe_jax.checkpoints.plan import OWN_FAMILY, Piece
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
    CheckpointError: if the folder exists, the adapters differ in rank, or one
      stacks layers.
  """
  family = family or OWN_FAMILY
  pairs = _pairs(adapters)
  for path, (a, _) in pairs.items():
    if a.ndim != 3:
      raise CheckpointError(
        f"{directory}: the adapter of {path!r} has A of shape {a.shape}; PEFT "
        "knows (E, d, r), so write the layers that are stacked in it apart."
      )
  ranks = {a.shape[2] for a, _ in pairs.values()}
  if len(ranks) != 1:
    raise CheckpointError(
      f"{directory}: adapters of one folder have one rank, got {sorted(ranks)}."
    )
  shapes = {path: (*a.shape[:2], b.shape[2]) for path, (a, b) in pairs.items()}
  plan = linear_places(family, shapes)
  if has_wrapped_module(family) and not is_split(plan):
    plan = wrapped_places(family, shapes, parameters_of(plan))
  tensors = []
  for path, places in plan.items():
    a, b = (np.asarray(x) for x in pairs[path])
    for place in places:
      matrices = _to_file(place.piece, a, b)
      for name, matrix in zip(tensor_names(place), matrices, strict=True):
        tensors.append(_tensor(name, matrix))
  rank = ranks.pop()
  with new_folder(directory) as partial:
    write_file(partial / FILE_NAME, tensors)
    write_json(
      partial / CONFIG_NAME,
      {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **targets(plan),
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
  entries = _read_config(directory / CONFIG_NAME)
  rest = read_header(directory / FILE_NAME)
  if family is None or any(n.startswith(f"{PREFIX}params.") for n in rest):
    family = OWN_FAMILY
  weights = {
    path: w for path, w in flatten_dict(params, sep="/").items() if w.ndim == 3
  }
  shapes = {path: tuple(w.shape) for path, w in weights.items()}
  linear = linear_places(family, shapes)
  wrapped = wrapped_places(family, shapes, wrapped_parameters(entries))
  plan = {path: [*linear[path], *wrapped.get(path, ())] for path in shapes}
  is_swapped = _is_swapped(rest, plan, shapes)
  adapters = {}
  for path, shape in shapes.items():
    terms = [
      (place.piece, *factors)
      for place in plan[path]
      if (factors := _take(rest, place, shape, entries, is_swapped)) is not None
    ]
    if terms:
      a, b = _from_file(terms, shape, is_swapped)
      place = _adapter_path(path)
      dtype = weights[path].dtype
      adapters[f"{place}/a"] = jnp.asarray(a, dtype)
      adapters[f"{place}/b"] = jnp.asarray(b, dtype)
  for name, tensor in rest.items():
    raise CheckpointError(
      f"{tensor.path} holds tensor {name!r}, which adapts no expert weight of "
      "this model."
    )
  return unflatten_dict(adapters, sep="/")


def _to_file(
  piece: Piece, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the file's A and B; B's columns lie as the weight's do."""
  if piece.expert is not None:
    return a[piece.expert].T, piece.view(b)
  num_experts, d_in, rank = a.shape
  if piece.layout == "interleaved":
    b = LAYOUTS["interleaved"].view(b).reshape(b.shape)
  return (
    a.swapaxes(1, 2).reshape(num_experts * rank, d_in),
    b.transpose(2, 1, 0).reshape(b.shape[2], rank * num_experts),
  )


def _is_swapped(
  rest: Mapping[str, StoredTensor],
  plan: Mapping[str, list[Place]],
  shapes: Mapping[str, tuple[int, ...]],
) -> bool:
  """Returns whether the experts' A have our columns, and B our rows.

  PEFT takes (E, rows, columns) for (E, out, in) or, where the module says
  `is_transposed`, for (E, in, out). It did not always, and gpt-oss in
  transformers 4 does not say so. Square weights, such as its `down_proj`, do
  not tell; another weight of the folder does.
  """
  for path, places in plan.items():
    _, d_in, d_out = shapes[path]
    for place in places:
      tensor = rest.get(tensor_names(place)[0])
      if tensor and place.piece.expert is None and d_in != d_out:
        return tensor.shape[1:] == (d_out,)
  return False


def _from_file(
  terms: list[tuple[Piece, np.ndarray, np.ndarray]],
  shape: tuple[int, ...],
  is_swapped: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns our A and B of one weight, in float32.

  Gate and up have an A each in the file. Where these differ, ours holds both,
  of twice the rank, and each B sees its own.
  """
  num_experts, d_in, d_out = shape
  if terms[0][0].expert is None:
    return _from_wrapper(*terms[0], shape[0], is_swapped)
  rank = max(len(file_a) for _, file_a, _ in terms)
  layouts = sorted({piece.layout for piece, _, _ in terms})
  by_expert: dict[int | None, list[np.ndarray]] = {}
  for piece, file_a, _ in terms:
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
  for piece, file_a, file_b in terms:
    first = places[piece.layout] * rank
    a[piece.expert, :, first : first + len(file_a)] = file_a.T
    piece.view(b[:, first : first + len(file_a)])[...] = file_b
  return a, b


def _from_wrapper(
  piece: Piece,
  file_a: np.ndarray,
  file_b: np.ndarray,
  num_experts: int,
  is_swapped: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns our A and B of all experts' A and B."""
  rank = len(file_a) // num_experts
  a = file_a.reshape(num_experts, rank, -1).swapaxes(1, 2)
  b = file_b.reshape(-1, rank, num_experts).transpose(2, 1, 0)
  if is_swapped:
    a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
  if piece.layout == "interleaved":
    interleaved, b = b, np.empty_like(b, order="C")
    copy_into(LAYOUTS["interleaved"].view(b), interleaved)
  return a, b


def _take(
  rest: dict[str, StoredTensor],
  place: Place,
  shape: tuple[int, ...],
  entries: Mapping[str, Any],
  is_swapped: bool,
) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns A and B of one place in float32, PEFT's factor a part of B."""
  names = tensor_names(place)
  found = [rest.pop(name, None) for name in names]
  if found == [None, None]:
    return None
  for name, tensor, other in zip(names, found, reversed(found), strict=True):
    if tensor is None:
      raise CheckpointError(f"{other.path} lacks tensor {name!r}.")
  tensor_a, tensor_b = found
  num_experts, d_in, d_out = shape
  experts = num_experts if place.piece.expert is None else 1
  if place.piece.expert is not None:
    d_out, d_in = place.piece.file_shape(shape)
  elif is_swapped:
    d_in, d_out = d_out, d_in
  rank = (tensor_a.shape or (0,))[0] // experts
  expected = (experts * rank, d_in), (d_out, experts * rank)
  if rank < 1 or (tensor_a.shape, tensor_b.shape) != expected:
    raise CheckpointError(
      f"{tensor_a.path}: tensor {names[0]!r} has shape {tensor_a.shape} and "
      f"its lora_B {tensor_b.shape}; the weight has {d_in} inputs, {d_out} "
      f"outputs and {num_experts} experts."
    )
  a, b = (tensor.read().astype(np.float32) for tensor in found)
  return a, b * np.float32(_scale(entries, place, rank))


def _read_config(path: Path) -> dict[str, Any]:
  try:
    entries = json.loads(path.read_text())
    float(entries["lora_alpha"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(
      f"{path} is no adapter's config: {error!r}."
    ) from None
  if entries.get("peft_type") != "LORA":
    raise CheckpointError(
      f"{path}: peft_type {entries.get('peft_type')!r} is not supported, only "
      "'LORA'."
    )
  for key in ("use_dora", "modules_to_save"):
    if entries.get(key):
      raise CheckpointError(
        f"{path}: {key} = {entries[key]!r} is not supported."
      )
  return entries


def _scale(entries: Mapping[str, Any], place: Place, rank: int) -> float:
  """Returns alpha / r of one adapter, r as its tensors have it."""
  alpha = entries["lora_alpha"]
  names = (place.target, place.target.removesuffix(".weight"))
  for pattern, value in (entries.get("alpha_pattern") or {}).items():
    if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
      alpha = value
      break
  return alpha / (math.sqrt(rank) if entries.get("use_rslora") else rank)


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
