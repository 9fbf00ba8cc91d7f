"""The Hopper grouped matmul: interpreted and lowered here, without a GPU.

What the interpreter cannot run, the copies of gathered rows, is exchanged
behind the seam of `interpreted_mosaic`. On a GPU the kernels themselves run in
`test_backends.py`, with every other backend.
"""

import builtins
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import scattermoe_jax as sm
from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import Columns, Problem, mosaic, tuning, xla
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.mosaic import lowering
from scattermoe_jax.kernels.mosaic.lowering import lowers
from scattermoe_jax.kernels.schedule import window_schedule
from scattermoe_jax.ops.activations import Activation, get_activation
from scattermoe_jax.routing import route
from tests.accuracy import assert_accurate
from tests.hopper import lowered

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
PROBLEM = Problem(4096, 8, 1024, 512, "bfloat16", H200)

needs_mosaic = pytest.mark.skipif(
  mosaic.missing_feature() is not None, reason=str(mosaic.missing_feature())
)

# 3 experts over windows of 128 rows: two groups share a window's start, and
# a fifth of the choices are not here.
NUM_TOKENS, TOP_K, NUM_EXPERTS, D, N = 70, 2, 3, 128, 128


def normal(rng, *shape):
  return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)


def routing_and_rng():
  rng = np.random.default_rng(0)
  ids = np.argsort(rng.random((NUM_TOKENS, NUM_EXPERTS)), axis=1)[:, :TOP_K]
  ids = np.where(rng.random(ids.shape) < 0.2, NUM_EXPERTS, ids)
  return route(jnp.asarray(ids, jnp.int32), NUM_EXPERTS), rng


def assert_equals_xla(name, got, *args, **options):
  """Asserts a backend function's results against xla's in float32."""
  wide = jax.tree.map(
    lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, args
  )
  function = getattr(xla, name)
  oracle, baseline = function(*wide, **options), function(*args, **options)
  for part, (g, o, b) in enumerate(
    zip(*map(jax.tree.leaves, (got, oracle, baseline)), strict=True)
  ):
    assert_accurate(g, o, b, err_msg=f"{name} {part}")


@needs_mosaic
@pytest.mark.parametrize(
  "grouped_in, grouped_out, transpose_w",
  [
    (False, True, False),
    pytest.param(True, True, True, marks=pytest.mark.slow),
    pytest.param(False, False, True, marks=pytest.mark.slow),
    pytest.param(True, False, False, marks=pytest.mark.slow),
  ],
)
def test_scatter2scatter_interpreted(grouped_in, grouped_out, transpose_w):
  from tests.interpreted_mosaic import mosaic_interpreted

  routing, rng = routing_and_rng()
  x = normal(rng, NUM_TOKENS * (TOP_K if grouped_in else 1), D)
  columns = N + 64  # The last tile of columns is half a block.
  w = normal(rng, NUM_EXPERTS, *((columns, D) if transpose_w else (D, columns)))
  options = dict(
    bias=normal(rng, NUM_EXPERTS, columns),
    grouped_in=grouped_in,
    grouped_out=grouped_out,
    transpose_w=transpose_w,
  )
  backend = mosaic_interpreted()
  got = backend.scatter2scatter(x, w, routing, **options)
  assert_equals_xla("scatter2scatter", got, x, w, routing, **options)


@needs_mosaic
@pytest.mark.parametrize(
  "grouped_in, transpose_w, width",
  [
    # Of each slice's columns, 64 are half a tile; the next slice's follow.
    (True, False, N + 64),
    pytest.param(True, True, N + 64, marks=pytest.mark.slow),
    pytest.param(False, False, N, marks=pytest.mark.slow),
    # No whole number of the tensor core's tiles: the slice is copied.
    pytest.param(True, False, 40, marks=pytest.mark.slow),
  ],
)
def test_slices_of_columns_interpreted(grouped_in, transpose_w, width):
  from tests.interpreted_mosaic import mosaic_interpreted

  routing, rng = routing_and_rng()
  x = normal(rng, NUM_TOKENS * (TOP_K if grouped_in else 1), D)
  shape = (2 * width, D) if transpose_w else (D, 2 * width)
  w = normal(rng, NUM_EXPERTS, *shape)
  options = dict(
    bias=normal(rng, NUM_EXPERTS, 2 * width),
    grouped_in=grouped_in,
    grouped_out=True,
    transpose_w=transpose_w,
  )
  backend = mosaic_interpreted()
  for i in range(2):
    options["columns"] = Columns(i, width)
    got = backend.scatter2scatter(x, w, routing, **options)
    assert_equals_xla("scatter2scatter", got, x, w, routing, **options)


