"""How long things take: interleaved, warmed up, and with their spread.

Device time: a sample is many calls dispatched without waiting, between two
waits, divided by their number, so that Python's own time hides behind the
device's. Variants take turns, sample by sample and in a shuffled order: clocks
drift, and a card at its power limit drifts most, but for all of them alike. A
sample is long enough to have its own clock: in samples of one call of 8 ms each
variant ran at the clock that the one before had left, and a ratio of 1.27
between two that ran alone was read as 1.07 (docs/kernels.md). Only so many
calls are under way at a time, and of each the smallest result alone is held.

Caches: calls follow one another, so an operand smaller than the L2 cache (50 MB
on an H200) is found there. Where the caller would find it cold, pass `flush`.
"""

import collections
import datetime
import functools
import json
import os
import pathlib
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SAMPLE_MS = 80.0
RESULTS = pathlib.Path(__file__).parent / "results"
_FLUSH_BYTES = 256 * 2**20
_UNDER_WAY = 8  # calls that have not ended, at most


class Timing(NamedTuple):
  """Milliseconds of one call: the median and the middle 60 % of samples."""

  ms_median: float
  ms_p20: float
  ms_p80: float
  samples: int


def time_interleaved(
  variants: Mapping[str, Callable[[], Any]],
  *,
  samples: int = 20,
  sample_ms: float = SAMPLE_MS,
  max_calls: int | None = None,
  flush: bool = False,
) -> dict[str, Timing]:
  """Returns the time of a call of each variant, all measured in one run.

  Args:
    variants: by name, functions of no arguments that dispatch and return.
    samples: how many samples of each.
    sample_ms: about how long a sample should take: enough calls for this.
    max_calls: but at most so many, if not None.
    flush: whether to write 256 MB before each call, so that it finds caches
      cold; the time of writing alone is measured alike and taken off.
  """
  variants = dict(variants)
  if flush:
    flush_cache = _flusher()
    variants = {
      name: _in_turn(flush_cache, call) for name, call in variants.items()
    }
    variants["flush"] = flush_cache
  calls = {
    name: _calls_for(call, sample_ms, max_calls)
    for name, call in variants.items()
  }
  taken: dict[str, list[float]] = {name: [] for name in variants}
  # In a new order each round: what ran before decides how hot the card is.
  order, turns = list(variants), random.Random(0)
  for _ in range(samples):
    turns.shuffle(order)
    for name in order:
      taken[name].append(_sample(variants[name], calls[name]))
  idle = statistics.median(taken.pop("flush")) if flush else 0.0
  return {name: summary(times, idle) for name, times in taken.items()}


def _sample(call: Callable[[], Any], calls: int) -> float:
  under_way: collections.deque[Any] = collections.deque()
  start = time.perf_counter()
  for _ in range(calls):
    if len(under_way) == _UNDER_WAY:
      jax.block_until_ready(under_way.popleft())
    result = call()
    under_way.append(_end_of(result))
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / calls * 1e3


def _end_of(result) -> Any:
  """Returns what becomes ready with a result and holds least of it."""
  if hasattr(result, "end"):
    return result.end
  leaves = jax.tree.leaves(result)
  return min(leaves, key=lambda leaf: getattr(leaf, "nbytes", 0), default=None)


def _calls_for(call, sample_ms: float, max_calls: int | None) -> int:
  jax.block_until_ready(call())  # Compiles.
  jax.block_until_ready(call())  # Fills caches, allocates.
  calls = max(1, round(sample_ms / max(_sample(call, 1), 1e-3)))
  if calls > _UNDER_WAY:  # One that is short waits longer than it takes.
    once = _sample(call, _UNDER_WAY)
    calls = max(1, round(sample_ms / max(once, 1e-3)))
  return calls if max_calls is None else min(calls, max_calls)


def summary(times: Sequence[float], idle: float = 0.0) -> Timing:
  """Returns the median and spread of milliseconds, less those of `idle`."""
  times = sorted(t - idle for t in times)
  last = len(times) - 1
  return Timing(
    statistics.median(times),
    times[round(0.2 * last)],
    times[round(0.8 * last)],
    len(times),
  )


def _flusher() -> Callable[[], Any]:
  write = jax.jit(lambda a: a + 1)
  buffer = jnp.zeros((_FLUSH_BYTES // 4,), jnp.int32)
  return lambda: write(buffer)


def _in_turn(first, second) -> Callable[[], Any]:
  def both():
    first()
    return second()

  return both


@functools.cache
def environment() -> dict[str, Any]:
  """Returns what a record says of where and how it was made.

  Where there is no history of the repository to ask, BENCH_COMMIT names the
  commit that runs.
  """
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "jax": jax.__version__,
    "python": platform.python_version(),
    "commit": os.environ.get("BENCH_COMMIT")
    or _output("git", "rev-parse", "--short", "HEAD"),
    "driver": _output(
      "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    ),
    "clocks": _output(
      "nvidia-smi",
      "--query-gpu=clocks.sm,clocks.max.sm,power.limit",
      "--format=csv,noheader",
    ),
    "date": datetime.date.today().isoformat(),
    "command": " ".join(["python", *_module_command()]),
  }


def _module_command() -> list[str]:
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  program = ["-m", spec.name] if spec else [pathlib.Path(sys.argv[0]).name]
  return program + sys.argv[1:]


def _output(*command: str) -> str | None:
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() or None if done.returncode == 0 else None


def write_records(
  path: pathlib.Path | str, records: Sequence[Mapping[str, Any]]
) -> None:
  """Writes records as JSON, one to a line, so that diffs are readable."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = ",\n".join(json.dumps(dict(record)) for record in records)
  path.write_text(f"[\n{lines}\n]\n")


def merge_records(
  path: pathlib.Path | str,
  records: Sequence[Mapping[str, Any]],
  *,
  key: Sequence[str],
) -> None:
  """Adds records, with where they were made, to those of a file.

  Args:
    path: the file; made if it is not there.
    records: the new ones.
    key: fields by which a new record replaces an old one.
  """
  path = pathlib.Path(path)
  head = environment()
  identity = lambda record: tuple(record.get(field) for field in key)
  old = read_records(path) if path.exists() else []
  merged = {identity(record): record for record in old}
  for record in records:
    merged[identity(record)] = {**record, **head}
  write_records(path, list(merged.values()))


def read_records(path: pathlib.Path | str) -> list[dict[str, Any]]:
  """Returns the records of a file that `write_records` wrote."""
  return json.loads(pathlib.Path(path).read_text())


def results_path(name: str, device: str | None = None) -> pathlib.Path:
  """Returns results/<device>/<name>.json, such as results/h200/....

  A card is called by the words up to its number: h100 of "NVIDIA H100 80GB
  HBM3", geforce-rtx-4090.
  """
  kind = (device or jax.devices()[0].device_kind).lower()
  words = kind.removeprefix("nvidia ").split()
  numbered = (i for i, word in enumerate(words) if re.search(r"\d", word))
  return RESULTS / "-".join(words[: next(numbered, 0) + 1]) / f"{name}.json"
