"""Gated weights with an axis for the gate, so that a mesh can split n.

Stored (E, d, 2n), gate half first, no block of columns holds matching halves.
Viewed as (E, d, 2, n), every block of n does: the same numbers in the same
order, so either view is free on one device.
"""

import math
from typing import Any

import jax

_GATED, _BIAS = "w_gate_up", "bias_in"
# Dimensions where the gate has no axis of its own.
_JOINED_NDIM = {_GATED: 3, _BIAS: 2}


def split_gate(tree: Any) -> Any:
  """Returns `tree` with every `w_gate_up` as (E, d, 2, n).

  And every `bias_in` beside one as (E, 2, n). What is so already stays.

  Args:
    tree: parameters, as Flax modules name them, or anything that holds such
      trees: a train state with its optimizer's moments, or its shapes.
  """
  return _view(tree, lambda shape: (*shape[:-1], 2, shape[-1] // 2), 0)


def join_gate(tree: Any) -> Any:
  """Returns `tree` with every `w_gate_up` as (E, d, 2n), gate half first.

  The inverse of `split_gate`, and what modules without `mesh_axes`, and
  checkpoints of other programs, expect.
  """
  return _view(tree, lambda shape: (*shape[:-2], math.prod(shape[-2:])), 1)


def _view(tree, new_shape, extra_dims):
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  named = [(tuple(map(_name, path)), leaf) for path, leaf in leaves]
  gated = {path[:-1] for path, _ in named if path and path[-1] == _GATED}

  def view(path, leaf):
    if not path or path[:-1] not in gated or path[-1] not in _JOINED_NDIM:
      return leaf
    if len(leaf.shape) != _JOINED_NDIM[path[-1]] + extra_dims:
      return leaf
    shape = new_shape(leaf.shape)
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(shape, leaf.dtype)
    return leaf.reshape(shape)

  return jax.tree.unflatten(structure, [view(*item) for item in named])


def _name(entry: Any) -> Any:
  """Returns what a step of a path is called, whatever the container."""
  for attribute in ("key", "name", "idx"):
    if hasattr(entry, attribute):
      return getattr(entry, attribute)
  return entry
