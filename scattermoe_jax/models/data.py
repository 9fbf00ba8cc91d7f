"""Text as bytes: the corpus, its held-out part, batches and two baselines.

The tokens are bytes, so the vocabulary is 256, any file is a corpus, and bits
per byte compare any two models; `tokens.tokenize` makes other tokens of them,
for a model that came with a tokenizer. A batch is a pure function of seed and
step: a run that was killed goes on with the batches it would have seen.
"""

import dataclasses
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer, UInt8

VOCAB_SIZE = 256

# One file of this many is held out, or this share of the bytes of a single one.
_HELD_OUT = 16
_SKIPPED_FOLDERS = {
  "__pycache__",
  "dist-packages",
  "idle_test",
  "node_modules",
  "site-packages",
  "test",
  "tests",
}


class DataError(ValueError):
  """The data cannot be trained on; the message says why and what would do."""


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Text in two parts that share no file (no byte, if there are few files).

  Attributes:
    train: tokens to learn from.
    validation: tokens held out.
    description: where they came from, for people.
    unit: what a token is, "byte" or "token".
    train_bytes_per_token: the mean of the first part.
    validation_bytes_per_token: that of the second.
  """

  train: Integer[np.ndarray, " train"]
  validation: Integer[np.ndarray, " validation"]
  description: str
  unit: str = "byte"
  train_bytes_per_token: float = 1.0
  validation_bytes_per_token: float = 1.0


def load_corpus(path: str | Path | None = None) -> Corpus:
  """Returns the text of a file or a folder, or Python's standard library's.

  Args:
    path: a file, or a folder whose text files are read, in sorted order. None
      for the source files of the running Python's standard library, which are
      on every machine.

  Raises:
    DataError: if there is no such path, or no text in it.
  """
  if path is None:
    root = Path(sysconfig.get_path("stdlib"))
    description = "Python's standard library"
    files = list(_text_files(root, pattern="*.py"))
  else:
    root = Path(path)
    description = str(root)
    if not root.exists():
      raise DataError(f"--data {root}: no such file or folder.")
    files = list(_text_files(root)) if root.is_dir() else [root]
  if not files:
    raise DataError(f"--data {root}: the folder holds no text file.")
  texts = [file.read_bytes() for file in files]
  if not any(texts):
    raise DataError(
      f"--data {root}: "
      + ("its files are empty." if root.is_dir() else "the file is empty.")
    )
  train, validation = _hold_out([text for text in texts if text])
  description += f", {len(texts)} {'file' if len(texts) == 1 else 'files'}"
  return Corpus(_as_bytes(train), _as_bytes(validation), description)


def check_lengths(
  corpus: Corpus, *, batch_size: int, sequence_length: int
) -> None:
  """Raises DataError unless both parts hold the windows that a run needs."""
  window = sequence_length + 1
  for name, part in (("train", corpus.train), ("held-out", corpus.validation)):
    if part.size < window:
      raise DataError(
        f"{corpus.description}: the {name} part has {part.size} "
        f"{corpus.unit}s; a sequence of {sequence_length} needs {window}. "
        "Choose a shorter --sequence-length or more data."
      )
  if corpus.train.size < batch_size * window:
    raise DataError(
      f"{corpus.description}: {corpus.train.size} {corpus.unit}s to train on; "
      f"one batch of {batch_size} sequences needs {batch_size * window}. "
      "Choose a smaller --batch-size or more data."
    )


def train_batch(
  tokens: Integer[np.ndarray, " N"],
  *,
  seed: int,
  step: int,
  batch_size: int,
  sequence_length: int,
) -> Int[np.ndarray, "B window"]:
  """Returns random windows, the same for the same seed and step."""
  random = np.random.Generator(np.random.Philox(key=[seed, step]))
  last = tokens.size - sequence_length
  starts = random.integers(0, last, size=batch_size)
  return _windows(tokens, starts, sequence_length)


def validation_batches(
  tokens: Integer[np.ndarray, " N"],
  *,
  num_batches: int,
  batch_size: int,
  sequence_length: int,
) -> Iterator[Int[np.ndarray, "B window"]]:
  """Yields windows spread evenly over the tokens, the same ones every time.

  Windows overlap where there are too few tokens.
  """
  last = tokens.size - sequence_length - 1
  starts = np.linspace(0, last, num_batches * batch_size).astype(np.int64)
  for batch_starts in np.split(starts, num_batches):
    yield _windows(tokens, batch_starts, sequence_length)


def unigram_bits(corpus: Corpus) -> float:
  """Returns the bits per held-out byte of a model that knows no context.

  Each byte is predicted by its frequency in the training part, counts plus one.

  Args:
    corpus: of bytes.
  """
  counts = np.bincount(corpus.train, minlength=VOCAB_SIZE) + 1.0
  held_out = np.bincount(corpus.validation, minlength=VOCAB_SIZE)
  bits = -np.log2(counts / counts.sum())
  return float(held_out @ bits / held_out.sum())


def uniform_bits() -> float:
  """Returns the bits per byte of a model that knows nothing."""
  return math.log2(VOCAB_SIZE)


def encode(text: str) -> Int[np.ndarray, " L"]:
  """Returns the tokens of a text, its UTF-8 bytes."""
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: Int[np.ndarray, " L"]) -> str:
  """Returns the text of some tokens; bytes that are no text become marks."""
  return np.asarray(tokens).astype(np.uint8).tobytes().decode(errors="replace")


def _text_files(root: Path, pattern: str = "*") -> Iterator[Path]:
  for file in sorted(root.rglob(pattern)):
    inside = file.relative_to(root).parts
    hidden = any(part.startswith(".") for part in inside)
    if hidden or _SKIPPED_FOLDERS & set(inside[:-1]) or not file.is_file():
      continue
    with file.open("rb") as stream:
      is_text = b"\0" not in stream.read(8192)
    if is_text:
      yield file


def _hold_out(texts: list[bytes]) -> tuple[bytes, bytes]:
  """Splits into whole files, or, if there are few, the end of the text."""
  if len(texts) >= _HELD_OUT:
    train = [t for i, t in enumerate(texts) if i % _HELD_OUT != _HELD_OUT - 1]
    return b"".join(train), b"".join(texts[_HELD_OUT - 1 :: _HELD_OUT])
  text = b"".join(texts)
  split = len(text) - len(text) // _HELD_OUT
  return text[:split], text[split:]


def _as_bytes(text: bytes) -> UInt8[np.ndarray, " N"]:
  return np.frombuffer(text, np.uint8)


def _windows(tokens, starts, sequence_length):
  columns = np.arange(sequence_length + 1)
  return tokens[starts[:, None] + columns[None, :]].astype(np.int32)
