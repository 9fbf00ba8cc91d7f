"""The one tolerance rule of the tests.

An implementation may be off by at most twice what plain XLA in the same dtype
is off by, plus one unit in the last place of the largest value. In float64,
where the truth itself is rounded, by 1e-12 of the largest value.

In float32 sums are kept in the dtype of the result, so that their order alone
decides some digits: a dot in 16 lanes rounds less than one term after another,
as a kernel adds. The baseline of a float32 product is therefore plain XLA in
both orders, and the worse of them counts. Narrow dtypes sum in float32, where
no order shows.
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
    baseline: plain XLA in the dtype of `got`, or a list of it in several orders
      of summation; None for `oracle` rounded.
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
  error = 0.0
  for one in baseline if isinstance(baseline, list) else [baseline]:
    assert one.dtype == dtype, f"baseline {one.dtype}, got {dtype}"
    one = np.asarray(one).astype(np.float64)
    error = max(error, np.max(np.abs(one - oracle)))
  ulp = float(jnp.finfo(dtype).eps) * largest
  return 2 * error + ulp
