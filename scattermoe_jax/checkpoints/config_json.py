"""config.json <-> `ModelConfig`, by the tables of `families`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from scattermoe_jax.checkpoints.errors import CheckpointError
from scattermoe_jax.checkpoints.families import (
  FAMILIES,
  REQUIRED,
  Entries,
  Family,
)
from scattermoe_jax.checkpoints.plan import OWN_FAMILY
from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.nn import RopeScaling

CONFIG_NAME = "config.json"

# Fields that say how to compute, not what: no config.json speaks of them.
_NOT_STORED = ("dtype", "param_dtype", "remat", "implementation")

_DTYPES = ("bfloat16", "float16", "float32", "float64")

# Kinds of JSON values, as messages call them.
_KINDS: dict[str, tuple[type, ...]] = {
  "integer": (int,),
  "number": (int, float),
  "boolean": (bool,),
  "string": (str,),
  "list": (list,),
  "object": (dict,),
}
# The kind of an entry, by the type of the field of ours that it fills.
_KIND_OF_TYPE: dict[Any, str] = {
  int: "integer",
  int | None: "integer",
  float: "number",
  float | None: "number",
  bool: "boolean",
  str: "string",
  tuple[int, ...]: "list",
  tuple[int, ...] | None: "list",
}
_KIND_OF_FIELD = {
  field.name: _KIND_OF_TYPE.get(field.type)
  for field in dataclasses.fields(ModelConfig)
}
# Entries that fill no field as they are.
_KIND_OF_ENTRY = {
  "decoder_sparse_step": "integer",
  "dtype": "string",
  "norm_topk_prob": "boolean",
  "quantization_config": "object",
  "rope_parameters": "object",
  "rope_scaling": "object",
  "rope_theta": "number",
  "torch_dtype": "string",
}
_KIND_IN_ROPE = {
  "attention_factor": "number",
  "beta_fast": "number",
  "beta_slow": "number",
  "factor": "number",
  "original_max_position_embeddings": "integer",
  "rope_theta": "number",
  "truncate": "boolean",
}


def read_entries(directory: str | os.PathLike) -> dict[str, Any]:
  """Returns the config.json of a folder.

  Raises:
    CheckpointError: if there is none, or it is not a JSON object.
  """
  path = Path(directory) / CONFIG_NAME
  if not path.exists():
    raise CheckpointError(f"{path} does not exist.")
  try:
    entries = json.loads(path.read_text())
  except ValueError as error:
    raise CheckpointError(f"{path} is not JSON: {error}.") from None
  if not isinstance(entries, dict):
    raise CheckpointError(f"{path} is not a JSON object.")
  return entries


def config_from_entries(entries: Entries, where: str) -> ModelConfig:
  """Returns the model that a config.json describes; dtypes as by default.

  Args:
    entries: the JSON object.
    where: the file's name, for messages.

  Raises:
    CheckpointError: if the family is unknown, an entry is missing, or it says
      something that `Transformer` does not compute.
  """
  _check_kinds(entries, _KIND_OF_ENTRY, where)
  if entries.get("model_type") == OWN_FAMILY:
    if not isinstance(entries.get("model"), dict):
      raise CheckpointError(f"{where} lacks the entry 'model'.")
    return _checked(ModelConfig.from_dict, entries["model"], where)
  family = get_family(entries.get("model_type"), where)
  for field in family.fields:
    kind = _KIND_OF_FIELD[field.ours]
    _check_kinds(entries, {field.theirs: kind, field.alias: kind}, where)
  for key, supported in family.entries.items():
    if entries.get(key, supported) != supported:
      raise CheckpointError(
        f"{where}: {key} = {entries[key]!r} is not supported, only "
        f"{supported!r}."
      )
  ours = dict(family.fixed)
  for field in family.fields:
    value = entries.get(field.theirs)
    if value is None and field.alias is not None:
      value = entries.get(field.alias)
    if value is None:
      if field.default is REQUIRED:
        raise CheckpointError(f"{where} lacks the entry {field.theirs!r}.")
      default = field.default
      value = default(entries) if callable(default) else default
    ours[field.ours] = field.read(value, entries) if field.read else value
  ours |= family.derive(ours)
  ours |= _read_rope(entries, family, where)
  return _checked(lambda fields: ModelConfig(**fields), ours, where)


def read_dtype(entries: Entries, where: str) -> str:
  """Returns the dtype that a family's config.json gives its weights.

  Raises:
    CheckpointError: if it is none that `Transformer` computes in.
  """
  for key in ("dtype", "torch_dtype"):
    if dtype := entries.get(key):
      if dtype not in _DTYPES:
        raise CheckpointError(
          f"{where}: {key} = {dtype!r} is not supported, only {_DTYPES}."
        )
      return dtype
  return "float32"


def config_to_entries(config: ModelConfig, family_name: str) -> dict[str, Any]:
  """Returns the config.json that describes a model in its family's words.

  Raises:
    CheckpointError: if the family has no word for one of the fields.
  """
  if family_name == OWN_FAMILY:
    return {"model_type": OWN_FAMILY, "model": config.to_dict()}
  family = get_family(family_name, "save")
  entries: dict[str, Any] = {
    "architectures": [family.architecture],
    "model_type": family_name,
    "torch_dtype": config.param_dtype,
    **family.entries,
    **_write_rope(config),
  }
  for field in family.fields:
    value = getattr(config, field.ours)
    entries |= (
      field.write(value, config) if field.write else {field.theirs: value}
    )
  _check_same(config, config_from_entries(entries, "save"), family_name)
  return entries


def get_family(model_type: object, where: str) -> Family:
  """Returns the family of that name.

  Raises:
    CheckpointError: if it is unknown.
  """
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise CheckpointError(
      f"{where}: model_type {model_type!r} is not known; known are "
      f"{sorted(FAMILIES)}."
    )
  return FAMILIES[model_type]


def _check_kinds(entries: Entries, kinds, where: str) -> None:
  """Raises CheckpointError if an entry that is there is of another kind."""
  for key, kind in kinds.items():
    value = entries.get(key)
    if value is None or kind is None:
      continue
    # For Python, true and false are integers.
    is_wrong_bool = isinstance(value, bool) and kind != "boolean"
    if is_wrong_bool or not isinstance(value, _KINDS[kind]):
      raise CheckpointError(f"{where}: {key} = {value!r} is no {kind}.")


def _checked(make, fields, where: str) -> ModelConfig:
  try:
    return make(fields)
  except (ValueError, TypeError) as error:
    raise CheckpointError(f"{where}: {error}") from None


def _check_same(config: ModelConfig, again: ModelConfig, family: str) -> None:
  """Raises CheckpointError if config.json would not bring back the model."""
  lost = [
    f"{name} = {getattr(config, name)!r}"
    for name in _said(config)
    if _said(config)[name] != _said(again)[name]
  ]
  if lost:
    raise CheckpointError(
      f"save: a config.json of family {family!r} cannot say {', '.join(lost)}."
    )


def _said(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields that decide what the model computes."""
  fields = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _NOT_STORED
  }
  if config.attention != "moa":
    for name in ("attention_experts", "attention_top_k", "attention_scoring"):
      del fields[name]
  if config.ffn == "moe" and not config.dense_layers:
    del fields["d_ff"]
  layers = range(config.num_layers)
  del fields["sliding_layers"]
  fields["sliding_window"] = [config.window(i) for i in layers]
  fields["final_norm_eps"] = config.final_norm_eps or config.norm_eps
  if config.attention_scale is None:
    fields["attention_scale"] = config.head_dim**-0.5
  return fields


