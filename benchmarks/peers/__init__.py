"""Adapters to peers that have to be installed; none of their code is here.

Each module has `build(shape, data, direction)`, which returns a step of the
peer on the same tensors (`Step`), its results in the order y, dx, dgates,
or raises `Absent`.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

PEERS = ("sonicmoe", "scattermoe", "tokamax")


class Step(NamedTuple):
  """One implementation of a step, ready to be called.

  Attributes:
    call: dispatches a step and returns its results.
    peak_bytes: what a step needs beside its arguments, results included.
    held_bytes: what is kept from the forward to the backward.
  """

  call: Callable[[], Any]
  peak_bytes: int | None = None
  held_bytes: int | None = None


class Absent(Exception):
  """A peer that is not installed, or cannot run here."""


def build(name: str, shape, data, direction: str):
  """Returns the step of the peer called `name`.

  Raises:
    Absent: if it is not installed.
    ValueError: if nobody knows it.
  """
  if name not in PEERS:
    raise ValueError(f"implementation {name!r} is unknown; peers are {PEERS}.")
  adapter = importlib.import_module(f"benchmarks.peers.{name}_adapter")
  try:
    return adapter.build(shape, data, direction)
  except ImportError as error:
    raise Absent(f"not installed ({error})") from error
