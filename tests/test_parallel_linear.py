"""parallel_linear: its calculus in float64, its accuracy in every dtype."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from scattermoe_jax import Routing, parallel_linear, route
from tests import oracle, plain, strategies
from tests.accuracy import assert_accurate
from tests.conftest import enable_x64
from tests.strategies import Case

CASE = Case(24, 3, 6, 20, 9)
LAYOUTS = [
  # (rows of x, grouped_out)
  (rows, grouped_out)
  for rows in ("tokens", "scattered", "grouped")
  for grouped_out in (False, True)
]


def operands(case, dtype, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  return {
    "x": {
      "tokens": normal(case.num_tokens, case.d),
      "scattered": normal(case.num_rows, case.d),
      "grouped": normal(case.num_rows, case.d),
    },
    "w": normal(case.num_experts, case.d, case.n),
    "bias": normal(case.num_experts, case.n),
  }


def cotangents(case, dtype):
  rng = np.random.default_rng(1)
  shape = (case.num_rows, case.n)
  return [jnp.asarray(rng.normal(size=shape), dtype) for _ in LAYOUTS]


def all_layouts(arrays, routing, **options):
  """Every layout's rows."""
  return [
    parallel_linear(
      arrays["x"][rows],
      arrays["w"],
      routing,
      bias=arrays["bias"],
      grouped_in=rows == "grouped",
      grouped_out=grouped_out,
      **options,
    )
    for rows, grouped_out in LAYOUTS
  ]


@functools.partial(jax.jit, static_argnums=0)
def values_and_grads(num_experts, arrays, ids, dy):
  """Each layout's (y, dx, dw, dbias)."""
  routing = route(ids, num_experts)
  results = []
  for (rows, grouped_out), dy_rows in zip(LAYOUTS, dy, strict=True):

    def layer(x, w, bias, rows=rows, grouped_out=grouped_out):
      return parallel_linear(
        x,
        w,
        routing,
        bias=bias,
        grouped_in=rows == "grouped",
        grouped_out=grouped_out,
        precision="highest",
      )

    y, vjp = jax.vjp(layer, arrays["x"][rows], arrays["w"], arrays["bias"])
    results.append((y, *vjp(dy_rows)))
  return results


@functools.partial(jax.jit, static_argnums=0)
def baselines(case, arrays, ids, dy):
  return [
    expected(plain, case, arrays, ids, dy_rows, *layout)
    for layout, dy_rows in zip(LAYOUTS, dy, strict=True)
  ]


def expected(truth, case, arrays, ids, dy, rows, grouped_out):
  """(y, dx, dw, dbias) of one layout by `oracle` or `plain`."""
  grouped_in = rows == "grouped"
  x, w, bias = arrays["x"][rows], arrays["w"], arrays["bias"]
  y = truth.scatter2scatter(
    x, w, ids, bias=bias, grouped_in=grouped_in, grouped_out=grouped_out
  )
  dx = truth.scatter2scatter(
    dy, w, ids, grouped_in=grouped_out, grouped_out=grouped_in, transpose_w=True
  )
  if rows == "tokens":
    dx = dx.reshape(case.num_tokens, case.top_k, case.d).sum(axis=1)
  xty = functools.partial(
    truth.group_xty, expert_ids=ids, num_experts=case.num_experts
  )
  ones = jnp.ones((case.num_rows, 1), w.dtype)
  dw = xty(x, dy, x_grouped=grouped_in, y_grouped=grouped_out)
  dbias = xty(ones, dy, y_grouped=grouped_out)[:, 0]
  return y, dx, dw, dbias


@pytest.mark.parametrize("pattern", strategies.PATTERNS)
def test_value_and_gradients_equal_the_oracle_in_float64(pattern, x64):
  ids = strategies.expert_ids(CASE, pattern)
  arrays, dy = operands(CASE, jnp.float64), cotangents(CASE, jnp.float64)
  got = values_and_grads(CASE.num_experts, arrays, ids, dy)
  for layout, results, dy_rows in zip(LAYOUTS, got, dy, strict=True):
    truth = expected(oracle, CASE, arrays, ids, dy_rows, *layout)
    for a, b in zip(results, truth, strict=True):
      assert_accurate(a, b, None, err_msg=str(layout))


def test_gradients_equal_finite_differences(x64):
  ids = strategies.expert_ids(CASE, "some_not_here")
  routing = route(jnp.asarray(ids), CASE.num_experts)
  check_grads(
    jax.jit(lambda arrays: all_layouts(arrays, routing)),
    (operands(CASE, jnp.float64),),
    order=1,
    modes=["rev"],
  )


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_dtype_is_as_accurate_as_plain_xla(dtype):
  ids = strategies.expert_ids(CASE, "skewed")
  arrays, dy = operands(CASE, dtype), cotangents(CASE, dtype)
  got = values_and_grads(CASE.num_experts, arrays, ids, dy)
  plain_xla = baselines(CASE, arrays, ids, dy)
  for layout, results, dy_rows, baseline in zip(
    LAYOUTS, got, dy, plain_xla, strict=True
  ):
    truth = expected(oracle, CASE, arrays, ids, dy_rows, *layout)
    for name, *trio in zip(
      ("y", "dx", "dw", "dbias"), results, truth, baseline, strict=True
    ):
      assert trio[0].dtype == dtype
      assert_accurate(*trio, err_msg=f"{name} {layout}")


