"""Gated weights with an axis for the gate, so that a mesh can split n.

Stored (E, d, 2n), gate half first, no block of columns holds matching halves.
Viewed as (E, d, 2, n), every block of n does: the same numbers in the same
order, so either view is free on one device.
"""

from collections.abc import Mapping
from typing import Any

_GATED, _BIAS = "w_gate_up", "bias_in"


def split_gate(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `params` with every `w_gate_up` as (E, d, 2, n).

  And every `bias_in` beside one as (E, 2, n). Leaves that are so already stay.

  Args:
    params: nested dictionaries, as Flax modules have them.
  """
  return _view(
    params,
    lambda w, ndim: (
      w if w.ndim == ndim + 1 else w.reshape(*w.shape[:-1], 2, -1)
    ),
  )


def join_gate(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `params` with every `w_gate_up` as (E, d, 2n), gate half first.

  The inverse of `split_gate`; what checkpoints of other programs expect.
  """
  return _view(
    params,
    lambda w, ndim: w if w.ndim == ndim else w.reshape(*w.shape[:-2], -1),
  )


def _view(params, view):
  out = {}
  for name, value in params.items():
    if isinstance(value, Mapping):
      out[name] = _view(value, view)
    elif name == _GATED:
      out[name] = view(value, 3)
    elif name == _BIAS and _GATED in params:
      out[name] = view(value, 2)
    else:
      out[name] = value
  return out
