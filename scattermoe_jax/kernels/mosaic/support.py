"""What the Hopper backend can run, and of which JAX."""

import functools
import inspect

from scattermoe_jax.kernels.contract import Problem
from scattermoe_jax.kernels.mosaic.padding import MULTIPLE, padded

_DTYPES = ("bfloat16", "float16")
# What 32 bits reach that count chunks of 8 elements (`layouts.at_chunk`).
_MOST_ELEMENTS = 2**35


def check(problem: Problem) -> str | None:
  """Returns why `problem` cannot run here, in words, or None."""
  capability = problem.device.capability
  if problem.device.platform != "gpu" or capability != (9, 0):
    return (
      "mosaic runs on Hopper GPUs (compute capability 9.0), this is "
      f"{problem.device.kind}"
    )
  if problem.dtype not in _DTYPES:
    return f"mosaic multiplies {' or '.join(_DTYPES)}, got {problem.dtype}"
  for name, width in (("d_in", problem.d_in), ("d_out", problem.d_out)):
    if width % MULTIPLE or not width:
      return (
        f"mosaic needs widths that are multiples of {MULTIPLE}, got "
        f"{name} = {width}"
      )
    if problem.num_rows * padded(width) > _MOST_ELEMENTS:
      return (
        f"mosaic reaches {_MOST_ELEMENTS} elements of an array of rows, got "
        f"{problem.num_rows} rows of {name} = {width}"
      )
  return missing_feature()


@functools.cache
def missing_feature() -> str | None:
  """Returns what this JAX lacks, or None."""
  try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
  except Exception as error:
    return f"this JAX does not import Pallas Mosaic GPU ({error})"
  # JAX 0.11.2 has them all.
  for name in ("inline_mgpu", "force_gpu_interpret_mode"):
    if not hasattr(plgpu, name):
      return f"this JAX is too old for mosaic: Pallas has no {name}"
  arguments = (("kernel", "out_type"), ("barrier_arrive", "predicate"))
  for name, argument in arguments:
    function = getattr(plgpu, name, None)
    if not function or argument not in inspect.signature(function).parameters:
      return f"this JAX is too old for mosaic: its {name} takes no {argument}"
  return None