def small_layer(dtype=jnp.float32):
  case = Case(8, 2, 4, 6, 5)
  ids = jnp.asarray(strategies.expert_ids(case, "skewed"))
  arrays = operands(case, dtype)
  return case, ids, arrays["x"]["tokens"], arrays["w"], arrays["bias"]


def test_residuals_are_x_w_and_the_ids():
  case, ids, x, w, bias = small_layer()
  routing = route(ids, case.num_experts)
  y, vjp = jax.vjp(
    lambda x, w, bias: parallel_linear(x, w, routing, bias=bias), x, w, bias
  )
  kept = sum(a.nbytes for a in jax.tree.leaves(vjp))
  id_bytes = 4 * (3 * case.num_rows + case.num_experts)
  assert kept == x.nbytes + w.nbytes + bias.nbytes + id_bytes
  assert y.nbytes > 0


def test_runs_under_vmap(x64):
  case, ids, x, w, bias = small_layer(jnp.float64)
  routing = route(ids, case.num_experts)

  def grads(x, w, routing):
    layer = lambda x, w: jnp.sum(
      jnp.sin(parallel_linear(x, w, routing, bias=bias))
    )
    return jax.grad(layer, argnums=(0, 1))(x, w)

  xs, ws = jnp.stack([x, 2 * x]), jnp.stack([w, -w])
  both_ids = jnp.stack([ids, ids[::-1]])
  routings = jax.vmap(lambda ids: route(ids, case.num_experts))(both_ids)
  batched = jax.jit(jax.vmap(grads))(xs, ws, routings)
  shared = jax.jit(jax.vmap(grads, in_axes=(0, None, None)))(xs, w, routing)
  one = jax.jit(grads)
  for i in range(2):
    alone = one(xs[i], ws[i], Routing(*(a[i] for a in routings)))
    for a, b in zip(batched, alone, strict=True):
      assert_accurate(a[i], b, None)
    for a, b in zip(shared, one(xs[i], w, routing), strict=True):
      assert_accurate(a[i], b, None)


def test_runs_under_scan_and_checkpoint(x64):
  case, ids, x, w, _ = small_layer(jnp.float64)
  routing = route(ids, case.num_experts)

  def layer(x, w):
    y = parallel_linear(x, w, routing)
    return x + y.reshape(case.num_tokens, -1)[:, : case.d]

  def by_scan(x, ws):
    return jnp.sum(jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0])

  def by_loop(x, ws):
    for w in ws:
      x = jax.checkpoint(layer)(x, w)
    return jnp.sum(x)

  ws = jnp.stack([w, -w])
  scanned = jax.jit(jax.grad(by_scan, argnums=(0, 1)))(x, ws)
  looped = jax.jit(jax.grad(by_loop, argnums=(0, 1)))(x, ws)
  for a, b in zip(scanned, looped, strict=True):
    assert_accurate(a, b, None)


def test_new_ids_do_not_retrace():
  case, ids, x, w, _ = small_layer()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def layer(x, w, ids):
    return parallel_linear(x, w, route(ids, case.num_experts))

  first = layer(x, w, ids)
  again = layer(x, w, ids)
  np.testing.assert_array_equal(first, again)  # bit for bit
  assert np.any(layer(x, w, ids[::-1]) != first)


def test_no_tokens_give_no_rows_and_no_gradient():
  w = jnp.ones((3, 4, 5))
  routing = route(jnp.zeros((0, 2), jnp.int32), 3)
  y, vjp = jax.vjp(
    lambda x, w: parallel_linear(x, w, routing), jnp.ones((0, 4)), w
  )
  assert y.shape == (0, 5)
  dx, dw = vjp(y)
  assert dx.shape == (0, 4)
  np.testing.assert_array_equal(dw, jnp.zeros_like(w))


def test_second_derivatives_are_refused():
  case, ids, x, w, _ = small_layer()
  routing = route(ids, case.num_experts)
  layer = lambda x: jnp.sum(jnp.sin(parallel_linear(x, w, routing)))
  with pytest.raises(
    NotImplementedError, match="parallel_linear: second derivatives are not"
  ):
    jax.grad(lambda x: jnp.sum(jax.grad(layer)(x) ** 2))(x)


def test_enable_x64_leaves_float32_alone():
  case, ids, x, w, bias = small_layer()
  layer = jax.jit(
    lambda x: parallel_linear(x, w, route(ids, case.num_experts), bias=bias)
  )
  expected = layer(x)
  with enable_x64():
    y = layer(x)
  assert y.dtype == jnp.float32
  np.testing.assert_array_equal(y, expected)
