"""Text to token ids and back, as a folder of weights says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scattermoe_jax.models import data


class Vocabulary(NamedTuple):
  """Turns text into token ids, and ids into text.

  Attributes:
    encode: text -> ids.
    decode: ids -> text.
  """

  encode: Callable[[str], list[int]]
  decode: Callable[[list[int]], str]


def vocabulary_of(directory: Path) -> Vocabulary:
  """Returns the vocabulary of a folder's model.

  That is its tokenizer.json; else bytes, where this library trained the model
  on bytes; else numbers, "1 15 7".

  Raises:
    ValueError: if there is a tokenizer and no library to read it.
  """
  if (directory / "tokenizer.json").exists():
    return _tokenizer(directory / "tokenizer.json")
  config = directory / "config.json"
  if config.exists():
    entries = json.loads(config.read_text())
    if entries.get("model", {}).get("vocab_size") == data.VOCAB_SIZE:
      return Vocabulary(
        lambda text: data.encode(text).tolist(),
        lambda ids: data.decode(np.asarray(ids, np.int32)),
      )
  return Vocabulary(_parse_ids, lambda ids: "".join(f"{i} " for i in ids))


def _tokenizer(path: Path) -> Vocabulary:
  try:
    import tokenizers
  except ImportError:
    raise ValueError(
      f"{path} needs the library `tokenizers`: pip install "
      "'scattermoe-jax[hf]'."
    ) from None
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  return Vocabulary(lambda text: tokenizer.encode(text).ids, tokenizer.decode)


def _parse_ids(text: str) -> list[int]:
  try:
    return [int(word) for word in text.split()]
  except ValueError:
    raise ValueError(
      f"--prompt {text!r}: this folder has no tokenizer.json; give token ids, "
      "such as '1 15 7'."
    ) from None
