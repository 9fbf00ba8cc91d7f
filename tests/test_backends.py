"""Every backend is the contract: one suite, parametrised by implementation.

`xla` is held to the NumPy oracle in float64. The GPU's backends run in their
interpreters here, and on the device itself with `-m gpu`, held to the oracle by
the tolerance rule, with plain XLA of the same dtype as its baseline.
"""

import functools
import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels import (
  IMPLEMENTATIONS,
  Columns,
  Problem,
  accumulator_dtype,
  xla,
)
from scattermoe_jax.ops.activations import get_activation
from scattermoe_jax.routing import route
from tests import interpreted, oracle, plain, strategies
from tests.accuracy import assert_accurate
from tests.conftest import enable_x64, on_cpu, poison_memory
from tests.strategies import Case

SMALL = Case(40, 3, 6, 64, 32)
# On a GPU: several blocks to an expert, and widths off every block.
MEDIUM, ODD = Case(300, 4, 8, 256, 128), Case(257, 2, 5, 600, 104)


def _gpu(name, case, dtype):
  run_id = f"{name}-{case.d}-{jnp.dtype(dtype)}"
  return pytest.param(name, case, dtype, marks=pytest.mark.gpu, id=run_id)


# (backend, shape, dtype)
RUNS = [
  pytest.param("xla", SMALL, jnp.float32, id="xla-float32"),
  pytest.param("xla", SMALL, jnp.bfloat16, id="xla-bfloat16"),
  pytest.param("interpreted triton", SMALL, jnp.float32, id="triton-float32"),
] + [
  _gpu(name, case, dtype)
  for name in IMPLEMENTATIONS
  for case in (SMALL, MEDIUM, ODD)
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
]

# The interpreted one composes its fused forms as xla does.
FUSED_RUNS = [run for run in RUNS if "interpreted" not in run.values[0]]


def load(name):
  if name == "interpreted triton":
    return interpreted.triton_interpreted()
  return importlib.import_module(f"scattermoe_jax.kernels.{name}")


def skip_if_refused(backend, case, dtype):
  """Skips what the backend says, in words, that it cannot run."""
  if not hasattr(backend, "check"):  # an interpreted one takes all
    return
  for d_in, d_out in ((case.d, case.n), (case.d, 2 * case.n)):
    for widths in ((d_in, d_out), (d_out, d_in)):
      problem = Problem(
        case.num_rows,
        case.num_experts,
        *widths,
        str(jnp.dtype(dtype)),
        current_device(),
      )
      reason = backend.check(problem)
      if reason is not None:
        pytest.skip(reason)


def options_for(dtype):
  # Without it, float32 products on a GPU are made of TF32 ones.
  return {"precision": "highest"} if dtype == jnp.float32 else {}


LAYOUTS = (
  # (rows of x, grouped_out, transpose_w, bias)
  ("tokens", False, False, True),
  ("tokens", True, False, False),
  ("scattered", True, False, True),
  ("grouped", False, False, False),
  ("grouped", True, False, True),
  ("tokens", True, True, False),
  ("grouped", False, True, True),
)
XTY_LAYOUTS = (
  # (rows of x, rows of y)
  ("tokens", "grouped"),
  ("grouped", "tokens"),
  ("scattered", "scattered"),
  ("grouped", "grouped"),
)


