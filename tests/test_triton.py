"""The Triton kernels, in the interpreter and by their pure parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import Problem, triton, xla
from scattermoe_jax.kernels.triton import tiles
from scattermoe_jax.ops.activations import get_activation
from scattermoe_jax.routing import route
from tests import oracle, plain, strategies
from tests.accuracy import assert_accurate
from tests.interpreted import CONFIG, triton_interpreted
from tests.strategies import Case

# Widths off the blocks of 16, one of them below; several tiles to an expert.
CASE = Case(num_tokens=23, top_k=3, num_experts=6, d=40, n=24, block_m=16)

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
PROBLEM = Problem(65536, 64, 2048, 1024, "bfloat16", H200)


def normal(*shape, dtype=jnp.float32, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def ids_of(pattern):
  return strategies.expert_ids(CASE, pattern)


def routing_of(ids):
  return route(jnp.asarray(ids), CASE.num_experts)


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scatter2scatter_equals_the_oracle_on_hard_routings(dtype, split_k):
  x = normal(CASE.num_tokens, CASE.d, dtype=dtype)
  w = normal(CASE.num_experts, CASE.d, CASE.n, dtype=dtype, seed=1)
  bias = normal(CASE.num_experts, CASE.n, dtype=dtype, seed=2)
  # One stage of 16 leaves a part of K whose last step lies past the end.
  config = tiles.TritonConfig(16, 16, 16, 2, 4, split_k)
  run = jax.jit(
    lambda ids: triton.scatter2scatter(
      x, w, routing_of(ids), bias=bias, config=config,
      interpret=True,
    )
  )  # fmt: skip
  for pattern in strategies.PATTERNS:
    ids = ids_of(pattern)
    assert_accurate(
      run(ids),
      oracle.scatter2scatter(x, w, ids, bias=bias),
      plain.scatter2scatter(x, w, jnp.asarray(ids), bias=bias),
      err_msg=pattern,
    )


@pytest.mark.parametrize("split_k", [1, 2])
def test_scatter2scatter_takes_every_layout(split_k):
  config = tiles.TritonConfig(16, 16, 16, 2, 4, split_k)
  ids = ids_of("some_not_here")
  w = normal(CASE.num_experts, CASE.n, CASE.d, seed=1)
  for grouped_in, grouped_out in ((0, 1), (1, 0), (1, 1)):
    x = normal(CASE.num_rows, CASE.d)
    layout = dict(
      grouped_in=bool(grouped_in), grouped_out=bool(grouped_out),
      transpose_w=True,
    )  # fmt: skip
    y = triton.scatter2scatter(
      x, w, routing_of(ids), **layout, config=config,
      interpret=True,
    )  # fmt: skip
    assert_accurate(
      y,
      oracle.scatter2scatter(x, w, ids, **layout),
      plain.scatter2scatter(x, w, ids, **layout),
      err_msg=str(layout),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_group_xty_equals_the_oracle_on_hard_routings(dtype):
  x = normal(CASE.num_tokens, CASE.d, dtype=dtype)
  y = normal(CASE.num_rows, 8, dtype=dtype, seed=1)
  run = jax.jit(
    lambda ids: triton.group_xty(
      x, y, routing_of(ids), y_grouped=True, config=CONFIG,
      interpret=True,
    )
  )  # fmt: skip
  for pattern in strategies.PATTERNS:
    ids = ids_of(pattern)
    args = x, y, ids, CASE.num_experts
    assert_accurate(
      run(ids),
      oracle.group_xty(*args, y_grouped=True),
      plain.group_xty(*args, y_grouped=True),
      err_msg=pattern,
    )


def test_rows_of_no_group_are_zero_whatever_they_hold():
  ids = ids_of("some_not_here")
  order = oracle.grouped_order(ids, CASE.num_experts)
  here = np.isin(ids.reshape(-1)[order], np.arange(CASE.num_experts))
  x = jnp.where(here[:, None], normal(CASE.num_rows, CASE.d), jnp.nan)
  w = normal(CASE.num_experts, CASE.d, CASE.n, seed=1)
  backend = triton_interpreted()
  routing = routing_of(ids)
  y = backend.scatter2scatter(x, w, routing, grouped_in=True, grouped_out=True)
  assert np.all(np.isfinite(y)) and not np.any(y[~here]) and np.all(y[here])
  xty = backend.group_xty(x, y, routing, x_grouped=True, y_grouped=True)
  assert np.all(np.isfinite(xty))


def test_a_neighbours_nan_stays_with_its_expert():
  ids = ids_of("ends_off_block_edges")
  order = oracle.grouped_order(ids, CASE.num_experts)
  of_first = ids.reshape(-1)[order] == 0
  x = jnp.where(of_first[:, None], jnp.nan, normal(CASE.num_rows, CASE.d))
  y = normal(CASE.num_rows, CASE.n, seed=1)
  routing = routing_of(ids)
  xty = triton_interpreted().group_xty(
    x, y, routing, x_grouped=True, y_grouped=True
  )
  assert np.all(np.isnan(xty[0])) and np.all(np.isfinite(xty[1:]))


def test_parts_of_the_contraction_sum_the_same_every_time():
  ids = ids_of("skewed")
  x = normal(CASE.num_tokens, CASE.d)
  w = normal(CASE.num_experts, CASE.d, CASE.n, seed=1)
  config = tiles.TritonConfig(16, 16, 16, 2, 4, split_k=3)
  backend = triton_interpreted(config)
  routing = routing_of(ids)
  first, again = (backend.scatter2scatter(x, w, routing) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert_accurate(
    first,
    oracle.scatter2scatter(x, w, ids),
    plain.scatter2scatter(x, w, ids),
  )


def test_fused_forms_equal_those_of_xla():
  ids = ids_of("some_not_here")
  routing = routing_of(ids)
  activation = get_activation("silu", gated=True)
  x = normal(CASE.num_tokens, CASE.d)
  w_in = normal(CASE.num_experts, CASE.d, 2 * CASE.n, seed=1)
  w_out = normal(CASE.num_experts, CASE.n, CASE.d, seed=2)
  gates = normal(CASE.num_rows, seed=3)
  results = []
  for backend in (triton_interpreted(), xla):
    h, a = backend.up_projection(
      x, w_in, routing, bias=None, activation=activation, keep_h=True
    )
    results.append(
      (h, a)
      + backend.down_projection_grad(
        x, w_out, h, gates, routing, activation=activation
      )
    )
  for got, want in zip(*results, strict=True):
    np.testing.assert_allclose(
      got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max()
    )


def test_vmap_equals_a_loop():
  ids = np.stack([ids_of("skewed"), ids_of("some_not_here")])
  x = normal(2, CASE.num_tokens, CASE.d)
  w = normal(CASE.num_experts, CASE.d, CASE.n, seed=1)
  backend = triton_interpreted()

  def both(x, ids):
    routing = routing_of(ids)
    y = backend.scatter2scatter(x, w, routing, grouped_out=True)
    return y, backend.group_xty(x, y, routing, y_grouped=True)

  batched = jax.vmap(both)(x, ids)
  for i in range(2):
    for got, want in zip(batched, both(x[i], ids[i]), strict=True):
      np.testing.assert_array_equal(got[i], want)


def test_no_tokens_no_rows():
  routing = route(jnp.zeros((0, 2), jnp.int32), 3)
  x, w = jnp.ones((0, 4)), jnp.ones((3, 4, 5))
  backend = triton_interpreted()
  assert backend.scatter2scatter(x, w, routing).shape == (0, 5)
  assert not np.any(backend.group_xty(x, x, routing))


@pytest.mark.parametrize(
  "change, reason",
  [
    (dict(dtype="float64"), "float64"),
    (dict(device=Device("cpu", "cpu")), "NVIDIA GPU"),
    (dict(device=Device("gpu", "Tesla T4", (7, 5), 40)), "7.5"),
    (dict(device=Device("gpu", "AMD", None, 304)), "capability"),
  ],
)
def test_check_says_why_not(change, reason):
  assert triton.check(PROBLEM) is None
  assert reason in triton.check(PROBLEM._replace(**change))


def test_check_says_when_jax_has_no_triton(monkeypatch):
  monkeypatch.setattr(triton, "has_pallas_triton", lambda: False)
  assert "no Pallas-Triton" in triton.check(PROBLEM)


CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_blocks_fit_the_device(capability):
  widths = (1, 8, 100, 256, 600, 2048, 14336)
  for itemsize in (2, 4):
    for rows, experts in ((1, 1), (8, 128), (512, 8), (4096, 128), (10**6, 8)):
      for d_in in widths:
        for d_out in widths:
          configs = (
            tiles.scatter2scatter_config(
              rows, experts, d_in, d_out, itemsize,
              capability=capability, num_cores=100,
            ),
            tiles.group_xty_config(
              d_in, d_out, itemsize, capability=capability
            ),
          )  # fmt: skip
          for config in configs:
            assert tiles.shared_bytes(config, itemsize) <= tiles.shared_limit(
              capability
            )
            assert config.num_stages >= 2
            for block in (config.block_m, config.block_n, config.block_k):
              assert block >= 16 and block & (block - 1) == 0
