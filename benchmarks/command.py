"""What the commands of the benchmarks have in common: flags and records."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import timing
from benchmarks.shapes import SHAPES, Shape
from scattermoe_jax.kernels import IMPLEMENTATIONS

Record = dict[str, Any]


def parser(
  doc: str, *, shapes: Sequence[str] = (), is_sampled: bool = True
) -> argparse.ArgumentParser:
  """Returns the parser of a benchmark whose module says `doc`.

  Args:
    doc: its first line is the question.
    shapes: those that are measured if none is named.
    is_sampled: whether a time is that of many calls, see `sampling`.
  """
  made = argparse.ArgumentParser(description=doc.splitlines()[0])
  made.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(shapes))
  if is_sampled:
    made.add_argument(
      "--samples", type=int, default=20, help="of each time (default: 20)"
    )
    made.add_argument(
      "--sample-ms",
      type=float,
      default=timing.SAMPLE_MS,
      help=f"how long each takes (default: {timing.SAMPLE_MS:.0f})",
    )
  made.add_argument("--write", action="store_true", help="keep the records")
  return made


def parse_with_backend(
  made: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
  """Returns what was asked for, `backend` among it; None for the default.

  Records do not say which backend they are of: those of the default are kept.
  """
  made.add_argument(
    "--backend",
    choices=IMPLEMENTATIONS,
    help="of this library's layers (default: the one a user gets)",
  )
  options = made.parse_args(arguments)
  if options.backend and options.write:
    made.error(
      f"--backend {options.backend} with --write would replace the records of "
      "the default backend"
    )
  return options


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