def operands(case, dtype, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  num_experts, d, n = case.num_experts, case.d, case.n
  rows = {
    "tokens": case.num_tokens,
    "scattered": case.num_rows,
    "grouped": case.num_rows,
  }
  return {
    "x": {order: normal(count, d) for order, count in rows.items()},
    "y": {order: normal(count, n) for order, count in rows.items()},
    "w": normal(num_experts, d, n),
    "w_transposed": normal(num_experts, n, d),
    "bias": normal(num_experts, n),
  }


def products(scatter2scatter, group_xty, arrays):
  """Every layout of the one, then of the other."""
  for rows, grouped_out, transpose_w, bias in LAYOUTS:
    yield scatter2scatter(
      arrays["x"][rows],
      arrays["w_transposed" if transpose_w else "w"],
      bias=arrays["bias"] if bias else None,
      grouped_in=rows == "grouped",
      grouped_out=grouped_out,
      transpose_w=transpose_w,
    )
  for x_rows, y_rows in XTY_LAYOUTS:
    yield group_xty(
      arrays["x"][x_rows],
      arrays["y"][y_rows],
      x_grouped=x_rows == "grouped",
      y_grouped=y_rows == "grouped",
    )


def backend_products(backend, case, arrays, ids, **options):
  routing = route(ids, case.num_experts)
  return list(
    products(
      lambda x, w, **layout: backend.scatter2scatter(
        x, w, routing, **layout, **options
      ),
      lambda x, y, **layout: backend.group_xty(
        x, y, routing, **layout, **options
      ),
      arrays,
    )
  )


def reference_products(truth, case, arrays, ids, **options):
  """`truth` is `oracle` or `plain`."""
  return list(
    products(
      lambda x, w, **layout: truth.scatter2scatter(
        x, w, ids, **layout, **options
      ),
      lambda x, y, **layout: truth.group_xty(
        x, y, ids, case.num_experts, **layout, **options
      ),
      arrays,
    )
  )


def matmuls_of(dtype):
  """The orders of summation of a baseline, see `accuracy`."""
  if dtype == jnp.float32:
    return [plain.xla_matmul, plain.textbook_matmul]
  return [plain.xla_matmul]


@functools.partial(jax.jit, static_argnums=0)
def plain_products(case, arrays, ids):
  """A list for each product: plain XLA, in both orders if in float32."""
  ways = [
    reference_products(plain, case, arrays, ids, matmul=matmul)
    for matmul in matmuls_of(arrays["w"].dtype)
  ]
  return [list(results) for results in zip(*ways, strict=True)]


def assert_all_accurate(names, got, truth, baseline=None, err_msg=""):
  baseline = baseline or [None] * len(names)
  for name, a, b, c in zip(names, got, truth, baseline, strict=True):
    assert_accurate(a, b, c, err_msg=f"{err_msg} {name}")


@functools.partial(jax.jit, static_argnums=(0, 3))
def xla_products(case, arrays, ids, step_tiles=1):
  options = {"block_m": case.block_m, "step_tiles": step_tiles}
  return backend_products(xla, case, arrays, ids, **options)


def assert_xla_is_exact(case, ids, step_tiles):
  with enable_x64():
    arrays = operands(case, jnp.float64)
    got = xla_products(case, arrays, ids, step_tiles)
    truth = reference_products(oracle, case, arrays, ids)
    assert_all_accurate(LAYOUTS + XTY_LAYOUTS, got, truth)


@hypothesis.given(strategies.routings())
def test_xla_equals_the_oracle_in_float64(drawn):
  assert_xla_is_exact(*drawn, step_tiles=1)


@hypothesis.given(strategies.routings(strategies.CASES[-1:]))
def test_xla_takes_many_tiles_a_step_as_on_a_gpu(drawn):
  assert_xla_is_exact(*drawn, step_tiles=3)


def test_xla_reads_no_row_of_no_group(x64):
  case = strategies.CASES[-1]
  ids = strategies.expert_ids(case, "some_not_here")
  arrays = operands(case, jnp.float64)
  truth = reference_products(oracle, case, arrays, ids)
  got = xla_products(case, poisoned(arrays, case, ids), ids)
  for name, a, b in zip(LAYOUTS + XTY_LAYOUTS, got, truth, strict=True):
    if "tokens" not in name:
      assert_accurate(a, b, None, err_msg=str(name))


def poisoned(arrays, case, ids):
  """NaN in every row of x and y that belongs to no group."""
  here = ((ids >= 0) & (ids < case.num_experts)).reshape(-1)
  grouped_here = here[oracle.grouped_order(ids, case.num_experts)]

  def poison(rows):
    return rows | {
      "scattered": jnp.where(here[:, None], rows["scattered"], jnp.nan),
      "grouped": jnp.where(grouped_here[:, None], rows["grouped"], jnp.nan),
    }

  return arrays | {"x": poison(arrays["x"]), "y": poison(arrays["y"])}


FUSED = ("silu", True), ("gelu", False), ("clamped_swiglu", True)


def fused_operands(case, dtype, gated, seed=1):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  num_experts, d, n = case.num_experts, case.d, case.n
  m = 2 * n if gated else n
  return {
    "x": normal(case.num_tokens, d),
    "w_in": normal(num_experts, d, m),
    "bias_in": normal(num_experts, m),
    "h": normal(case.num_rows, m),
    "w_out": normal(num_experts, n, d),
    "gates": normal(case.num_rows).astype(accumulator_dtype(dtype)),
    "dy": normal(case.num_tokens, d),
  }


def backend_fused(backend, case, arrays, ids, activation, gated, **options):
  routing = route(ids, case.num_experts)
  options = options | {"activation": get_activation(activation, gated=gated)}
  x, w_in, bias_in = arrays["x"], arrays["w_in"], arrays["bias_in"]
  up = lambda keep_h: backend.up_projection(
    x, w_in, routing, bias=bias_in, keep_h=keep_h, **options
  )
  down = backend.down_projection_grad(
    arrays["dy"],
    arrays["w_out"],
    arrays["h"],
    arrays["gates"],
    routing,
    **options,
  )
  return [*up(True), up(False)[1], *down]


@functools.partial(jax.jit, static_argnums=(2, 3))
def reference_fused(arrays, ids, activation, gated):
  form = {"activation": activation, "gated": gated}
  h, a = plain.up_projection(
    arrays["x"], arrays["w_in"], ids, bias=arrays["bias_in"], **form
  )
  names = ("dy", "w_out", "h", "gates")
  down = plain.down_projection_grad(*(arrays[n] for n in names), ids, **form)
  return [h, a, a, *down]


FUSED_NAMES = ("h", "a", "a alone", "dh", "weighted_a", "dgates")


def in_groups(results, case, ids):
  """The fused results with the rows of no group zeroed: they mean nothing."""
  here = ((ids >= 0) & (ids < case.num_experts)).reshape(-1)
  here = here[oracle.grouped_order(ids, case.num_experts)]
  mask = lambda a: np.where(here.reshape(-1, *[1] * (a.ndim - 1)), a, 0)
  return [mask(np.asarray(a)).astype(a.dtype) for a in results]


def float64(tree):
  return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree)


