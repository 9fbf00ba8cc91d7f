"""combine: the weighted sum of each token's rows, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from scattermoe_jax import combine, route
from scattermoe_jax.kernels import composed, sum_choices
from tests import oracle, strategies
from tests.accuracy import assert_accurate
from tests.strategies import Case

pytestmark = pytest.mark.optimised

CASE = Case(12, 3, 5, 7, 1)

run = jax.jit(
  lambda y, gates, ids: combine(y, gates, route(ids, CASE.num_experts))
)


def operands(dtype, gates_dtype=None):
  rng = np.random.default_rng(0)
  y = jnp.asarray(rng.normal(size=(CASE.num_rows, CASE.d)), dtype)
  gates = jnp.asarray(
    rng.normal(size=(CASE.num_tokens, CASE.top_k)), gates_dtype or dtype
  )
  return y, gates


@pytest.mark.parametrize("pattern", strategies.PATTERNS)
def test_combine_equals_the_oracle_in_float64(pattern, x64):
  # y holds something in the rows of no group: it must not be added.
  y, gates = operands(jnp.float64)
  ids = strategies.expert_ids(CASE, pattern)
  truth = oracle.combine(y, gates, ids, CASE.num_experts)
  assert_accurate(run(y, gates, ids), truth, None)


def test_gradients_equal_finite_differences(x64):
  ids = jnp.asarray(strategies.expert_ids(CASE, "some_not_here"))
  routing = route(ids, CASE.num_experts)
  layer = jax.jit(lambda y, gates: combine(y, gates, routing))
  check_grads(layer, operands(jnp.float64), order=1, modes=["rev"])


def test_nothing_leaks_from_rows_of_no_group():
  ids = jnp.asarray([[0, -1], [5, 1]])
  routing = route(ids, 2)
  y = jnp.asarray([[1.0], [2.0], [jnp.nan], [jnp.inf]])
  gates = jnp.ones((2, 2))
  out, vjp = jax.vjp(lambda y, gates: combine(y, gates, routing), y, gates)
  np.testing.assert_array_equal(out, [[1.0], [2.0]])
  dy, dgates = vjp(jnp.ones_like(out))
  np.testing.assert_array_equal(dy, [[1.0], [1.0], [0.0], [0.0]])
  np.testing.assert_array_equal(dgates, [[1.0, 0.0], [0.0, 2.0]])


def test_nothing_leaks_from_gates_of_no_group():
  ids = jnp.asarray([[0, -1], [5, 1]])
  routing = route(ids, 2)
  y = jnp.asarray([[1.0], [2.0], [3.0], [4.0]])
  gates = jnp.asarray([[1.0, jnp.nan], [jnp.inf, 1.0]])
  out, vjp = jax.vjp(lambda y, gates: combine(y, gates, routing), y, gates)
  np.testing.assert_array_equal(out, [[1.0], [2.0]])
  dy, dgates = vjp(jnp.ones_like(out))
  np.testing.assert_array_equal(dy, [[1.0], [1.0], [0.0], [0.0]])
  np.testing.assert_array_equal(dgates, [[1.0, 0.0], [0.0, 2.0]])


@pytest.mark.parametrize("gates_dtype", [jnp.bfloat16, jnp.float32])
def test_sums_are_kept_in_float32(gates_dtype):
  y, gates = operands(jnp.bfloat16, gates_dtype)
  ids = strategies.expert_ids(CASE, "even")
  got = run(y, gates, ids)
  assert got.dtype == jnp.bfloat16
  truth = oracle.combine(y, gates, ids, CASE.num_experts)
  assert_accurate(got, truth, None)


def test_the_order_of_the_sum_is_fixed():
  y, gates = operands(jnp.float32)
  ids = strategies.expert_ids(CASE, "skewed")
  np.testing.assert_array_equal(run(y, gates, ids), run(y, gates, ids))


def test_sum_choices_is_combine_with_gates_of_one(x64):
  y, gates = operands(jnp.float64)
  ids = jnp.asarray(strategies.expert_ids(CASE, "skewed"))
  routing = route(ids, CASE.num_experts)
  ones = combine(y, jnp.ones_like(gates), routing)
  assert_accurate(sum_choices(y, routing), ones, None)


def test_combine_calls_what_is_wrong_by_its_name(unchecked):
  routing = route(jnp.zeros((3, 1), jnp.int32), 1)
  with pytest.raises(TypeError, match="combine: y must be"):
    combine(jnp.ones((3, 2), jnp.int32), jnp.ones((3, 1)), routing)


def test_no_tokens_combine_to_no_rows():
  routing = route(jnp.zeros((0, 2), jnp.int32), 3)
  assert combine(jnp.ones((0, 4)), jnp.ones((0, 2)), routing).shape == (0, 4)


def test_second_derivatives_are_refused():
  y, gates = operands(jnp.float32)
  ids = jnp.asarray(strategies.expert_ids(CASE, "even"))
  routing = route(ids, CASE.num_experts)
  loss = lambda gates: jnp.sum(combine(y, gates, routing) ** 2)
  with pytest.raises(NotImplementedError, match="combine: second derivatives"):
    jax.grad(lambda gates: jnp.sum(jax.grad(loss)(gates)))(gates)


def test_gates_of_choices_not_here_are_zero_whatever_they_hold():
  ids = jnp.array([[0, 2], [2, 1]], jnp.int32)
  routing = route(ids, 2)
  gates = jnp.array([[0.25, jnp.nan], [jnp.inf, 0.75]], jnp.float32)
  here = composed.gates_here(gates, routing)
  assert here.tolist() == [[0.25, 0.0], [0.0, 0.75]]
  # Grouped: of each expert one, then those of none.
  rows = composed.gates_of_rows(gates, routing)
  assert rows.tolist() == [0.25, 0.75, 0.0, 0.0]
