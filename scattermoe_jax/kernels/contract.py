"""Which backend runs a problem, and why not another."""

import functools
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax.numpy as jnp

from scattermoe_jax._compat import (
  Device,
  current_device,
  requested_implementation,
)

# In the order in which they are tried.
IMPLEMENTATIONS = ("mosaic", "triton", "xla")


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


def accumulator_dtype(dtype) -> jnp.dtype:
  """Returns the dtype in which sums over `dtype` are kept: float32 or wider."""
  wide = jnp.dtype(jnp.float32)
  return wide if jnp.dtype(dtype).itemsize < wide.itemsize else jnp.dtype(dtype)


def choose_backend(
  problems: Sequence[Problem], implementation: str | None = None
) -> ModuleType:
  """Returns the backend that runs all of `problems`.

  Asked once per op when it is traced, with the products of the forward and the
  backward together, so that a backward never fails for want of a kernel.

  Args:
    problems: the products.
    implementation: a name in `IMPLEMENTATIONS`; None for the environment
      variable SCATTERMOE_JAX_IMPLEMENTATION, else the first that can.

  Returns:
    The backend, a module.

  Raises:
    ValueError: if `implementation` is not a name of a backend.
    NotImplementedError: if the backend that was asked for cannot run them.
  """
  implementation = implementation or requested_implementation()
  if implementation is not None:
    if implementation not in IMPLEMENTATIONS:
      raise ValueError(
        f"implementation must be one of {IMPLEMENTATIONS} or None, got "
        f"{implementation!r}."
      )
    reason = _reason_against(implementation, problems)
    if reason is not None:
      raise NotImplementedError(
        f"implementation={implementation!r} cannot run this: {reason}"
      )
    return _load(implementation)

  reasons = {}
  for name in IMPLEMENTATIONS:
    reason = _reason_against(name, problems)
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
  """Returns, in a few lines, which backend would run here and why.

  Args:
    problem: the product asked about; a bfloat16 one of common size if None.

  Example:
    >>> print(report().splitlines()[0][:6])
    device
  """
  problem = problem or Problem(
    65536, 64, 2048, 1024, "bfloat16", current_device()
  )
  lines = [f"device: {problem.device.kind} ({problem.device.platform})"]
  chosen = False
  for name in IMPLEMENTATIONS:
    reason = _reason_against(name, [problem])
    if reason is not None:
      lines.append(f"{name}: no; {reason}")
    elif chosen:
      lines.append(f"{name}: can")
    else:
      lines.append(f"{name}: runs")
      chosen = True
  return "\n".join(lines)


def _reason_against(name: str, problems: Sequence[Problem]) -> str | None:
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
