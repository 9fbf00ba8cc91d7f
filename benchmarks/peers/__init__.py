"""Adapters to peers that have to be installed; none of their code is here.

Each module has `build(shape, data, direction)`, which returns a step of the
peer on the same tensors (`Step`), its results in the order y, dx, dgates,
or raises `Absent`.
"""

import contextlib
import gc
import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

PEERS = ("sonicmoe", "scattermoe", "tokamax")

# A layer in JAX: y of (x, gates, w_in, w_out, expert_ids=).
Layer = Callable[..., Any]


class Step(NamedTuple):
  """One implementation of a step, ready to be called.

  Attributes:
    call: dispatches a step and returns its results.
    peak_bytes: what a step needs beside its arguments, results included.
    held_bytes: what is kept from the forward to the backward.
    note: what a reader of the record should know, such as chosen tiles.
  """

  call: Callable[[], Any]
  peak_bytes: int | None = None
  held_bytes: int | None = None
  note: str | None = None


class Absent(Exception):
  """A peer that is not installed, or cannot run here."""


def build(name: str, shape, data, direction: str, *, seconds: float = 60.0):
  """Returns the step of the peer called `name`.

  Args:
    name: in `PEERS`.
    shape: the problem.
    data: the inputs, JAX arrays.
    direction: "forward" or "forward+backward".
    seconds: after which building it, tuning included, is given up.

  Raises:
    Absent: if it is not installed, or takes longer.
    ValueError: if nobody knows it.
  """
  if name not in PEERS:
    raise ValueError(f"implementation {name!r} is unknown; peers are {PEERS}.")
  adapter = importlib.import_module(f"benchmarks.peers.{name}_adapter")
  try:
    with _at_most(seconds):
      return adapter.build(shape, data, direction)
  except ImportError as error:
    raise Absent(f"not installed ({error})") from error


def release() -> None:
  """Gives back what torch keeps of memory that no step uses any more."""
  gc.collect()
  torch = sys.modules.get("torch")
  if torch is not None and torch.cuda.is_available():
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
  """Raises Absent in the main thread after so many seconds."""

  def give_up(*_):
    raise Absent(f"not ready after {seconds:.0f} s")

  before = signal.signal(signal.SIGALRM, give_up)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
