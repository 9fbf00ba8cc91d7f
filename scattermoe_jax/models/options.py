"""The training program's settings, and the flags that change them."""

import argparse
import ast
import dataclasses
from typing import Any, get_args

from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.models.training import TrainConfig

# With --attention moa: three of twelve experts with two heads each have the
# active parameters of the demo's four dense heads.
_ATTENTION = {
  "mha": {},
  "moa": {
    "num_heads": 6,
    "num_kv_heads": 2,
    "attention_top_k": 3,
    "attention_experts": 12,
  },
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """All that decides what a run does; kept as config.json in its folder.

  Attributes:
    model: the mixture-of-experts model.
    training: how it and its twin are trained.
    data: a file or a folder; None for Python's standard library.
    twin: whether a dense model of as many active parameters is trained too.
    evaluate_every: steps between two looks at held-out text.
    validation_batches: batches of held-out text of one look.
    checkpoint_every: steps between two checkpoints.
    prompt: what the samples at the end go on from.
    sample_tokens: how long they are.
    temperature: how bold they are.
  """

  # A token sees no further back than in training, so that a sample may outgrow
  # the training sequences.
  model: ModelConfig = ModelConfig(sliding_window=128)
  training: TrainConfig = TrainConfig()
  data: str | None = None
  twin: bool = True
  evaluate_every: int = 50
  validation_batches: int = 8
  checkpoint_every: int = 100
  prompt: str = "def "
  sample_tokens: int = 400
  temperature: float = 0.7

  def models(self) -> dict[str, ModelConfig]:
    """Returns the configs of the models to train, by name, in order."""
    name = "dense" if self.model.dense_twin() == self.model else "moe"
    models = {name: self.model}
    if self.twin and name == "moe":
      models["dense"] = self.model.dense_twin()
    return models

  def to_dict(self) -> dict[str, Any]:
    """Returns the settings as JSON can say them."""
    return {**dataclasses.asdict(self), "model": self.model.to_dict()}

  @classmethod
  def from_dict(cls, settings: dict[str, Any]) -> "RunConfig":
    """Returns the settings that `to_dict` or its JSON came from."""
    return cls(
      **{
        **settings,
        "model": ModelConfig.from_dict(settings["model"]),
        "training": TrainConfig(**settings["training"]),
      }
    )


def make_parser(description: str | None) -> argparse.ArgumentParser:
  """Returns the parser; flags that are not given leave no trace."""
  parser = argparse.ArgumentParser(
    prog="python -m scattermoe_jax.models.train",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    argument_default=argparse.SUPPRESS,
  )
  parser.add_argument(
    "--out", metavar="DIR", help="a new folder (default: runs/DATE-TIME)"
  )
  parser.add_argument(
    "--resume", metavar="DIR", help="go on with the run in this folder"
  )
  parser.add_argument(
    "--set",
    metavar="FIELD=VALUE",
    action="append",
    help="a field of ModelConfig, such as num_experts=16; may be repeated",
  )
  parser.add_argument(
    "--attention",
    choices=tuple(_ATTENTION),
    help="dense, or a mixture of as many active parameters; --set refines it",
  )
  parser.add_argument(
    "--mesh",
    metavar="ROLE=DEVICES,...",
    help="devices by role (data, fsdp, expert, tensor), such as "
    "data=2,expert=4; a run may go on with another (default: one device)",
  )
  parser.add_argument(
    "--no-twin", dest="twin", action="store_false", help="no dense twin"
  )
  _add_fields(parser.add_argument_group("run"), RunConfig)
  _add_fields(parser.add_argument_group("training"), TrainConfig)
  return parser


def apply_flags(config: RunConfig, flags: argparse.Namespace) -> RunConfig:
  """Returns the settings with the flags that were given.

  Raises:
    ValueError: if a field is unknown, or a value does not fit.
  """
  given = vars(flags)
  model = {}
  if "attention" in given:
    model = {"attention": given["attention"], **_ATTENTION[given["attention"]]}
  model |= dict(_parse_field(text) for text in given.get("set", []))
  return dataclasses.replace(
    config,
    model=ModelConfig.from_dict({**config.model.to_dict(), **model}),
    training=dataclasses.replace(
      config.training, **_fields_of(TrainConfig, given)
    ),
    **_fields_of(RunConfig, given),
  )


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
  """Returns "field = old, not new" for each setting that differs."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [] if old == new else [f"{prefix} = {old!r}, not {new!r}"]
  found = []
  for name in sorted(old.keys() | new.keys()):
    path = f"{prefix}.{name}" if prefix else name
    found += differences(old.get(name), new.get(name), path)
  return found


def _add_fields(group, config_class) -> None:
  help_of = _attribute_docs(config_class)
  for field in dataclasses.fields(config_class):
    if field.name in ("model", "training", "twin"):
      continue
    types = [t for t in get_args(field.type) if t is not type(None)]
    default = "" if field.default is None else f" (default: {field.default})"
    group.add_argument(
      "--" + field.name.replace("_", "-"),
      type=types[0] if types else field.type,
      metavar=field.name.rpartition("_")[2].upper(),
      help=(help_of[field.name] + default).replace("%", "%%"),
    )


def _attribute_docs(config_class) -> dict[str, str]:
  """Returns the "Attributes:" of a docstring, by name."""
  docs: dict[str, str] = {}
  name = ""
  for line in config_class.__doc__.split("Attributes:")[1].splitlines():
    head, colon, text = line.strip().partition(": ")
    if colon and head in config_class.__dataclass_fields__:
      name = head
      docs[name] = text.rstrip(".")
    elif name and line.strip():
      docs[name] += " " + line.strip().rstrip(".")
  return docs


def _fields_of(config_class, given: dict[str, Any]) -> dict[str, Any]:
  names = {f.name for f in dataclasses.fields(config_class)}
  return {k: v for k, v in given.items() if k in names - {"model", "training"}}


def _parse_field(text: str) -> tuple[str, Any]:
  name, equals, value = text.partition("=")
  if not equals:
    raise ValueError(f"--set {text}: write it as FIELD=VALUE.")
  try:
    return name, ast.literal_eval(value)
  except (SyntaxError, ValueError):
    return name, value