@pytest.mark.optimised
@pytest.mark.parametrize(("name", "case", "dtype"), RUNS)
def test_products_are_accurate(name, case, dtype):
  backend = load(name)
  skip_if_refused(backend, case, dtype)
  run = jax.jit(
    functools.partial(backend_products, backend, case, **options_for(dtype))
  )
  arrays = operands(case, dtype)
  for pattern in strategies.PATTERNS:
    ids = strategies.expert_ids(case, pattern)
    poison_memory()
    assert_all_accurate(
      LAYOUTS + XTY_LAYOUTS,
      run(arrays, ids),
      reference_products(oracle, case, arrays, ids),
      plain_products(case, arrays, ids),
      err_msg=pattern,
    )


@pytest.mark.optimised
@pytest.mark.parametrize(("activation", "gated"), FUSED)
@pytest.mark.parametrize(("name", "case", "dtype"), FUSED_RUNS)
def test_fused_forms_are_accurate(name, case, dtype, activation, gated):
  backend = load(name)
  skip_if_refused(backend, case, dtype)
  arrays = fused_operands(case, dtype, gated)

  @jax.jit
  def run(arrays, ids):
    return backend_fused(
      backend, case, arrays, ids, activation, gated, **options_for(dtype)
    )

  for pattern in ("skewed", "ends_off_block_edges", "some_not_here"):
    ids = strategies.expert_ids(case, pattern)
    poison_memory()
    got = run(arrays, ids)
    baseline = reference_fused(arrays, ids, activation, gated)
    with on_cpu(), enable_x64():
      truth = reference_fused(float64(arrays), ids, activation, gated)
    trio = (in_groups(r, case, ids) for r in (got, truth, baseline))
    assert_all_accurate(FUSED_NAMES, *trio, err_msg=pattern)


