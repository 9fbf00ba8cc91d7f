"""The one tolerance rule of the tests.

An implementation may be off by at most twice what plain XLA in the same dtype
is off by, plus one unit in the last place of the largest value. In float64,
where the truth itself is rounded, by 1e-12 of the largest value.
Source: the rule of flash-attention's tests (Dao et al.), made relative.
"""

import jax.numpy as jnp
import numpy as np

_FLOAT64_ERROR = 1e-12


def assert_accurate(got, oracle, baseline, *, err_msg: str = "") -> None:
  """Asserts max|got - oracle| <= 2 max|baseline - oracle| + 1 ulp.

  Args:
    got: the result under test.
    oracle: float64 truth.
    baseline: plain XLA in the dtype of `got`; None for `oracle` rounded to it.
    err_msg: said first on failure.
  """
  assert got.shape == oracle.shape, f"{err_msg}: {got.shape} {oracle.shape}"
  if got.size == 0:
    return
  dtype = got.dtype
  oracle = np.asarray(oracle, np.float64)
  got = np.asarray(got).astype(np.float64)
  assert np.all(np.isfinite(got)), f"{err_msg}: not finite"
  error = np.max(np.abs(got - oracle))
  allowed = _allowed_error(dtype, oracle, baseline)
  assert error <= allowed, (
    f"{err_msg}: off by {error:.3e}, allowed {allowed:.3e} "
    f"(largest value {np.max(np.abs(oracle)):.3e})"
  )


def _allowed_error(dtype, oracle, baseline) -> float:
  largest = np.max(np.abs(oracle))
  if dtype == np.float64:
    return _FLOAT64_ERROR * largest
  if baseline is None:
    baseline = jnp.asarray(oracle, jnp.float32).astype(dtype)
  assert baseline.dtype == dtype, f"baseline {baseline.dtype}, got {dtype}"
  baseline = np.asarray(baseline).astype(np.float64)
  ulp = float(jnp.finfo(dtype).eps) * largest
  return 2 * np.max(np.abs(baseline - oracle)) + ulp
