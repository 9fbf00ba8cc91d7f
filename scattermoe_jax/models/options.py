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


# What has learned already moves on in smaller steps; adapters take larger ones
# than all weights together.
_FINE_TUNING_RATE = 5e-5
_ADAPTERS_RATE = 5e-4

# Of a loaded model, what says how to compute; all else is what was learned.
_FREE_FIELDS = {"dtype", "param_dtype", "remat", "implementation"}


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
    init_from: a folder of weights to begin with, of Hugging Face's or of this
      library's; None for new weights.
    lora_rank: rank of adapters on the experts' weights of init_from, which
      alone are trained then; 0 to train all weights.
  """

  # Two models of three layers learn in four minutes on two cores of a CPU. A
  # token sees no further back than in training, so that a sample may outgrow
  # the training sequences.
  model: ModelConfig = ModelConfig(num_layers=3, sliding_window=128)
  training: TrainConfig = TrainConfig()
  data: str | None = None
  twin: bool = True
  evaluate_every: int = 50
  validation_batches: int = 8
  checkpoint_every: int = 100
  prompt: str = "def "
  sample_tokens: int = 400
  temperature: float = 0.7
  init_from: str | None = None
  lora_rank: int = 0

  def __post_init__(self):
    for name in (
      "evaluate_every",
      "validation_batches",
      "checkpoint_every",
      "sample_tokens",
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f"--{name.replace('_', '-')} must be at least 1, got "
          f"{getattr(self, name)}."
        )
    if self.temperature < 0:
      raise ValueError(
        f"--temperature must be at least 0, got {self.temperature}."
      )
    if self.lora_rank < 0:
      raise ValueError(f"--lora-rank must be at least 0, got {self.lora_rank}.")
    if self.lora_rank and self.init_from is None:
      raise ValueError(
        f"--lora-rank {self.lora_rank}: adapters need weights to adapt; name "
        "their folder with --init-from."
      )
    if self.lora_rank and self.model.ffn != "moe":
      raise ValueError(
        f"--lora-rank {self.lora_rank}: the model of --init-from "
        f"{self.init_from} has no experts to adapt."
      )

  def models(self) -> dict[str, ModelConfig]:
    """Returns the configs of the models to train, by name, in order."""
    name = "dense" if self.model.dense_twin() == self.model else "moe"
    models = {name: self.model}
    # A twin that begins anew tells nothing about weights that do not.
    if self.twin and name == "moe" and self.init_from is None:
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
  try:
    model_config = ModelConfig.from_dict({**config.model.to_dict(), **model})
  except TypeError as error:  # A word for a number.
    raise ValueError(str(error)) from error
  return dataclasses.replace(
    config,
    model=model_config,
    training=dataclasses.replace(
      config.training, **_fields_of(TrainConfig, given)
    ),
    **_fields_of(RunConfig, given),
  )


def fine_tuning(
  model: ModelConfig, init_from: str, lora_rank: int
) -> RunConfig:
  """Returns the settings, before other flags, for a model of some folder.

  The weights of Hugging Face's folders are mostly in bfloat16, whose steps are
  too coarse to learn in: what is trained is kept in float32.
  """
  rate = _ADAPTERS_RATE if lora_rank else _FINE_TUNING_RATE
  if not lora_rank:
    model = dataclasses.replace(model, param_dtype="float32")
  return RunConfig(
    model=model,
    training=TrainConfig(learning_rate=rate),
    init_from=init_from,
    lora_rank=lora_rank,
  )


def check_same_model(config: RunConfig, loaded: ModelConfig) -> None:
  """Raises ValueError if settings ask for another model than the loaded one."""
  old, new = loaded.to_dict(), config.model.to_dict()
  for name in new:
    if new[name] != old[name] and name not in _FREE_FIELDS:
      raise ValueError(
        f"{name} = {new[name]!r}: the weights of --init-from "
        f"{config.init_from} have {old[name]!r}; --set can change "
        f"{', '.join(sorted(_FREE_FIELDS))} alone."
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