@needs_mosaic
@pytest.mark.parametrize(
  "grouped_in", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_rows_of_one_choice_are_weighted_and_scattered_interpreted(grouped_in):
  from tests.interpreted_mosaic import mosaic_interpreted

  rng = np.random.default_rng(0)
  ids = rng.integers(0, NUM_EXPERTS + 1, (140, 1))
  routing, columns = route(jnp.asarray(ids, jnp.int32), NUM_EXPERTS), N + 64
  x, w = normal(rng, 140, D), normal(rng, NUM_EXPERTS, D, columns)
  gates = jnp.asarray(rng.normal(size=ids.shape), jnp.float32)
  gates = jnp.where(ids < NUM_EXPERTS, gates, jnp.nan)
  options = dict(
    bias=normal(rng, NUM_EXPERTS, columns), grouped_in=grouped_in, num_chunks=2
  )
  got = mosaic_interpreted().down_projection(x, w, gates, routing, **options)
  assert_equals_xla("down_projection", got, x, w, gates, routing, **options)


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("gated", [True, False])
def test_fused_forms_interpreted_without_races(gated):
  from tests.interpreted_mosaic import mosaic_interpreted

  routing, rng = routing_and_rng()
  activation = get_activation("silu", gated=gated)
  width = 2 * N if gated else N
  backend = mosaic_interpreted(detect_races=True)
  x, w_in = normal(rng, NUM_TOKENS, D), normal(rng, NUM_EXPERTS, D, width)
  options = dict(
    bias=normal(rng, NUM_EXPERTS, width), activation=activation, keep_h=True
  )
  got = backend.up_projection(x, w_in, routing, **options)
  assert_equals_xla("up_projection", got, x, w_in, routing, **options)

  args = (
    normal(rng, NUM_TOKENS, D),
    normal(rng, NUM_EXPERTS, N, D),
    normal(rng, NUM_TOKENS * TOP_K, width),
    jnp.asarray(rng.random(NUM_TOKENS * TOP_K), jnp.float32),
    routing,
  )
  got = backend.down_projection_grad(*args, activation=activation)
  assert_equals_xla("down_projection_grad", got, *args, activation=activation)


@needs_mosaic
def test_gate_gradients_of_several_tiles_of_columns_interpreted():
  from tests.interpreted_mosaic import mosaic_interpreted

  rng, rows, n, d = np.random.default_rng(0), 24, 320, 64
  routing = route(jnp.arange(rows, dtype=jnp.int32)[:, None] % 2, 2)
  args = (
    normal(rng, rows, d),
    normal(rng, 2, n, d),
    normal(rng, rows, n),
    jnp.asarray(rng.random(rows), jnp.float32),
    routing,
  )
  activation = get_activation("silu", gated=False)
  got = mosaic_interpreted().down_projection_grad(*args, activation=activation)
  assert_equals_xla("down_projection_grad", got, *args, activation=activation)


def noted_launches(monkeypatch) -> list:
  """Returns what grows by each launch, how it loads.

  Blocks of a cluster, steps at once, and whether their stages are constants.
  """
  from scattermoe_jax.kernels.mosaic import matmul_loader

  launched = []
  load_tiles = matmul_loader.Loader.load_tiles

  def noted(loader):
    how = loader.plan.cluster, loader.at_once, loader.slots_are_constants
    launched.append(how)
    load_tiles(loader)

  monkeypatch.setattr(matmul_loader.Loader, "load_tiles", noted)
  return launched


@needs_mosaic
@pytest.mark.parametrize(
  "name, steps, at_once",
  [
    pytest.param("scatter2scatter", 7, 1, marks=pytest.mark.slow),
    # Whole turns of the ring of four stages.
    ("scatter2scatter", 8, 4),
    # Turns that begin with another stage each.
    ("scatter2scatter", 5, 5),
    pytest.param("up_projection", 7, 1, marks=pytest.mark.slow),
    pytest.param("up_projection", 8, 4, marks=pytest.mark.slow),
    pytest.param("up_projection", 6, 3, marks=pytest.mark.slow),
    pytest.param("down_projection_grad", 7, 1, marks=pytest.mark.slow),
    pytest.param("down_projection_grad", 4, 4, marks=pytest.mark.slow),
    pytest.param("down_projection_grad", 3, 3, marks=pytest.mark.slow),
  ],
)
def test_clusters_interpreted_without_races(monkeypatch, name, steps, at_once):
  from scattermoe_jax.kernels.mosaic import matmul_tiles
  from tests.interpreted_mosaic import SMALL, mosaic_interpreted

  monkeypatch.setattr(matmul_tiles, "_LARGE_BYTES", 0)
  launched = noted_launches(monkeypatch)
  # Windows of two blocks: of one expert, of two, of one and a window without
  # rows, and of no group.
  sizes, top_k = (300, 200, 112), 2
  ids = np.repeat(np.arange(3, dtype=np.int32), sizes).reshape(-1, top_k)
  routing, rng = route(jnp.asarray(ids), 2), np.random.default_rng(0)
  windows = window_schedule(routing.group_sizes, ids.size, 128, 8, 2)
  assert windows.expert_ids[:8].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
  assert windows.ends[:8].tolist() == [128, 128, 44, 128, 76, 0, 116, 0]
  silu = get_activation("silu", gated=True)
  width, config = 64 * steps, dataclasses.replace(SMALL, num_stages=4)
  if name == "scatter2scatter":
    args = normal(rng, ids.size, width), normal(rng, 2, 128, width)
    options = dict(grouped_in=True, grouped_out=True, transpose_w=True)
  elif name == "up_projection":
    args = normal(rng, ids.shape[0], width), normal(rng, 2, width, 256)
    options = dict(bias=normal(rng, 2, 256), activation=silu, keep_h=True)
  else:
    if at_once == 4:  # As many chunks of h as stages.
      config = dataclasses.replace(config, block_n=256)
    x, h = (
      normal(rng, ids.shape[0], width),
      normal(rng, ids.size, 2 * config.block_n),
    )
    gates = jnp.asarray(rng.random(ids.size), jnp.float32)
    args = (x, normal(rng, 2, config.block_n, width), h, gates)
    options = dict(activation=silu)
  backend = mosaic_interpreted(config, detect_races=True)
  got = getattr(backend, name)(*args, routing, **options)
  assert set(launched) == {(2, at_once, at_once == 4)}
  assert_equals_xla(name, got, *args, routing, **options)


@needs_mosaic
def test_a_turn_of_gathered_rows_interpreted(monkeypatch):
  from scattermoe_jax.kernels.mosaic import matmul_tiles, pace
  from tests.interpreted_mosaic import NoPace, mosaic_interpreted

  monkeypatch.setattr(matmul_tiles, "_LARGE_BYTES", 0)
  monkeypatch.setattr(pace, "STEPS", 1)
  monkeypatch.setattr(NoPace, "kept", [])
  launched = noted_launches(monkeypatch)
  rng = np.random.default_rng(0)
  ids = rng.permuted(np.tile(np.arange(2, dtype=np.int32), (256, 1)), axis=1)
  # Three steps in a turn of a loop over a ring of as many stages.
  args = (normal(rng, 256, 192), normal(rng, 2, 192, 128))
  args, layout = (*args, route(jnp.asarray(ids), 2)), dict(grouped_out=True)
  got = mosaic_interpreted().scatter2scatter(*args, **layout)
  assert set(launched) == {(2, 3, True)}
  assert_equals_xla("scatter2scatter", got, *args, **layout)
  # A report is due at each of the three, and where a tile has no step.
  assert NoPace.kept.count("wait") == 3 * len(launched)
  assert NoPace.kept.count("report") == 4 * len(launched)


@needs_mosaic
def test_more_pieces_than_steps_interpreted():
  from tests.interpreted_mosaic import mosaic_interpreted

  routing, rng = routing_and_rng()
  # Both pieces of a tile leave at the only step of the next.
  args = (normal(rng, NUM_TOKENS, 64), normal(rng, NUM_EXPERTS, 64, N))
  got = mosaic_interpreted().scatter2scatter(*args, routing, grouped_out=True)
  assert_equals_xla("scatter2scatter", got, *args, routing, grouped_out=True)


@needs_mosaic
@pytest.mark.parametrize(
  "steps, num_stages, d_out, loads, grouped, at_once, constants",
  [
    (64, 4, 2048, 0, False, 4, True),
    (64, 4, 2048, 0, True, 4, True),
    (64, 4, 2048, 4, False, 4, True),
    (45, 4, 2880, 0, False, 5, False),
    (47, 4, 2880, 0, False, 1, False),
    (48, 3, 2048, 0, False, 3, True),
    # More steps than stages.
    (44, 3, 2048, 0, False, 4, False),
    # A small matrix, whose blocks load alone; rows announced as they land.
    (64, 4, 256, 0, False, 1, False),
    (64, 4, 256, 4, False, 4, True),
    (64, 4, 256, 4, True, 1, False),
    # The next tile begins in the middle of the ring.
    (64, 4, 2048, 2, False, 4, False),
  ],
)
def test_the_loader_takes_several_steps_at_once(
  steps, num_stages, d_out, loads, grouped, at_once, constants
):
  from scattermoe_jax.kernels.mosaic import epilogues, matmul_loader
  from scattermoe_jax.kernels.mosaic.matmul_tiles import Plan

  config = TileConfig(128, 64 * loads or 256, num_stages=num_stages)
  config = dataclasses.replace(config, num_sms=132)
  plan = Plan(2**18, 128, 64 * steps, d_out, jnp.bfloat16, config, grouped)
  epilogue = epilogues.StoreRows()
  if loads:
    silu, h = get_activation("silu", gated=True), jnp.zeros((8, 128))
    epilogue = epilogues.Differentiate(silu, h, jnp.zeros(8))
  assert epilogue.num_loads(plan) == loads
  assert matmul_loader.steps_at_once(plan, epilogue) == at_once
  assert matmul_loader.turns_fill_the_ring(plan, epilogue) == constants


@needs_mosaic
@pytest.mark.parametrize("at_once", [1, 3, 4, 5])
def test_a_report_is_due_at_no_step_that_may_not_be(at_once):
  from scattermoe_jax.kernels.mosaic import pace

  due = {k % at_once for k in range(0, 20 * pace.STEPS, pace.STEPS)}
  may_be = {k for k in range(at_once) if pace.may_be_due(k, at_once)}
  assert may_be == due


def softplus_and_slope(z):
  return jax.nn.softplus(z), jax.nn.sigmoid(z)


def all_that_lowers(z):
  """Not a function and its slope, but of each primitive that is fused."""
  narrow = z.astype(jnp.bfloat16).astype(z.dtype)
  value = jnp.where(z > 0, jnp.tanh(-z), jnp.exp(z) - narrow)
  value = jnp.where(z < 1, value, jnp.where(z >= 2, jnp.minimum(z, 6), value))
  slope = jnp.where(z <= 3, jax.nn.sigmoid(z), jnp.ones_like(z))
  slope = jnp.maximum(slope, 0) * z / (1 + z * z)
  size = lax.clamp(0.0, jnp.abs(z) + jnp.square(z), 6.0)
  roots = jnp.sqrt(size) * lax.rsqrt(size + 1) + jnp.log(size + 1)
  waves = jnp.sin(z) + jnp.cos(z) + jnp.exp2(z) * jnp.sign(z) + z**3
  _, tanh_slope = jax.jvp(jnp.tanh, (z,), (jnp.ones_like(z),))
  value += jnp.where((z == 0) & (size < 1), roots, waves)
  return value, slope + tanh_slope


LOWERED = {
  # name: (T, d, n, E, k, dtype, activation)
  "eight_experts": (16384, 4096, 14336, 8, 2, "bfloat16", "silu"),
  "many_experts": (32768, 4096, 256, 512, 16, "bfloat16", "silu"),
  "gpt_oss_width": (16384, 2880, 2880, 32, 4, "bfloat16", "clamped_swiglu"),
  "float16_odd_width": (1001, 600, 104, 5, 2, "float16", "gelu_tanh"),
  "erf_is_composed": (1001, 512, 128, 5, 2, "bfloat16", "gelu"),
  "own_is_composed": (
    *(1001, 512, 128, 5, 2, "bfloat16"),
    Activation("own", softplus_and_slope, gated=True),
  ),
  "own_is_fused": (
    *(1001, 512, 128, 5, 2, "bfloat16"),
    Activation("own", all_that_lowers, gated=True),
  ),
}


KERNEL = "custom_call @mosaic_gpu"


def lowered_step(case, transform, *, layers=1, **options):
  """Returns the text of a step of `LOWERED[case]`, lowered for an H200."""
  T, d, n, E, k, dtype, activation = LOWERED[case]

  def loss(x, gates, w_in, w_out, ids):
    for _ in range(layers):
      x = sm.smoe_mlp(
        x,
        gates,
        route(ids, E),
        w_in,
        w_out,
        activation=activation,
        implementation="mosaic",
        **options,
      )
    return x.astype(jnp.float32).sum()

  shape = jax.ShapeDtypeStruct
  args = (
    shape((T, d), dtype),
    shape((T, k), "float32"),
    shape((E, d, 2 * n), dtype),
    shape((E, n, d), dtype),
    shape((T, k), "int32"),
  )
  return lowered(transform(loss, argnums=(0, 1, 2, 3)), *args)


@needs_mosaic
@pytest.mark.parametrize("case", LOWERED)
def test_a_training_step_lowers_without_a_gpu(case):
  # up, dgrad of down, dx, dw_in, dw_out; a gradient needs no y.
  assert lowered_step(case, jax.grad).count(KERNEL) == 5


@needs_mosaic
@pytest.mark.parametrize("gated", [True, False])
def test_a_step_lowers_in_double_precision(x64, gated):
  # In pairs, in bands and in pace; the groups of a bias gradient are cut.
  T, d, n, E, k = 16384, 4096, 8192, 8, 2

  def loss(x, gates, w_in, w_out, bias_in, bias_out, ids):
    y = sm.smoe_mlp(
      x, gates, route(ids, E), w_in, w_out, bias_in=bias_in, bias_out=bias_out,
      implementation="mosaic",
    )  # fmt: skip
    return y.astype(jnp.float32).sum()

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  width = 2 * n if gated else n
  args = (
    shape((T, d)),
    shape((T, k)),
    shape((E, d, width)),
    shape((E, n, d)),
    shape((E, width)),
    shape((E, d)),
    jax.ShapeDtypeStruct((T, k), jnp.int32),
  )
  step = jax.value_and_grad(loss, argnums=tuple(range(6)))
  # up, down, dgrad of down, dx, dw_in, dw_out, dbias_in, dbias_out.
  assert lowered(step, *args).count(KERNEL) == 8


@needs_mosaic
def test_one_choice_lowers_in_double_precision(x64):
  T, d, n, E = 1001, 600, 104, 5

  def layer(x, gates, w_in, w_out, bias_out, ids):
    return sm.smoe_mlp(
      x, gates, route(ids, E), w_in, w_out, bias_out=bias_out, num_chunks=2,
      implementation="mosaic",
    )  # fmt: skip

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  args = (
    shape((T, d)),
    jax.ShapeDtypeStruct((T, 1), jnp.float64),
    shape((E, d, 2 * n)),
    shape((E, n, d)),
    shape((E, d)),
    jax.ShapeDtypeStruct((T, 1), jnp.int64),
  )
  # up, and down, which weights and scatters its rows itself.
  assert lowered(layer, *args).count(KERNEL) == 2


@needs_mosaic
@pytest.mark.parametrize("grouped_in", [True, False])
@pytest.mark.parametrize("grouped_out", [True, False])
def test_a_product_lowers_in_double_precision(x64, grouped_in, grouped_out):
  T, d, n, E, k = 1001, 600, 104, 5, 2

  def loss(x, w, ids):
    y = sm.parallel_linear(
      x, w, route(ids, E), grouped_in=grouped_in, grouped_out=grouped_out,
      implementation="mosaic",
    )  # fmt: skip
    return y.astype(jnp.float32).sum()

  args = (
    jax.ShapeDtypeStruct((T * k if grouped_in else T, d), jnp.bfloat16),
    jax.ShapeDtypeStruct((E, d, n), jnp.bfloat16),
    jax.ShapeDtypeStruct((T, k), jnp.int64),
  )
  step = jax.value_and_grad(loss, argnums=(0, 1))
  assert lowered(step, *args).count(KERNEL) == 3


def call_of(op, config):
  """Returns a function of (x, w, h, ids) that runs `op` with these tiles."""
  silu = get_activation("silu", gated=True)

  def call(x, w, h, ids):
    routing = route(ids, w.shape[0])
    ones = jnp.ones((routing.num_rows,), jnp.float32)
    if op == "up_projection":
      return mosaic.up_projection(
        x, w, routing, bias=None, activation=silu, keep_h=True, config=config
      )
    if op == "down_projection_grad":
      w = w.transpose((0, 2, 1))
      return mosaic.down_projection_grad(
        x, w, jnp.concatenate((h, h), 1), ones, routing, activation=silu,
        config=config,
      )  # fmt: skip
    if op.startswith("scatter2scatter"):
      grouped_in = op == "scatter2scatter_grouped"
      x = jnp.repeat(x, routing.top_k, axis=0) if grouped_in else x
      return mosaic.scatter2scatter(
        x, w, routing, grouped_in=grouped_in, config=config
      )
    x_grouped = op == "group_xty_gathered_y"
    x, y = (h, x) if x_grouped else (x, h)
    return mosaic.group_xty(
      x, y, routing, x_grouped=x_grouped, y_grouped=not x_grouped, config=config
    )

  return call


@needs_mosaic
@pytest.mark.parametrize("op", tuning.OPS)
def test_all_tiles_that_are_valid_lower(op):
  T, d, n, E, k = 300, 256, 512, 3, 2
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  args = shape((T, d)), shape((E, d, n)), shape((T * k, n))
  ids, found = jax.ShapeDtypeStruct((T, k), jnp.int32), 0
  sizes = 32, 64, 128, 256
  for blocks in itertools.product(sizes, sizes):
    config = TileConfig(*blocks, num_stages=3)
    if tuning.why_invalid(op, config) is None:
      assert lowered(call_of(op, config), *args, ids).count(KERNEL) == 1, config
      found += 1
  assert found > 1


@needs_mosaic
def test_activations_are_fused_by_what_they_are_made_of():
  block = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  jaxpr = jax.make_jaxpr(all_that_lowers)(block).jaxpr
  assert lowering._primitives(jaxpr) == lowering._LOWERED
  assert lowers(all_that_lowers)
  assert not lowers(softplus_and_slope)


@needs_mosaic
@pytest.mark.parametrize(
  "case, num_chunks, copies, at_once",
  [
    ("many_experts", 4, 0, True),
    ("many_experts", 2, 0, False),
    ("gpt_oss_width", 5, 0, False),
    # A slice that is no whole number of tiles is copied, in both directions.
    ("float16_odd_width", 3, 2, False),
  ],
)
def test_a_step_in_chunks_copies_no_weights(case, num_chunks, copies, at_once):
  text = lowered_step(case, jax.value_and_grad, num_chunks=num_chunks)
  assert text.count("stablehlo.dynamic_slice") == copies
  # One kernel serves all slices of down, and one all of dx. Those that sum dx
  # beside dw_in write it where it belongs; the first of them makes it.
  assert text.count(KERNEL) == 6 + at_once
  updates = (2 - at_once) * num_chunks
  assert text.count("stablehlo.dynamic_update_slice") == updates


@needs_mosaic
@pytest.mark.parametrize("case", ["mapped", "scanned", "double precision"])
def test_a_step_in_chunks_lowers_within(case, request):
  if case == "double precision":
    request.getfixturevalue("x64")

  def transformed(loss, argnums):
    def layers(*args):
      body = jax.checkpoint(lambda total, _: (total + loss(*args), None))
      return lax.scan(body, jnp.float32(0), None, length=2)[0]

    gradients = jax.grad(layers if case == "scanned" else loss, argnums)
    if case == "mapped":
      return lambda *args: jax.vmap(gradients)(
        *(jnp.broadcast_to(arg, (2, *arg.shape)) for arg in args)
      )
    return gradients

  text = lowered_step("many_experts", transformed, num_chunks=4)
  # up, dgrad of down, dw_out, dx; dw_in with the first slice, and with others.
  assert text.count(KERNEL) == 6


def lowered_derivative(T, d, n, E, k):
  """Returns the text of dx_down and all that is fused with it."""
  activation = get_activation("silu", gated=True)

  def gradients(dy, w, h, gates, ids):
    return mosaic.down_projection_grad(
      dy, w, h, gates, route(ids, E), activation=activation
    )

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  return lowered(
    gradients,
    shape((T, d)),
    shape((E, n, d)),
    shape((T * k, 2 * n)),
    jax.ShapeDtypeStruct((T * k,), jnp.float32),
    jax.ShapeDtypeStruct((T, k), jnp.int32),
  )


@needs_mosaic
def test_no_sum_of_floats_is_left_to_the_order_of_a_reduction():
  # Which the compiler chooses, so that two compilations differ by some bits.
  text = lowered_derivative(512, 256, 2048, 4, 1)
  reductions = re.findall(r"stablehlo\.reduce.*", text)
  assert reductions  # Of integers, for the schedule.
  assert not [line for line in reductions if re.search(r"x(bf16|f32)", line)]


@needs_mosaic
def test_layers_of_a_model_share_their_kernels():
  # The first and the last layer differ: what nobody needs is not made.
  three, four = (
    lowered_step("many_experts", jax.grad, layers=layers).count(KERNEL)
    for layers in (3, 4)
  )
  assert three == four


@needs_mosaic
@pytest.mark.parametrize("d, by_themselves", [(256, True), (1024, False)])
def test_rows_of_a_small_matrix_announce_themselves(
  monkeypatch, d, by_themselves
):
  from scattermoe_jax.kernels.mosaic.gather import RowCopies

  called = []

  def noted(name):
    method = getattr(RowCopies, name)

    def call(*args):
      called.append(name)
      return method(*args)

    monkeypatch.setattr(RowCopies, name, call)

  names = "make_barriers", "arrive_landed", "pass_landed"
  for name in names:
    noted(name)
  jax.clear_caches()  # Else the kernel may have been traced before.
  text = lowered_derivative(512, d, 2048, 2, 1)
  assert ("cp.async.mbarrier.arrive" in text) == by_themselves
  # Of a ring's stages each is counted: four steps in a turn, and one for h.
  counts = (1, 4, 1) if by_themselves else (0, 0, 0)
  assert tuple(map(called.count, names)) == counts


def lowered_product(d, n):
  """Returns the text of 1024 rows times four (d, n), lowered for an H200."""
  args = (
    jax.ShapeDtypeStruct((512, d), "bfloat16"),
    jax.ShapeDtypeStruct((4, d, n), "bfloat16"),
    jax.ShapeDtypeStruct((512, 2), "int32"),
  )
  product = lambda x, w, ids: mosaic.scatter2scatter(x, w, route(ids, 4))
  return lowered(product, *args)


@needs_mosaic
@pytest.mark.parametrize("steps_missing, kept", [(0, 1), (1, 0)])
def test_blocks_keep_pace_where_a_tile_is_long(steps_missing, kept):
  from scattermoe_jax.kernels.mosaic.pace import STEPS

  text = lowered_product((STEPS - steps_missing) * 64, 256)
  assert text.count("nanosleep") == kept


@needs_mosaic
@pytest.mark.parametrize("n, cluster", [(1024, 2), (960, 1)])
def test_blocks_load_large_matrices_together(monkeypatch, n, cluster):
  launched = noted_launches(monkeypatch)
  lowered_product(2048, n)
  assert {blocks for blocks, *_ in launched} == {cluster}


def plan_of(num_sms, d_out=2048, band_n=0):
  """Returns the plan of a matrix that blocks load in pairs, if they can."""
  from scattermoe_jax.kernels.mosaic.matmul_tiles import Plan

  config = TileConfig(num_sms=num_sms, band_n=band_n)
  return Plan(2**18, 128, 4096, d_out, jnp.bfloat16, config)


@needs_mosaic
@pytest.mark.parametrize("num_sms, cluster", [(132, 2), (131, 1), (1, 1)])
def test_an_odd_number_of_blocks_load_alone(num_sms, cluster):
  assert plan_of(num_sms).cluster == cluster


@needs_mosaic
@pytest.mark.parametrize(
  "band_n, numbers",
  [
    (2, [[0, 1, 6, 7, 12], [2, 3, 8, 9, 13], [4, 5, 10, 11, 14]]),
    (4, [[0, 1, 2, 3, 12], [4, 5, 6, 7, 13], [8, 9, 10, 11, 14]]),
    (0, np.arange(15).reshape(3, 5)),
    (5, np.arange(15).reshape(3, 5)),
  ],
)
def test_turns_go_through_a_band_of_columns_after_another(band_n, numbers):
  from scattermoe_jax.kernels.mosaic.matmul_tiles import place_of_turn

  plan = plan_of(132, d_out=5 * 128, band_n=band_n)
  places = place_of_turn(plan, jnp.arange(15, dtype=jnp.int32), jnp.int32(3))
  got = np.zeros((3, 5), int)
  got[tuple(map(np.asarray, places))] = np.arange(15)
  np.testing.assert_array_equal(got, numbers)


@needs_mosaic
@pytest.mark.parametrize("num_turns", [0, 1, 3, 4, 10, 12])
def test_blocks_take_all_turns_and_know_which_all_of_them_have(
  monkeypatch, num_turns
):
  from scattermoe_jax.kernels.mosaic.matmul_tiles import Walk

  monkeypatch.setattr(Walk, "_num_clusters", 4)
  turns, plan = jnp.int32(num_turns), plan_of(8)
  walks = [Walk(plan, None, i, 0, None, turns) for i in range(4)]
  counts = [int(walk.num_tiles) for walk in walks]
  assert counts == [len(range(i, num_turns, 4)) for i in range(4)]
  for t in range(4):
    assert walks[0].all_have_one(t) == all(count > t for count in counts)


@needs_mosaic
def test_blocks_share_a_matrix_where_all_their_tiles_are_of_one_expert(
  monkeypatch,
):
  from scattermoe_jax.kernels.mosaic.matmul_tiles import Walk

  monkeypatch.setattr(Walk, "_num_clusters", 1)
  plan, sizes = plan_of(2, d_out=512), jnp.array([300, 200], jnp.int32)
  windows = window_schedule(sizes, 612, *plan.windows)
  assert windows.expert_ids[:8].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
  index, turns_m, turns = map(jnp.int32, (0, 4, 16))
  walk = Walk(plan, windows, index, index, turns_m, turns)
  first_columns = [walk.entry(row * plan.num_tiles_n) for row in range(4)]
  shared = [bool(entry.is_shared) for entry in first_columns]
  assert shared == [True, False, True, True]


@needs_mosaic
def test_rows_of_no_group_are_multiplied_by_nothing():
  from scattermoe_jax.kernels.mosaic.matmul_tiles import Walk

  plan = plan_of(2)
  walk = Walk(plan, None, 0, 0, None, None)
  experts = jnp.array([0, plan.num_experts - 1, plan.num_experts])
  assert walk.num_steps(experts).tolist() == [plan.steps, plan.steps, 0]


@needs_mosaic
@pytest.mark.parametrize("steps", [32, 45, 64, 100])
def test_all_blocks_report_as_often_and_in_order(steps):
  from scattermoe_jax.kernels.mosaic import pace

  due = [step for step in range(steps) if step % pace.STEPS == 0]
  before = [pace.reports_before(t, k, steps) for t in range(3) for k in due]
  assert before == list(range(3 * pace.reports_of_tile(steps)))


@needs_mosaic
def test_blocks_in_pace_interpreted(monkeypatch):
  from scattermoe_jax.kernels.mosaic import pace
  from tests.interpreted_mosaic import NoPace, mosaic_interpreted

  monkeypatch.setattr(pace, "STEPS", 1)
  monkeypatch.setattr(NoPace, "kept", [])
  routing, rng = routing_and_rng()
  x, w = normal(rng, NUM_TOKENS, D), normal(rng, NUM_EXPERTS, D, N)
  args, layout = (x, w, routing), dict(grouped_out=True)
  got = mosaic_interpreted().scatter2scatter(*args, **layout)
  assert_equals_xla("scatter2scatter", got, *args, **layout)
  # As the kernel is traced: a tile without steps, and a step that is due.
  assert NoPace.kept.count("report") == 2 * NoPace.kept.count("wait") > 0


@pytest.mark.gpu
def test_blocks_that_keep_pace_are_right_on_gpu():
  # Bands of columns, so that tiles without a step come between others.
  T, d, n, E, k = 3000, 4096, 4096, 8, 2
  rng = np.random.default_rng(0)
  ids = np.argsort(rng.random((T, E)), axis=1)[:, :k]
  ids = np.where(rng.random(ids.shape) < 0.4, E, ids).astype(np.int32)
  x, w = normal(rng, T, d), normal(rng, E, d, n)
  config = TileConfig(128, 256, num_stages=4, band_n=4, num_sms=132)
  y = mosaic.scatter2scatter(x, w, route(jnp.asarray(ids), E), config=config)
  y = np.asarray(y).reshape(T, k, n)
  assert not np.any(y[ids == E])
  for expert in range(E):
    tokens, choices = np.nonzero(ids == expert)
    some = rng.permutation(tokens.size)[:20]
    rows = x[tokens[some]]
    truth = np.asarray(rows, np.float64) @ np.asarray(w[expert], np.float64)
    assert_accurate(
      y[tokens[some], choices[some]], truth, jnp.dot(rows, w[expert])
    )


@pytest.mark.gpu
@pytest.mark.parametrize("not_here", [0.0, 0.3])
@pytest.mark.parametrize(
  "d, n, at_once",
  [
    # Steps of all: 8.
    (512, 256, (4, 4, 4)),
    # 10, 11, 11.
    (704, 320, (5, 1, 1)),
    # 14, 9, 9.
    (576, 448, (2, 3, 3)),
  ],
)
def test_clusters_change_no_bit_on_gpu(monkeypatch, not_here, d, n, at_once):
  from scattermoe_jax.kernels.mosaic import matmul_tiles

  T, E, k = 3000, 8, 2
  rng = np.random.default_rng(0)
  ids = np.argsort(rng.random((T, E)), axis=1)[:, :k]
  ids = np.where(rng.random(ids.shape) < not_here, E, ids).astype(np.int32)
  routing = route(jnp.asarray(ids), E)
  x, w_in, w_out = (normal(rng, *s) for s in ((T, d), (E, d, 2 * n), (E, n, d)))
  h, gates = normal(rng, T * k, 2 * n), jnp.asarray(rng.random(T * k))
  grouped = dict(grouped_in=True, grouped_out=True, transpose_w=True)
  fused = dict(activation=get_activation("silu", gated=True))
  calls = {
    "scatter2scatter": ((h, w_in, routing), grouped),
    "up_projection": (
      (x, w_in, routing),
      fused | dict(bias=None, keep_h=True),
    ),
    "down_projection_grad": ((x, w_out, h, gates, routing), fused),
  }
  here = np.asarray(routing.expert_ids) < E
  launched = noted_launches(monkeypatch)
  for (name, (args, options)), steps in zip(
    calls.items(), at_once, strict=True
  ):
    results = []
    for least in (0, 2**40):
      monkeypatch.setattr(matmul_tiles, "_LARGE_BYTES", least)
      jax.clear_caches()
      results.append(getattr(mosaic, name)(*args, **options))
    # The body of a kernel may be traced more than once.
    in_pairs, lone = (2, steps, steps == 4), (1, 1, False)
    assert [*dict.fromkeys(launched)] == [in_pairs, lone], name
    launched.clear()
    for together, alone in zip(*map(jax.tree.leaves, results), strict=True):
      together, alone = (np.asarray(a)[here] for a in (together, alone))
      np.testing.assert_array_equal(together, alone, err_msg=name)
    assert_equals_xla(name, results[0], *args, **options)


@needs_mosaic
def test_runs_on_hopper_alone():
  assert mosaic.check(PROBLEM) is None
  a100 = Device("gpu", "NVIDIA A100", (8, 0), 108)
  assert "this is NVIDIA A100" in mosaic.check(PROBLEM._replace(device=a100))


@pytest.mark.parametrize(
  "change, words",
  [
    (dict(dtype="float32"), "multiplies bfloat16 or float16, got float32"),
    (dict(d_in=100), "multiples of 8, got d_in = 100"),
    (dict(d_out=20), "multiples of 8, got d_out = 20"),
    (dict(d_in=0), "multiples of 8, got d_in = 0"),
    (dict(num_rows=2**26), "array of rows, got 67108864 rows of d_in = 1024"),
  ],
)
def test_refuses_in_words(change, words):
  assert words in mosaic.check(PROBLEM._replace(**change))


@needs_mosaic
def test_takes_as_many_rows_as_chunks_of_32_bits_count():
  most = PROBLEM._replace(num_rows=2**25)
  assert mosaic.check(most) is None
  # Widths are padded to tiles.
  assert "d_out = 1032" in mosaic.check(most._replace(d_out=1032))


@needs_mosaic
def test_refuses_tiles_that_would_wait_for_themselves():
  routing, rng = routing_and_rng()
  x, w = normal(rng, NUM_TOKENS, D), normal(rng, NUM_EXPERTS, D, N)
  config = TileConfig(num_stages=2)
  with pytest.raises(ValueError, match="config: num_stages = 2; .* takes 3"):
    mosaic.scatter2scatter(x, w, routing, grouped_out=True, config=config)


@needs_mosaic
@pytest.mark.parametrize(
  "name, words",
  [
    ("barrier_arrive", "its barrier_arrive takes no predicate"),
    ("kernel", "its kernel takes no out_type"),
  ],
)
def test_a_function_of_an_older_jax_is_a_reason(monkeypatch, name, words):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  check = mosaic.missing_feature.__wrapped__
  assert check() is None
  monkeypatch.setattr(plgpu, name, lambda barrier: None)
  assert check() == f"this JAX is too old for mosaic: {words}"
  monkeypatch.delattr(plgpu, name)
  assert check() == f"this JAX is too old for mosaic: {words}"


@needs_mosaic
@pytest.mark.parametrize("name", ["inline_mgpu", "force_gpu_interpret_mode"])
def test_what_an_older_jax_has_not_is_a_reason(monkeypatch, name):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  monkeypatch.delattr(plgpu, name)
  reason = mosaic.missing_feature.__wrapped__()
  assert reason == f"this JAX is too old for mosaic: Pallas has no {name}"


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_a_jax_that_fails_to_import_pallas_is_a_reason(monkeypatch, error):
  import_module = builtins.__import__

  def fails(name, *args):
    if name.startswith("jax.experimental.pallas"):
      raise error("no such thing")
    return import_module(name, *args)

  monkeypatch.setattr(builtins, "__import__", fails)
  reason = mosaic.missing_feature.__wrapped__()
  assert reason == "this JAX does not import Pallas Mosaic GPU (no such thing)"


def test_an_old_jax_is_a_reason_not_an_error():
  reason = mosaic.check(PROBLEM)
  assert reason is None or "this JAX" in reason
