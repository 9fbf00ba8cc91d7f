"""Text to token ids and back, as a folder of weights says."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from scattermoe_jax.models import data

_TOKENIZER = "tokenizer.json"
# What says that a folder has a tokenizer, in forms that are not read here.
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "tokenizer_config.json")

# Characters that are encoded at once, up to the end of a line.
_PIECE = 2**16
_PIECES_AT_ONCE = 64


class Vocabulary(NamedTuple):
  """Turns text into token ids, and ids into text.

  Attributes:
    encode: text -> ids of a prompt, with what the model wants before one.
    decode: ids -> text.
    encode_corpus: UTF-8 bytes -> ids, with nothing before or between.
  """

  encode: Callable[[str], list[int]]
  decode: Callable[[list[int]], str]
  encode_corpus: Callable[
    [Integer[np.ndarray, " N"]], Integer[np.ndarray, " tokens"]
  ]


BYTES = Vocabulary(
  encode=lambda text: data.encode(text).tolist(),
  decode=lambda ids: data.decode(np.asarray(ids, np.int32)),
  encode_corpus=lambda text: text,
)


def vocabulary_of(directory: Path) -> Vocabulary:
  """Returns the vocabulary of a folder's model.

  That is its tokenizer.json; else bytes, where this library trained the model
  on bytes; else numbers, "1 15 7".

  Raises:
    ValueError: if there is a tokenizer and no library to read it.
  """
  if (directory / _TOKENIZER).exists():
    return _tokenizer(directory / _TOKENIZER)
  config = directory / "config.json"
  if config.exists():
    entries = json.loads(config.read_text())
    if entries.get("model", {}).get("vocab_size") == data.VOCAB_SIZE:
      return BYTES
  return Vocabulary(
    _parse_ids, lambda ids: "".join(f"{i} " for i in ids), _refuse_corpus
  )


def training_vocabulary(directory: Path | None, vocab_size: int) -> Vocabulary:
  """Returns how a corpus becomes tokens: the folder's tokenizer, else bytes.

  Args:
    directory: of the weights to begin with; None for none.
    vocab_size: of the model.

  Raises:
    ValueError: if there is no tokenizer.json and bytes will not do.
  """
  if directory is not None:
    if (directory / _TOKENIZER).exists():
      return _tokenizer(directory / _TOKENIZER)
    for name in _OTHER_TOKENIZERS:
      if (directory / name).exists():
        raise ValueError(
          f"--init-from {directory}: there is a {name} but no {_TOKENIZER}; "
          "save the tokenizer in that form (transformers does by default)."
        )
  if vocab_size < data.VOCAB_SIZE:
    raise ValueError(
      f"vocab_size = {vocab_size}; tokens are bytes, so it must be at least "
      f"{data.VOCAB_SIZE}."
      if directory is None
      else f"--init-from {directory}: there is no {_TOKENIZER}, and "
      f"vocab_size = {vocab_size} is too small for bytes ({data.VOCAB_SIZE})."
    )
  return BYTES


def tokenize(
  corpus: data.Corpus, vocabulary: Vocabulary, vocab_size: int
) -> data.Corpus:
  """Returns a corpus of bytes as one of the vocabulary's tokens.

  Raises:
    ValueError: if the vocabulary has a token that the model has not.
  """
  if vocabulary is BYTES:
    return corpus
  parts: dict[str, Any] = {}
  for name in ("train", "validation"):
    text = getattr(corpus, name)
    ids = vocabulary.encode_corpus(text)
    if (largest := ids.max(initial=0)) >= vocab_size:
      raise ValueError(
        f"{_TOKENIZER} gives the token {largest}; the model's vocab_size is "
        f"{vocab_size}."
      )
    parts[name] = ids
    parts[f"{name}_bytes_per_token"] = text.size / max(ids.size, 1)
  return dataclasses.replace(corpus, unit="token", **parts)


def _tokenizer(path: Path) -> Vocabulary:
  try:
    import tokenizers
  except ImportError:
    raise ValueError(
      f"{path} needs the library `tokenizers`: pip install "
      "'scattermoe-jax[hf]'."
    ) from None
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises no narrower class.
    raise ValueError(f"{path} is no tokenizer: {error}.") from None
  tokenizer.no_truncation()
  tokenizer.no_padding()

  def encode_corpus(text: np.ndarray) -> np.ndarray:
    pieces = list(_pieces(text.tobytes().decode(errors="replace")))
    ids = [np.zeros(0, np.int32)]
    for i in range(0, len(pieces), _PIECES_AT_ONCE):
      ids += [
        np.asarray(encoding.ids, np.int32)
        for encoding in tokenizer.encode_batch(
          pieces[i : i + _PIECES_AT_ONCE], add_special_tokens=False
        )
      ]
    return np.concatenate(ids)

  return Vocabulary(
    lambda text: tokenizer.encode(text).ids, tokenizer.decode, encode_corpus
  )


def _pieces(text: str) -> Iterator[str]:
  start = 0
  while start < len(text):
    end = text.find("\n", start + _PIECE) + 1 or len(text)
    yield text[start:end]
    start = end


def _parse_ids(text: str) -> list[int]:
  try:
    return [int(word) for word in text.split()]
  except ValueError:
    raise ValueError(
      f"--prompt {text!r}: this folder has no tokenizer.json; give token ids, "
      "such as '1 15 7'."
    ) from None


def _refuse_corpus(text: np.ndarray) -> np.ndarray:
  raise ValueError("This folder has no tokenizer.json.")