def weighted_sums(x, w, gates, ids, **layout):
  """Products summed by the oracle: of its own rows, and of plain XLA's."""
  layout |= dict(grouped_out=True)
  rows = [oracle.scatter2scatter(x, w, ids, **layout)]
  for matmul in matmuls_of(x.dtype):
    rows.append(plain.scatter2scatter(x, w, ids, matmul=matmul, **layout))
  truth, *baseline = (oracle.combine(r, gates, ids, w.shape[0]) for r in rows)
  return truth, [jnp.asarray(b, x.dtype) for b in baseline]


@pytest.mark.optimised
@pytest.mark.parametrize("grouped_in", [True, False])
@pytest.mark.parametrize("one_choice", [True, False])
@pytest.mark.parametrize(("name", "case", "dtype"), RUNS)
def test_down_projection_is_accurate(name, case, dtype, one_choice, grouped_in):
  backend = load(name)
  skip_if_refused(backend, case, dtype)
  case = case._replace(top_k=1) if one_choice else case
  arrays, options = operands(case, dtype), options_for(dtype)
  x, w = arrays["x"]["grouped" if grouped_in else "tokens"], arrays["w"]
  bias, rng = arrays["bias"], np.random.default_rng(1)
  layout = dict(bias=bias, grouped_in=grouped_in)

  @jax.jit
  def run(gates, ids):
    return backend.down_projection(
      x,
      w,
      gates,
      route(ids, case.num_experts),
      num_chunks=2,
      **layout,
      **options,
    )

  for pattern in strategies.PATTERNS:
    ids = strategies.expert_ids(case, pattern)
    gates = rng.normal(size=ids.shape).astype(np.float32)
    gates[(ids < 0) | (ids >= case.num_experts)] = np.nan
    poison_memory()
    got = run(gates, ids)
    truth, baseline = weighted_sums(x, w, gates, ids, **layout)
    assert_accurate(got, truth, baseline, err_msg=pattern)


@pytest.mark.optimised
@pytest.mark.parametrize(
  "one_choice, num_chunks, at_once",
  [(False, 1, True), (False, 2, False), (False, 2, True), (True, 2, True)],
)
@pytest.mark.parametrize(("name", "case", "dtype"), RUNS)
def test_up_projection_grad_is_accurate(
  name, case, dtype, one_choice, num_chunks, at_once
):
  backend = load(name)
  skip_if_refused(backend, case, dtype)
  case = case._replace(top_k=1) if one_choice else case
  arrays, options = operands(case, dtype), options_for(dtype)
  x, w, dh = arrays["x"]["tokens"], arrays["w"], arrays["y"]["grouped"]
  ones = np.ones((case.num_tokens, case.top_k))

  @jax.jit
  def run(dh, ids):
    routing = route(ids, case.num_experts)
    here = routing.expert_ids < case.num_experts
    dh = jnp.where(here[:, None], dh, 0)
    both = backend.up_projection_grad(
      x, w, dh, routing, num_chunks=num_chunks, at_once=at_once, **options
    )
    return *both, backend.group_xty(x, dh, routing, y_grouped=True, **options)

  layout = dict(grouped_in=True, transpose_w=True)
  for pattern in ("skewed", "some_not_here"):
    ids = strategies.expert_ids(case, pattern)
    poison_memory()
    dx, dw, alone = run(dh, ids)
    np.testing.assert_array_equal(dw, alone, err_msg=pattern)
    truth, baseline = weighted_sums(dh, w, ones, ids, **layout)
    assert_accurate(dx, truth, baseline, err_msg=pattern)


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def slices_both_ways(backend, transpose_w, arrays, ids, slices, width):
  """Slices made of the whole w and bias, and the same of copies of theirs."""
  options = options_for(arrays["w"].dtype)
  options |= dict(grouped_in=True, grouped_out=True, transpose_w=transpose_w)
  x, bias = arrays["x"]["grouped"], arrays["bias"]
  w = arrays["w_transposed" if transpose_w else "w"]
  routing = route(ids, w.shape[0])
  product = lambda w, bias, **columns: backend.scatter2scatter(
    x, w, routing, bias=bias, **options, **columns
  )
  in_place, from_copies = [], []
  for i in slices:
    columns = Columns(i, width)
    in_place.append(product(w, bias, columns=columns))
    w_slice = columns.of(w, 1 if transpose_w else 2)
    from_copies.append(product(w_slice, columns.of(bias, 1)))
  return in_place, from_copies


