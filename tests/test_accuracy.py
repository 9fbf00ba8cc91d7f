"""The tolerance rule can fail: every error worth catching is caught."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.accuracy import assert_accurate

pytestmark = pytest.mark.optimised

ORACLE = np.random.default_rng(0).normal(size=(16, 8))


def rounded(dtype):
  return jnp.asarray(ORACLE, jnp.float32).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_rounded_truth_passes(dtype):
  assert_accurate(rounded(dtype), ORACLE, None)
  assert_accurate(rounded(dtype), ORACLE, rounded(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "broken",
  [
    lambda y: y.at[...].set(0),
    lambda y: y[::-1],
    lambda y: y.at[-1].set(0),
    lambda y: y * 1.05,
    lambda y: y.at[3, 3].set(jnp.nan),
    lambda y: y.at[3, 3].set(jnp.inf),
  ],
  ids=["zeros", "rows_swapped", "last_row_lost", "scaled", "nan", "inf"],
)
def test_a_wrong_result_fails(broken, dtype):
  y = rounded(dtype)
  with pytest.raises(AssertionError):
    assert_accurate(broken(y), ORACLE, y)


def test_a_wrong_shape_or_dtype_of_baseline_fails():
  y = rounded(jnp.float32)
  with pytest.raises(AssertionError, match="lost"):
    assert_accurate(y[1:], ORACLE, None, err_msg="lost")
  with pytest.raises(AssertionError, match="baseline bfloat16"):
    assert_accurate(y, ORACLE, rounded(jnp.bfloat16))


def test_float64_is_held_to_twelve_digits(x64):
  y = jnp.asarray(ORACLE)
  assert_accurate(y * (1 + 1e-13), ORACLE, None)
  with pytest.raises(AssertionError):
    assert_accurate(y * (1 + 1e-11), ORACLE, None)


def test_of_several_orders_of_summation_the_worst_counts():
  y = rounded(jnp.float32)
  off = y.at[0, 0].add(1e-3)
  with pytest.raises(AssertionError, match="off by"):
    assert_accurate(off, ORACLE, [y, y])
  assert_accurate(off, ORACLE, [y, off])
