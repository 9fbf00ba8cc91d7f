"""Gated weights with an axis for the gate, so that a mesh can split n.

Stored (E, d, 2n), gate half first, no block of columns holds matching halves.
Viewed as (E, d, 2, n), every block of n does: the same numbers in the same
order, so either view is free on one device.
"""

from typing import Any

import jax

_GATED, _BIAS = "w_gate_up", "bias_in"


def split_gate(tree: Any) -> Any:
  """Returns `tree` with every `w_gate_up` as (E, d, 2, n).

  And every `bias_in` beside one as (E, 2, n). What is so already stays, and so
  does a `DenseMLP`'s (d, 2n). Expert layers stacked by `nn.scan` have a further
  dimension in front; stacked dense ones look like experts: leave them out.

  Args:
    tree: parameters, as Flax modules name them, or anything that holds such
      trees: a train state with its optimizer's moments, or its shapes.

  Raises:
    ValueError: if they are boxed.
  """

  def split(shape, is_split):
    return shape if is_split else (*shape[:-1], 2, shape[-1] // 2)

  return _view("split_gate", tree, split)


def join_gate(tree: Any) -> Any:
  """Returns `tree` with every `w_gate_up` as (E, d, 2n), gate half first.

  The inverse of `split_gate`, and what modules without `mesh_axes`, and
  checkpoints of other programs, expect.
  """

  def join(shape, is_split):
    return (*shape[:-2], 2 * shape[-1]) if is_split else shape

  return _view("join_gate", tree, join)


def _view(function, tree, new_shape):
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  named = [(tuple(map(_name, path)), leaf) for path, leaf in leaves]
  for path, _ in named:
    if path[-2:] == (_GATED, "value"):
      raise ValueError(
        f"{function}: {'/'.join(map(str, path[:-1]))} is boxed, with names for "
        "the dimensions that it has; pass flax.linen.meta.unbox of the tree."
      )
  # A bias has the view of the weight beside it. A dense MLP's has no experts.
  is_split = {
    path[:-1]: len(leaf.shape) > 3 and leaf.shape[-2] == 2
    for path, leaf in named
    if path and path[-1] == _GATED and len(leaf.shape) > 2
  }

  def view(path, leaf):
    if not path or path[:-1] not in is_split or path[-1] not in (_GATED, _BIAS):
      return leaf
    shape = new_shape(leaf.shape, is_split[path[:-1]])
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
