"""What comes before training: every setting, and the data, is checked."""

import argparse
import dataclasses
import datetime
from pathlib import Path

import jax
import jax.numpy as jnp

from scattermoe_jax.models import data, weights
from scattermoe_jax.models.mesh import Placement
from scattermoe_jax.models.options import (
  RunConfig,
  apply_flags,
  check_same_model,
  differences,
  fine_tuning,
)
from scattermoe_jax.models.run_folder import RunError, RunFolder, fingerprint
from scattermoe_jax.models.tokens import (
  Vocabulary,
  tokenize,
  training_vocabulary,
)
from scattermoe_jax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that may begin: its settings are checked and its folder is locked.

  Attributes:
    config: the settings.
    corpus: the data as the model's tokens.
    vocabulary: text to tokens and back.
    baselines: bits per held-out byte of models that see no context, by name.
    folder: where everything goes.
    placement: on which devices.
  """

  config: RunConfig
  corpus: data.Corpus
  vocabulary: Vocabulary
  baselines: dict[str, float]
  folder: RunFolder
  placement: Placement

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.folder.close()


def begin(flags: argparse.Namespace) -> Run:
  """Returns the run that the flags ask for.

  Raises:
    ValueError: if anything in them is wrong; nothing has been written then.
  """
  resumed = getattr(flags, "resume", None)
  if resumed:
    stored = RunFolder.read_config(Path(resumed))
    before = RunConfig.from_dict(stored["settings"])
  else:
    before = _new_settings(flags)
  config = apply_flags(before, flags)
  _check_start(config, flags)
  _check_models(config)

  text = data.load_corpus(config.data)
  vocab_size = config.model.vocab_size
  vocabulary = training_vocabulary(
    Path(config.init_from) if config.init_from else None, vocab_size
  )
  corpus = tokenize(text, vocabulary, vocab_size)
  if not vocabulary.encode(config.prompt):
    raise ValueError(f"--prompt {config.prompt!r} has no token.")
  data.check_lengths(
    corpus,
    batch_size=config.training.batch_size,
    sequence_length=config.training.sequence_length,
  )
  placement = Placement.of(getattr(flags, "mesh", None))
  placement.check(config.training.batch_size, config.models().values())
  data_hash = fingerprint(corpus.train, corpus.validation)
  if not resumed:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = RunFolder.create(
      Path(getattr(flags, "out", f"runs/{now}")),
      {"settings": config.to_dict(), "data_hash": data_hash},
    )
  else:
    if changed := differences(before.to_dict(), config.to_dict()):
      raise RunError(
        f"--resume {resumed}: that run has {'; '.join(changed)}. A checkpoint "
        "of another config does not fit: start a new run with --out."
      )
    if stored["data_hash"] != data_hash:
      raise RunError(
        f"--resume {resumed}: {corpus.description} is not what it was when "
        "that run began. Bring the data back or start a new run with --out."
      )
    folder = RunFolder(Path(resumed))
  baselines = {
    "uniform": data.uniform_bits(),
    "unigram": data.unigram_bits(text),
  }
  return Run(config, corpus, vocabulary, baselines, folder, placement)


def _new_settings(flags: argparse.Namespace) -> RunConfig:
  """Returns the settings of a new run before the other flags."""
  init_from = getattr(flags, "init_from", None)
  if init_from is None:
    return RunConfig()
  lora_rank = getattr(flags, "lora_rank", 0)
  return fine_tuning(weights.read_model(init_from), init_from, lora_rank)


def _check_start(config: RunConfig, flags: argparse.Namespace) -> None:
  if config.init_from is None:
    return
  check_same_model(config, weights.read_model(config.init_from))
  if config.lora_rank and getattr(flags, "mesh", None):
    raise ValueError(
      f"--lora-rank {config.lora_rank} trains on one device, without --mesh."
    )


def _check_models(config: RunConfig) -> None:
  """Raises ValueError unless the models can be built, and run here."""
  rows = (config.training.batch_size, config.training.sequence_length)
  ids = jax.ShapeDtypeStruct(rows, jnp.int32)
  for model in config.models().values():
    try:
      jax.eval_shape(Transformer(model).init, jax.random.key(0), ids)
    except (NotImplementedError, TypeError) as error:
      raise ValueError(str(error)) from error
