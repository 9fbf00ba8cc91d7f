"""Which backend runs a problem, and why not another."""

import difflib
import functools
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from scattermoe_jax._compat import (
  IMPLEMENTATION_VARIABLE,
  Device,
  current_device,
  requested_implementation,
)

# In the order in which they are tried.
IMPLEMENTATIONS = ("mosaic", "triton", "xla")

# Up to so many rows per expert a product waits for its weights alone, and small
# tiles with many loads in flight read them faster: Triton's before Mosaic's.
# One layer on an H200, d=4096 n=1024 E=128 k=8:
#   rows per expert    Triton    Mosaic
#                 4    0.75 ms   0.88 ms
#                32    1.14 ms   1.21 ms   with a slower sort than today's
# Mosaic leads from hundreds of rows on; between, nothing was measured.
FEW_ROWS_PER_EXPERT = 32


class Problem(NamedTuple):
  """One grouped product, as far as a backend needs it to say yes or no.

  Attributes:
    num_rows: S.
    num_experts: E.
    d_in: width of a row read (the contraction of `scatter2scatter`).
    d_out: width of a row written.
    dtype: the operands' dtype, by name.
    device: where it will run.
  """

  num_rows: int
  num_experts: int
  d_in: int
  d_out: int
  dtype: str
  device: Device


class Columns(NamedTuple):
  """One of the slices of `width` columns that a product is made in.

  Their number, not their first column: a kernel that is told it serves all of
  them, and knows that they start at multiples of the width.

  Attributes:
    slice_index: which; may be traced.
    width: static.
  """

  slice_index: Int[Array, ""] | int
  width: int

  def of(self, array: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Returns a copy of the slice, along `axis`."""
    start = self.slice_index * self.width
    return lax.dynamic_slice_in_dim(array, start, self.width, axis)


def accumulator_dtype(dtype) -> jnp.dtype:
  """Returns the dtype in which sums over `dtype` are kept: float32 or wider."""
  wide = jnp.dtype(jnp.float32)
  return wide if jnp.dtype(dtype).itemsize < wide.itemsize else jnp.dtype(dtype)


def preference(problem: Problem) -> tuple[str, ...]:
  """Returns the implementations in the order in which to try them."""
  if problem.num_rows <= FEW_ROWS_PER_EXPERT * problem.num_experts:
    return ("triton", "mosaic", "xla")
  return IMPLEMENTATIONS


def choose_backend(
  problems: Sequence[Problem], implementation: str | None = None
) -> ModuleType:
  """Returns the backend that runs all of `problems`.

  Asked once per op when it is traced, with the products of the forward and the
  backward together, so that a backward never fails for want of a kernel.

  Args:
    problems: the products.
    implementation: a name in `IMPLEMENTATIONS`; None for the environment
      variable SCATTERMOE_JAX_IMPLEMENTATION, else the first that can, in the
      order of `preference`.

  Returns:
    The backend, a module.

  Raises:
    ValueError: if `implementation` is not a name of a backend.
    NotImplementedError: if the backend that was asked for cannot run them.
  """
  requested = requested_implementation()
  if implementation is not None:
    return _named(implementation, f"{implementation=}", problems)
  if requested is not None:
    return _named(requested, f"{IMPLEMENTATION_VARIABLE}={requested}", problems)

  reasons: dict[str, str] = {}
  for name in preference(problems[0]):
    reason = reason_against(name, problems)
    if reason is None:
      if name == "xla" and problems[0].device.platform == "gpu":
        _warn_once(tuple(reasons.items()))
      return _load(name)
    reasons[name] = reason
  raise NotImplementedError(
    "no backend can run this: "
    + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
  )


def report(problem: Problem | None = None) -> str:
  """Returns, in a few lines, which backend would run a product and why.

  Args:
    problem: the product asked about, a `Problem` of `scattermoe_jax.kernels`,
      whose `current_device` is the one that is here; a bfloat16 one of common
      size, if None.

  Example:
    >>> print(report().splitlines()[0][:6])
    device
  """
  problem = problem or Problem(
    65536, 64, 2048, 1024, "bfloat16", current_device()
  )
  device = problem.device
  lines = [
    f"device: {device.kind} ({device.platform}"
    + (
      f", compute capability {'.'.join(map(str, device.capability))})"
      if device.capability
      else ")"
    ),
    f"product: S = {problem.num_rows} rows to E = {problem.num_experts} "
    f"experts, {problem.d_in} -> {problem.d_out}, {problem.dtype}",
  ]
  requested = requested_implementation()
  if requested is not None:
    lines.append(_verdict(requested, problem))
  chosen = False
  for name in preference(problem):
    reason = reason_against(name, [problem])
    runs = not chosen if requested is None else name == requested
    if reason is not None:
      lines.append(f"{name}: cannot; {reason}")
    else:
      lines.append(f"{name}: " + ("runs" if runs else "can"))
      chosen = True
  return "\n".join(lines)


def _verdict(requested: str, problem: Problem) -> str:
  """Returns what the environment's override does, in a line."""
  request = f"{IMPLEMENTATION_VARIABLE}={requested}"
  try:
    _named(requested, request, [problem])
  except (ValueError, NotImplementedError) as error:
    return f"nothing runs: {error}"
  return f"{request} decides"


def _named(name: str, request: str, problems: Sequence[Problem]) -> ModuleType:
  """Returns the backend of that name; `request` is how the user asked."""
  if name not in IMPLEMENTATIONS:
    close = difflib.get_close_matches(str(name).lower(), IMPLEMENTATIONS, n=1)
    raise ValueError(
      f"{request}: not one of {', '.join(IMPLEMENTATIONS)}; "
      + (
        f"did you mean {close[0]!r}?"
        if close
        else "without it, the first that can runs."
      )
    )
  reason = reason_against(name, problems)
  if reason is not None:
    others = [
      other
      for other in IMPLEMENTATIONS
      if other != name and reason_against(other, problems) is None
    ]
    raise NotImplementedError(
      f"{request} cannot run this: {reason}. "
      + (f"Here {' and '.join(others)} can; None chooses." if others else "")
    )
  return _load(name)


def reason_against(name: str, problems: Sequence[Problem]) -> str | None:
  """Returns why the backend of that name cannot run all of them, or None."""
  backend = _load(name)
  for problem in problems:
    reason = backend.check(problem)
    if reason is not None:
      return reason
  return None


def _load(name: str) -> ModuleType:
  # Late, so that `import scattermoe_jax` does not import Pallas.
  return importlib.import_module(f"scattermoe_jax.kernels.{name}")


@functools.cache
def _warn_once(reasons: tuple[tuple[str, str], ...]) -> None:
  why = "; ".join(f"{name}: {reason}" for name, reason in reasons)
  warnings.warn(
    "scattermoe_jax runs this layer on the plain XLA backend, which is slow on "
    f"a GPU ({why}).",
    stacklevel=2,
  )
