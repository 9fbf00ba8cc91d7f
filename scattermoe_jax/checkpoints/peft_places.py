"""Where a PEFT folder has the adapters of which weight: names, no numbers.

The three kinds of modules that `peft` describes, by the family of a model.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from scattermoe_jax.checkpoints.plan import Piece, make_plan

PREFIX = "base_model.model."

# In transformers 5, one module of a layer with both parameters of all experts.
_SPARSE_MOE, _MLP = "block_sparse_moe.experts", "mlp.experts"
_MODULES = {
  "mixtral": _MLP,
  "olmoe": _MLP,
  "qwen3_moe": _MLP,
  "granitemoe": _SPARSE_MOE,
  "granitemoeshared": _SPARSE_MOE,
  "gpt_oss": _MLP,
}
# The last is the outermost of what PEFT wraps around the module.
_PARAMETERS = {"w_gate_up": "gate_up_proj", "w_out": "down_proj"}
_EXPERTS = re.compile(r"layer_(\d+)/ffn/experts/(w_gate_up|w_out)")


class Place(NamedTuple):
  """Where a folder has the A and B of one piece of a weight.

  Attributes:
    module: the name of both tensors, less prefix and suffix.
    target: what PEFT's config calls the weight.
    piece: which part of our array it adapts.
  """

  module: str
  target: str
  piece: Piece


def linear_places(
  family: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, list[Place]]:
  """Returns the places under the names that files of weights have."""
  plan = make_plan(
    family, {f"params/{path}": shape for path, shape in shapes.items()}
  )
  return {
    path.removeprefix("params/"): [
      Place(piece.theirs.removesuffix(".weight"), piece.theirs, piece)
      for piece in pieces
    ]
    for path, pieces in plan.items()
  }


def is_split(plan: Mapping[str, list[Place]]) -> bool:
  """Returns whether each expert is a module."""
  places = [place for places in plan.values() for place in places]
  return any(place.piece.expert is not None for place in places)


def has_wrapped_module(family: str) -> bool:
  """Returns whether a layer's experts are one module in transformers 5."""
  return family in _MODULES


def parameters_of(paths: Iterable[str]) -> set[str]:
  """Returns what that module calls the weights at our paths."""
  return {_PARAMETERS[path.rpartition("/")[2]] for path in paths}


def wrapped_places(
  family: str,
  shapes: Mapping[str, tuple[int, ...]],
  adapted: set[str],
) -> dict[str, list[Place]]:
  """Returns the places in the module that transformers 5 has per layer.

  Args:
    family: of the model.
    shapes: of our weights, by path.
    adapted: the parameters around which there is a wrapper.
  """
  places: dict[str, list[Place]] = {}
  for path in shapes:
    match = _EXPERTS.fullmatch(path)
    if not match or family not in _MODULES:
      continue
    layer, ours = match.groups()
    parameter = _PARAMETERS[ours]
    if parameter not in adapted:
      continue
    experts = f"model.layers.{layer}.{_MODULES[family]}"
    is_inside = ours == "w_gate_up" and _PARAMETERS["w_out"] in adapted
    module = f"{experts}.base_layer" if is_inside else experts
    interleaved = family == "gpt_oss" and ours == "w_gate_up"
    target = f"{experts}.{parameter}"
    piece = Piece(target, "interleaved" if interleaved else "same")
    places[path] = [Place(module, target, piece)]
  return places


def wrapped_parameters(entries: Mapping[str, Any]) -> set[str]:
  """Returns which parameters of a layer's experts PEFT has wrapped."""
  last_names = {
    target.rpartition(".")[2]
    for target in entries.get("target_parameters") or ()
  }
  return last_names & set(_PARAMETERS.values())


def targets(plan: Mapping[str, list[Place]]) -> dict[str, Any]:
  """Returns the entries by which PEFT finds the weights again.

  PEFT compares the ends of names, so a layer's number can be left out; the
  expert's cannot: a dense layer's modules have the same last names.
  """
  places = [place for places in plan.values() for place in places]
  short = lambda name: re.sub(r"^model\.layers\.\d+\.", "", name)
  if is_split(plan):
    names = {".".join(place.module.split(".")[-3:]) for place in places}
    return {"target_modules": sorted(names)}
  names = {short(place.target) for place in places}
  return {"target_modules": [], "target_parameters": sorted(names)}


def tensor_names(place: Place) -> list[str]:
  """Returns the names of a place's A and B."""
  return [f"{PREFIX}{place.module}.lora_{letter}.weight" for letter in "AB"]
