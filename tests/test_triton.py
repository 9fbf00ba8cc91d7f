"""The Triton kernels, in the interpreter and by their pure parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import Columns, Problem, triton, xla
from scattermoe_jax.kernels.triton import tiles
from scattermoe_jax.routing import route
from tests import oracle, plain, strategies
from tests.accuracy import assert_accurate
from tests.interpreted import CONFIG, triton_interpreted
from tests.strategies import Case

pytestmark = pytest.mark.optimised

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


@pytest.mark.parametrize(
  "num_programs, grouped_in, grouped_out",
  [(1, True, True), (3, False, True), (7, True, False), (40, False, False)],
)
def test_programs_that_walk_equal_a_program_per_tile(
  num_programs, grouped_in, grouped_out
):
  x = normal(CASE.num_rows if grouped_in else CASE.num_tokens, CASE.d)
  w = normal(CASE.num_experts, CASE.d, CASE.n, seed=1)
  bias = normal(CASE.num_experts, CASE.n, seed=2)

  @functools.partial(jax.jit, static_argnums=1)
  def run(ids, config):
    return triton.scatter2scatter(
      x, w, routing_of(ids), bias=bias, grouped_in=grouped_in,
      grouped_out=grouped_out, config=config, interpret=True,
    )  # fmt: skip

  walks = dataclasses.replace(CONFIG, num_programs=num_programs)
  for pattern in strategies.PATTERNS:
    ids = ids_of(pattern)
    want = np.asarray(run(ids, CONFIG))
    assert np.any(want) == (pattern != "none_here")
    np.testing.assert_array_equal(run(ids, walks), want, err_msg=pattern)


@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize(
  "changes",
  [{}, {"split_k": 2}, {"num_programs": 3}],
  ids=["single", "parts", "walk"],
)
def test_slices_of_columns_end_within_a_tile(changes, transpose_w):
  # Of each slice's 20 columns, 4 are in a tile of 16 that the next one begins.
  width, num_slices = 20, 3
  x = normal(CASE.num_tokens, CASE.d)
  w = normal(CASE.num_experts, CASE.d, num_slices * width, seed=1)
  bias = normal(CASE.num_experts, num_slices * width, seed=2)
  ids = ids_of("some_not_here")
  config = dataclasses.replace(CONFIG, **changes)

  @jax.jit
  def run(i):
    return triton.scatter2scatter(
      x, w.swapaxes(1, 2) if transpose_w else w, routing_of(ids), bias=bias,
      transpose_w=transpose_w, columns=Columns(i, width), config=config,
      interpret=True,
    )  # fmt: skip

  for i in range(num_slices):
    columns = slice(i * width, (i + 1) * width)
    assert_accurate(
      run(jnp.int32(i)),
      oracle.scatter2scatter(x, w, ids, bias=bias)[:, columns],
      plain.scatter2scatter(x, w, jnp.asarray(ids), bias=bias)[:, columns],
      err_msg=str(i),
    )


@pytest.mark.parametrize("layout", ["grouped", "scattered"])
def test_a_decode_step_finds_its_tiles_without_a_schedule(layout):
  case = Case(num_tokens=9, top_k=3, num_experts=32, d=40, n=24)
  x = normal(case.num_tokens, case.d)
  w = normal(case.num_experts, case.d, case.n, seed=1)
  grouped_out = layout == "grouped"

  @jax.jit
  def run(ids):
    return triton.scatter2scatter(
      x, w, route(ids, case.num_experts), grouped_out=grouped_out,
      config=CONFIG, interpret=True,
    )  # fmt: skip

  for pattern in strategies.PATTERNS:
    ids = strategies.expert_ids(case, pattern)
    assert_accurate(
      run(ids),
      oracle.scatter2scatter(x, w, ids, grouped_out=grouped_out),
      plain.scatter2scatter(x, w, jnp.asarray(ids), grouped_out=grouped_out),
      err_msg=pattern,
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
  of_second = ids.reshape(-1)[order] == 1
  x = jnp.where(of_second[:, None], jnp.nan, normal(CASE.num_rows, CASE.d))
  y = normal(CASE.num_rows, CASE.n, seed=1)
  routing = routing_of(ids)
  xty = triton_interpreted().group_xty(
    x, y, routing, x_grouped=True, y_grouped=True
  )
  is_nan = np.isnan(xty).all(axis=(1, 2))
  np.testing.assert_array_equal(is_nan, np.arange(CASE.num_experts) == 1)
  assert np.isfinite(xty).sum() == 5 * CASE.d * CASE.n


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


def test_vmap_equals_a_loop():
  ids = np.stack([ids_of("skewed"), ids_of("some_not_here")])
  x = normal(2, CASE.num_tokens, CASE.d)
  w = normal(CASE.num_experts, CASE.d, CASE.n, seed=1)
  backend = triton_interpreted()

  @jax.jit
  def both(x, ids):
    routing = routing_of(ids)
    y = backend.scatter2scatter(x, w, routing, grouped_out=True)
    return y, backend.group_xty(x, y, routing, y_grouped=True)

  batched = jax.vmap(both)(x, ids)
  for i in range(2):
    for got, want in zip(batched, both(x[i], ids[i]), strict=True):
      np.testing.assert_array_equal(got[i], want)


def test_vmap_over_slices_equals_a_loop():
  x = normal(CASE.num_tokens, CASE.d)
  w = normal(CASE.num_experts, CASE.d, CASE.n, seed=1)
  routing = routing_of(ids_of("skewed"))
  backend = triton_interpreted()

  def slice_of(i):
    return backend.scatter2scatter(x, w, routing, columns=Columns(i, 8))

  slices = jax.vmap(slice_of)(jnp.arange(3, dtype=jnp.int32))
  want = backend.scatter2scatter(x, w, routing)
  for i in range(3):
    np.testing.assert_array_equal(slices[i], slice_of(i))
    np.testing.assert_allclose(slices[i], want[:, 8 * i :][:, :8], rtol=1e-5)


def test_float32_stays_32_bit_where_jax_has_64(x64):
  case = Case(num_tokens=9, top_k=3, num_experts=32, d=40, n=24)
  ids = strategies.expert_ids(case, "skewed")
  x = normal(case.num_tokens, case.d)
  w = normal(case.num_experts, case.d, case.n, seed=1)
  routing = route(jnp.asarray(ids), case.num_experts)
  backend = triton_interpreted()
  y = backend.scatter2scatter(x, w, routing)
  xty = backend.group_xty(x, y, routing)
  assert y.dtype == xty.dtype == jnp.float32
  assert_accurate(
    xty,
    oracle.group_xty(x, y, ids, case.num_experts),
    xla.group_xty(x, y, routing),
  )


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


def rows_held(config):
  """Returns the config with as many stages as it holds steps of rows."""
  return dataclasses.replace(config, num_stages=(config.num_stages + 1) // 2)


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
              capability=capability, num_cores=100, grouped_in=True,
            ),
            tiles.scatter2scatter_config(
              rows, experts, d_in, d_out, itemsize,
              capability=capability, num_cores=100,
            ),
            tiles.group_xty_config(
              d_in, d_out, itemsize, capability=capability
            ),
            rows_held(
              tiles.group_xty_config(
                d_in, d_out, itemsize, capability=capability, is_gathered=True
              )
            ),
          )  # fmt: skip
          for config in configs:
            assert tiles.shared_bytes(config, itemsize) <= tiles.shared_limit(
              capability
            )
            assert config.num_stages >= 2
            for block in (config.block_m, config.block_n, config.block_k):
              assert block >= 16 and block & (block - 1) == 0


def config_of(rows, experts, d_in, d_out, itemsize=2, **changes):
  device = dict(capability=(9, 0), num_cores=132) | changes
  return tiles.scatter2scatter_config(
    rows, experts, d_in, d_out, itemsize, **device
  )


def test_weight_gradients_have_wide_tiles_where_they_fit():
  config = functools.partial(tiles.group_xty_config, 4096, 2048, 2)
  wide = tiles.TritonConfig(128, 256, 64, 3, 8)
  assert config(capability=(9, 0)) == wide
  # Ids and rows are loaded in stages of their own.
  gathered = config(capability=(9, 0), is_gathered=True)
  assert gathered == dataclasses.replace(wide, num_stages=6)
  narrow = tiles.TritonConfig(128, 128, 64, 6, 4)
  assert config(capability=(8, 9), is_gathered=True) == narrow


def test_programs_walk_where_there_are_many_large_tiles():
  large = config_of(2**18, 128, 4096, 2048)
  assert large == tiles.TritonConfig(128, 256, 64, 4, 8, 1, num_programs=132)
  few = config_of(2**12, 16, 4096, 2048)
  assert few == dataclasses.replace(large, num_stages=3, num_programs=None)
  # A core holds two of float32's tiles, or none waits for the other.
  assert config_of(2**18, 128, 4096, 2048, 4).num_programs is None
  for num_tokens in (1, 8, 64, 512):
    rows = num_tokens * 8
    assert config_of(rows, 128, 4096, 2048).num_programs is None


def test_about_32_rows_are_gathered_into_wide_tiles():
  wide = tiles.TritonConfig(64, 256, 64, 2, 4)
  narrow = tiles.TritonConfig(64, 128, 64, 4, 4)
  assert config_of(4096, 128, 4096, 2048) == wide
  assert config_of(4096, 128, 1024, 4096, grouped_in=True) == narrow
  assert config_of(4096, 128, 4096, 1024) == narrow
  assert config_of(512, 128, 4096, 2048).block_n == 128


@pytest.mark.gpu
def test_programs_that_walk_equal_a_program_per_tile_on_the_device():
  # A hundred tiles an expert, some rows with nobody.
  case = Case(4096, 4, 8, 512, 520)
  x = normal(case.num_tokens, case.d, dtype="bfloat16")
  w = normal(case.num_experts, case.d, case.n, dtype="bfloat16", seed=1)
  single = tiles.TritonConfig(128, 256, 64, 3, 8)
  walks = dataclasses.replace(single, num_programs=132)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def run(ids, grouped_out, config):
    routing = route(ids, case.num_experts)
    return triton.scatter2scatter(
      x, w, routing, grouped_out=grouped_out, config=config
    )

  for pattern in ("even", "skewed", "some_not_here"):
    ids = jnp.asarray(strategies.expert_ids(case, pattern))
    for grouped_out in (False, True):
      np.testing.assert_array_equal(
        run(ids, grouped_out, walks), run(ids, grouped_out, single), pattern
      )


@pytest.mark.gpu
def test_precision_decides_the_error_of_float32():
  ids = strategies.expert_ids(CASE, "skewed")
  x = normal(CASE.num_tokens, 512)
  w = normal(CASE.num_experts, 512, 96, seed=1)
  want = oracle.scatter2scatter(x, w, ids)
  error = {}
  for precision in (None, jax.lax.Precision.HIGHEST):
    y = triton.scatter2scatter(x, w, routing_of(ids), precision=precision)
    error[precision] = np.abs(np.asarray(y) - want).max() / np.abs(want).max()
  assert error[jax.lax.Precision.HIGHEST] < 2e-6 < 1e-5 < error[None] < 2e-3


@pytest.mark.gpu
def test_products_repeat_to_the_bit():
  case = Case(4096, 4, 32, 512, 256)
  ids = jnp.asarray(strategies.expert_ids(case, "skewed"))
  x = normal(case.num_tokens, case.d, dtype="bfloat16")
  w = normal(case.num_experts, case.d, case.n, dtype="bfloat16", seed=1)

  @jax.jit
  def run(x, w, ids):
    routing = route(ids, case.num_experts)
    y = triton.scatter2scatter(x, w, routing, grouped_out=True)
    return y, triton.group_xty(x, y, routing, y_grouped=True)

  first = run(x, w, ids)
  for _ in range(5):
    for got, want in zip(run(x, w, ids), first, strict=True):
      np.testing.assert_array_equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", [
  Case(300, 3, 8, 600, 100),
  Case(1, 2, 8, 600, 8),
  Case(2000, 2, 4, 256, 256),
], ids=str)  # fmt: skip
def test_odd_shapes_on_the_device(case, dtype):
  x = normal(case.num_tokens, case.d, dtype=dtype)
  w = normal(case.num_experts, case.d, case.n, dtype=dtype, seed=1)
  for pattern in ("even", "skewed", "some_not_here"):
    ids = strategies.expert_ids(case, pattern)
    routing = route(jnp.asarray(ids), case.num_experts)
    y = triton.scatter2scatter(x, w, routing)
    assert_accurate(
      y,
      oracle.scatter2scatter(x, w, ids),
      xla.scatter2scatter(x, w, routing),
      err_msg=pattern,
    )
    args = x, y, ids, case.num_experts
    assert_accurate(
      triton.group_xty(x, y, routing),
      oracle.group_xty(*args),
      xla.group_xty(x, y, routing),
      err_msg=pattern,
    )
