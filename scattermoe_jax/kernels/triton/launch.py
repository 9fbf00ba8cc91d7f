"""How a kernel body is launched, and how tiles are loaded: Pallas-Triton alone.

The one place that would change if another compiler took the bodies over.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from scattermoe_jax._compat import output_struct, silence_triton_deprecation
from scattermoe_jax.kernels.triton.tiles import TritonConfig


def launch(
  body: Callable[..., None],
  operands: Mapping[str, Array | None],
  out_shape: jax.ShapeDtypeStruct,
  *,
  num_programs: int,
  config: TritonConfig,
  interpret: bool,
  name: str,
) -> Array:
  """Returns what `num_programs` programs of `body` write.

  Args:
    body: called with a dict of refs, by the names of the operands that are not
      None, and the ref of the output.
    operands: arrays by name.
    out_shape: of the output; what no program writes is undefined.
    num_programs: the grid.
    config: warps and stages.
    interpret: whether to run in the interpreter.
    name: of the kernel, in profiles.
  """
  silence_triton_deprecation()
  present = {key: a for key, a in operands.items() if a is not None}
  return pl.pallas_call(
    functools.partial(_with_names, body, tuple(present)),
    out_shape=output_struct(
      out_shape.shape, out_shape.dtype, *present.values()
    ),
    grid=(num_programs,),
    in_specs=[pl.no_block_spec] * len(present),
    out_specs=pl.no_block_spec,
    compiler_params=_triton().CompilerParams(
      num_warps=config.num_warps, num_stages=config.num_stages
    ),
    interpret=interpret,
    name=name,
  )(*present.values())


def _with_names(body, names, *refs):
  body(dict(zip(names, refs[:-1], strict=True)), refs[-1])


def load(ref: Any, at: tuple, *masks: Array | None, other: int = 0) -> Array:
  """Loads ref[at] where all masks hold, else `other`.

  Every index is an array: the interpreter knows no other masked load.

  Args:
    ref: in global memory.
    at: indices that broadcast to the tile.
    masks: of the tile's rank, each broadcast to it; None holds everywhere.
    other: what dead lanes get.
  """
  mask = all_of(at, *masks)
  if mask is None:
    return _triton().load(ref.at[at])
  return _triton().load(
    ref.at[at], mask=mask, other=jnp.full(mask.shape, other, ref.dtype)
  )


def store(ref: Any, at: tuple, value: Array, *masks: Array | None) -> None:
  """Stores value to ref[at] where all masks hold, in the dtype of ref.

  In the interpreter dead lanes write back what they found, so they must not
  share an address with a live one.
  """
  _triton().store(ref.at[at], value.astype(ref.dtype), mask=all_of(at, *masks))


def as_row(mask: Array | None) -> Array | None:
  """Returns a mask of a tile's columns, to be broadcast over its rows."""
  return None if mask is None else mask[None, :]


def as_column(mask: Array | None) -> Array | None:
  """Returns a mask of a tile's rows, to be broadcast over its columns."""
  return None if mask is None else mask[:, None]


def all_of(at: tuple, *masks: Array | None) -> Array | None:
  """Returns the masks' conjunction, broadcast to the tile that `at` spans."""
  shape = jnp.broadcast_shapes(*(jnp.shape(index) for index in at))
  present = [jnp.broadcast_to(m, shape) for m in masks if m is not None]
  return functools.reduce(jnp.logical_and, present) if present else None


def _triton():
  # Late, so that a JAX without it can still import this backend's `check`.
  return importlib.import_module("jax.experimental.pallas.triton")
