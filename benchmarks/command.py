"""What the commands of the benchmarks have in common: flags and records."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import timing
from benchmarks.shapes import SHAPES, Shape

Record = dict[str, Any]


def parser(doc: str, *, shapes: Sequence[str] = ()) -> argparse.ArgumentParser:
  """Returns the parser of a benchmark whose module says `doc`.

  Args:
    doc: its first line is the question.
    shapes: those that are measured if none is named.
  """
  made = argparse.ArgumentParser(description=doc.splitlines()[0])
  made.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(shapes))
  made.add_argument("--samples", type=int, default=20)
  made.add_argument("--sample-ms", type=float, default=timing.SAMPLE_MS)
  made.add_argument("--write", action="store_true", help="keep the records")
  return made


def sampling(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the arguments of `timing.time_interleaved` that flags decide."""
  return {"samples": options.samples, "sample_ms": options.sample_ms}


def measure_each(
  options: argparse.Namespace,
  measure: Callable[[Shape], Iterable[list[Record]]],
  *,
  bench: str,
  key: Sequence[str],
) -> list[Record]:
  """Returns the records of all shapes, each stored as soon as it is made.

  Args:
    options: from `parser`.
    measure: makes the records of one shape, some at a time.
    bench: the benchmark's name, of its file of records too.
    key: fields by which a new record replaces an old one.
  """
  records = []
  for name in options.shapes:
    for made in measure(SHAPES[name]):
      records += store(made, options, bench=bench, key=key)
  return records


def store(
  records: Sequence[Record],
  options: argparse.Namespace,
  *,
  bench: str,
  key: Sequence[str],
) -> list[Record]:
  """Returns the records under the benchmark's name, kept if `--write` asks."""
  named = [{"bench": bench, **record} for record in records]
  if options.write:
    timing.merge_records(timing.results_path(bench), named, key=key)
  return named