def _read_rope(entries: Entries, family: Family, where: str) -> dict[str, Any]:
  """Returns rope_theta and rope_scaling.

  Version 5 of transformers writes both under "rope_parameters"; before, they
  were "rope_theta" and "rope_scaling".
  """
  default = {"rope_theta": 10_000.0, **family.rope}
  if entries.get("rope_theta") is not None:
    default["rope_theta"] = entries["rope_theta"]
  rope = entries.get("rope_parameters")
  if rope is None:
    rope = entries.get("rope_scaling", default) or {}
  _check_kinds(rope, _KIND_IN_ROPE, where)
  theta = rope.get("rope_theta", default["rope_theta"])
  partial = rope.get("partial_rotary_factor")
  if partial is None:
    partial = entries.get("partial_rotary_factor", 1.0)
  if partial != 1.0:
    raise CheckpointError(
      f"{where}: partial_rotary_factor = {partial} is not supported, only 1."
    )
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return {"rope_theta": theta, "rope_scaling": None}
  if kind != "yarn" or rope.get("mscale") or rope.get("mscale_all_dim"):
    raise CheckpointError(
      f"{where}: the rotary embedding {dict(rope)} is not supported, only "
      "'default' and 'yarn' without mscale."
    )
  for key in ("factor", "original_max_position_embeddings"):
    if rope.get(key) is None:
      raise CheckpointError(
        f"{where}: the rotary embedding {dict(rope)} lacks the entry {key!r}."
      )
  return {
    "rope_theta": theta,
    "rope_scaling": RopeScaling(
      factor=rope["factor"],
      original_max_positions=rope["original_max_position_embeddings"],
      beta_fast=rope.get("beta_fast") or 32.0,
      beta_slow=rope.get("beta_slow") or 1.0,
      truncate=rope.get("truncate", True),
      attention_factor=rope.get("attention_factor"),
    ),
  }


def _write_rope(config: ModelConfig) -> dict[str, Any]:
  """Returns the older two entries, which every version reads."""
  scaling = config.rope_scaling
  if scaling is None:
    return {"rope_theta": config.rope_theta, "rope_scaling": None}
  rope = {
    "rope_type": "yarn",
    "factor": scaling.factor,
    "original_max_position_embeddings": scaling.original_max_positions,
    "beta_fast": scaling.beta_fast,
    "beta_slow": scaling.beta_slow,
    "truncate": scaling.truncate,
  }
  if scaling.attention_factor is not None:
    rope["attention_factor"] = scaling.attention_factor
  return {"rope_theta": config.rope_theta, "rope_scaling": rope}
