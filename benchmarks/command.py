"""What the commands of the benchmarks have in common: flags and records."""

import argparse
from collections.abc import Callable, Sequence
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
  made.add_argument("--sample-ms", type=float, default=4.0)
  made.add_argument("--write", action="store_true", help="keep the records")
  return made


def sampling(options: argparse.Namespace) -> dict[str, Any]:
  """Returns the arguments of `timing.time_interleaved` that flags decide."""
  return {"samples": options.samples, "sample_ms": options.sample_ms}


def measure_each(
  options: argparse.Namespace,
  measure: Callable[[Shape], list[Record]],
  *,
  bench: str,
  key: Sequence[str],
) -> list[Record]:
  """Returns the records of all shapes; each shape's are stored when made.

  Args:
    options: from `parser`.
    measure: returns the records of one shape.
    bench: the benchmark's name, of its file of records too.
    key: fields by which a new record replaces an old one.
  """
  records = []
  for name in options.shapes:
    made = [{"bench": bench, **record} for record in measure(SHAPES[name])]
    store(options, made, bench=bench, key=key)
    records += made
  return records


def store(
  options: argparse.Namespace,
  records: Sequence[Record],
  *,
  bench: str,
  key: Sequence[str],
) -> None:
  """Adds the records to the benchmark's file, if `--write` was given."""
  if options.write and records:
    timing.merge_records(timing.results_path(bench), records, key=key)
