"""Ids: sorted, counted, inverted, the same bits every time."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import routing
from scattermoe_jax._compat import Device
from tests import oracle, strategies

route = jax.jit(routing.route, static_argnums=1)


@hypothesis.given(strategies.routings())
def test_route_is_the_stable_sort(drawn):
  case, ids = drawn
  got = route(ids, case.num_experts)
  order = oracle.grouped_order(ids, case.num_experts)
  np.testing.assert_array_equal(got.scattered_ids, order)
  here = (ids >= 0) & (ids < case.num_experts)
  flat = np.where(here, ids, case.num_experts).reshape(-1)
  np.testing.assert_array_equal(got.expert_ids, flat[order])
  np.testing.assert_array_equal(
    got.group_sizes, np.bincount(ids[here], minlength=case.num_experts)
  )
  np.testing.assert_array_equal(
    got.grouped_ids.reshape(-1)[order], np.arange(case.num_rows)
  )


@hypothesis.given(strategies.routings())
def test_every_grouped_row_reads_the_row_of_its_token(drawn):
  case, ids = drawn
  got = route(ids, case.num_experts)
  order = oracle.grouped_order(ids, case.num_experts)
  num_rows = case.num_rows
  shared = routing.input_rows(got, case.num_tokens, grouped=False)
  np.testing.assert_array_equal(shared, order // case.top_k)
  own = routing.input_rows(got, num_rows, grouped=False)
  np.testing.assert_array_equal(own, order)
  in_order = routing.input_rows(got, num_rows, grouped=True)
  np.testing.assert_array_equal(in_order, np.arange(num_rows))


def test_group_offsets_are_the_exclusive_sum():
  got = route(jnp.array([[2, 0], [2, 2], [0, 3]]), 4)
  assert routing.group_offsets(got).tolist() == [0, 2, 2, 5, 6]


def test_sizes_are_read_off_the_routing():
  got = route(jnp.zeros((5, 3), jnp.int32), 7)
  assert (got.num_tokens, got.top_k, got.num_rows, got.num_experts) == (
    5,
    3,
    15,
    7,
  )
  assert all(a.dtype == jnp.int32 for a in got)


@pytest.mark.parametrize("num_rows", [0, 1, 13, 1000])
def test_both_sorts_agree(num_rows):
  # A GPU counts where rows are few: the same ids.
  flat_ids = np.random.default_rng(0).integers(0, 12, num_rows)
  flat_ids[::7] = 11  # "not here"
  flat_ids = jnp.asarray(flat_ids, jnp.int32)
  counted = jax.jit(routing._counting_sort, static_argnums=1)(flat_ids, 11)
  compared = routing._comparison_sort(flat_ids, 11)
  for got, expected in zip(counted, compared, strict=True):
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("num_experts", [127, 128, 255, 256, 65535, 65536])
def test_nowhere_is_a_key_of_its_own(num_experts):
  # Sorted by a key of one or two bytes where E, for "not here", fits as well.
  last = num_experts - 1
  ids = jnp.asarray([[0, num_experts], [last, 0], [num_experts, last]])
  got = route(ids, num_experts)
  assert got.expert_ids.tolist() == [0, 0, last, last] + 2 * [num_experts]
  assert got.group_sizes[::last].tolist() == [2, 2]


def test_route_as_on_a_gpu_is_the_same(monkeypatch):
  ids = jnp.asarray(np.random.default_rng(0).integers(-1, 5, (3, 6, 2)))
  batched = jax.vmap(functools.partial(routing.route, num_experts=4))
  expected = batched(ids)
  gpu = Device("gpu", "NVIDIA H200", (9, 0), 132)
  monkeypatch.setattr(routing, "current_device", lambda: gpu)
  for a, b in zip(expected, batched(ids), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64"])
def test_any_integer_dtype_routes_the_same(dtype, x64):
  # 200 experts do not fit int8; a negative id wraps in none.
  ids = np.array([[0, 100], [127, 3], [3, 100]])
  expected = route(jnp.asarray(ids, jnp.int32), 200)
  got = route(jnp.asarray(ids, dtype), 200)
  for a, b in zip(expected, got, strict=True):
    assert b.dtype == jnp.int32
    np.testing.assert_array_equal(a, b)


def test_ids_beyond_int32_are_not_here(x64):
  ids = jnp.array([[2**32, 1], [0, -(2**40)]], jnp.int64)
  assert route(ids, 2).group_sizes.tolist() == [1, 1]


def test_ids_beyond_int32_are_local_nowhere(x64):
  ids = jnp.array([[2**32 + 2, 3], [2, 2**32 + 3]], jnp.int64)
  assert routing.route_local(ids, 2, 2).group_sizes.tolist() == [1, 1]


def test_route_local_says_what_is_wrong(unchecked):
  with pytest.raises(
    TypeError, match="route_local: expert_ids must be an array"
  ):
    routing.route_local([[0, 1]], 0, 2)
  with pytest.raises(
    TypeError, match="route_local: expert_ids must be integers"
  ):
    routing.route_local(jnp.ones((2, 2)), 0, 2)


def test_no_tokens_make_an_empty_routing():
  got = route(jnp.zeros((0, 2), jnp.int32), 3)
  assert got.grouped_ids.shape == (0, 2)
  assert got.group_sizes.tolist() == [0, 0, 0]


def test_route_batches_under_vmap():
  ids = np.random.default_rng(0).integers(0, 4, (3, 5, 2))
  batched = jax.vmap(functools.partial(routing.route, num_experts=4))(
    jnp.asarray(ids)
  )
  for i in range(3):
    for one, many in zip(route(ids[i], 4), batched, strict=True):
      np.testing.assert_array_equal(one, many[i])


@pytest.mark.parametrize(
  ("ids", "num_experts", "error", "message"),
  [
    (
      np.zeros((2, 2), np.float32),
      4,
      TypeError,
      r"route: expert_ids must be integers, got float32; pass .*top_k",
    ),
    (
      np.zeros(4, np.int32),
      4,
      ValueError,
      r"route: expert_ids must have shape \(T, k\), got \(4,\); flatten",
    ),
    (
      np.zeros((2, 2, 2), np.int32),
      4,
      ValueError,
      r"route: expert_ids must have shape \(T, k\), got \(2, 2, 2\)",
    ),
    (
      np.zeros((2, 5), np.int32),
      4,
      ValueError,
      r"route: k = 5 experts per token, but there are only num_experts = 4",
    ),
    (
      np.zeros((2, 0), np.int32),
      0,
      ValueError,
      r"route: num_experts must be at least 1, got 0",
    ),
  ],
  ids=["floats", "one_axis", "three_axes", "k_above_E", "no_experts"],
)
def test_route_says_what_is_wrong(ids, num_experts, error, message, unchecked):
  with pytest.raises(error, match=message):
    routing.route(jnp.asarray(ids), num_experts)


def test_route_wants_a_number_of_experts_that_is_static(unchecked):
  ids = jnp.zeros((2, 2), jnp.int32)
  message = "route: num_experts must be a static int,.*functools.partial"
  for num_experts in (4.0, None):
    with pytest.raises(TypeError, match=message):
      routing.route(ids, num_experts)
  with pytest.raises(TypeError, match=message):
    jax.jit(routing.route)(ids, 4)
  for num_experts in (4, np.int64(4)):
    assert jax.jit(routing.route, static_argnums=1)(ids, num_experts)


def test_route_wants_an_array(unchecked):
  message = "route: expert_ids must be an array of integers, got a list"
  with pytest.raises(TypeError, match=message):
    routing.route([[0, 1]], 4)