@pytest.mark.optimised
@pytest.mark.parametrize("transpose_w", [False, True])
@pytest.mark.parametrize(("name", "case", "dtype"), RUNS)
def test_slices_of_columns_are_those_of_the_product(
  name, case, dtype, transpose_w
):
  backend = load(name)
  skip_if_refused(backend, case, dtype)
  arrays = operands(case, dtype)
  ids = strategies.expert_ids(case, "some_not_here")
  given = (transpose_w, arrays, ids)
  slices, width = list(map(jnp.int32, range(2))), case.n // 2
  poison_memory()
  got, from_copies = slices_both_ways(backend, *given, slices, width)
  product = lambda kind, **options: kind.scatter2scatter(
    arrays["x"]["grouped"],
    arrays["w_transposed" if transpose_w else "w"],
    ids,
    bias=arrays["bias"],
    grouped_in=True,
    grouped_out=True,
    transpose_w=transpose_w,
    **options,
  )
  truth = product(oracle)
  baseline = [product(plain, matmul=m) for m in matmuls_of(arrays["w"].dtype)]
  for i in range(2):
    columns = slice(i * width, (i + 1) * width)
    np.testing.assert_array_equal(got[i], from_copies[i])
    part = [whole[:, columns] for whole in baseline]
    assert_accurate(got[i], truth[:, columns], part)


@pytest.mark.optimised
def test_a_wrong_backend_fails():
  class Swapped:
    """A backend that mistakes the order of its input."""

    @staticmethod
    def scatter2scatter(x, w, routing, *, grouped_in, **layout):
      grouped_in = grouped_in != (x.shape[0] == routing.num_rows)
      return xla.scatter2scatter(x, w, routing, grouped_in=grouped_in, **layout)

    group_xty = staticmethod(xla.group_xty)

  arrays = operands(SMALL, jnp.float32)
  ids = strategies.expert_ids(SMALL, "skewed")
  run = jax.jit(functools.partial(backend_products, Swapped, SMALL))
  got, baseline = run(arrays, ids), plain_products(SMALL, arrays, ids)
  truth = reference_products(oracle, SMALL, arrays, ids)
  with pytest.raises(AssertionError, match="off by"):
    assert_all_accurate(LAYOUTS + XTY_LAYOUTS, got, truth, baseline)


@pytest.mark.gpu
@pytest.mark.parametrize("transpose_w", [False, True], ids=["w", "w^T"])
@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_offsets_pass_two_billion_elements(name, transpose_w):
  # w has 2^31 + 2^22 elements: its last expert lies past 32-bit offsets.
  num_experts, d, n = 513, 2048, 2048
  rng = np.random.default_rng(0)
  last = jnp.asarray(rng.normal(size=(d, n)), jnp.bfloat16)
  w = jnp.zeros((num_experts, d, n), jnp.bfloat16)
  w = jax.jit(lambda w: w.at[-1].set(last), donate_argnums=0)(w)
  x = jnp.asarray(rng.normal(size=(8, d)), jnp.bfloat16)
  routing = route(jnp.full((8, 1), num_experts - 1), num_experts)
  y = load(name).scatter2scatter(x, w, routing, transpose_w=transpose_w)
  factor = last.T if transpose_w else last
  want = np.asarray(x, np.float64) @ np.asarray(factor, np.float64)
  assert_accurate(y, want, jnp.dot(x, factor))
