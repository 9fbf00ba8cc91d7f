"""smoe_mlp: every form's calculus in float64, accuracy, and what it keeps."""

import functools
import importlib
import itertools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from scattermoe_jax import (
  ACTIVATIONS,
  Routing,
  remat_policy,
  route,
  smoe_mlp,
)
from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels import IMPLEMENTATIONS, Problem, composed, xla
from scattermoe_jax.kernels.contract import reason_against
from tests import oracle, plain, strategies
from tests.accuracy import assert_accurate
from tests.conftest import enable_x64, on_cpu, poison_memory
from tests.strategies import Case

CASE = Case(12, 3, 5, 10, 6)
# Each activation once, gated and plain in turn; the other half with `-m slow`.
FORMS = [
  pytest.param(
    name, gated, marks=[] if gated == (i % 2 == 0) else [pytest.mark.slow]
  )
  for i, name in enumerate(ACTIVATIONS)
  for gated in (False, True)
  if gated or name != "clamped_swiglu"
]


class Inputs(NamedTuple):
  """What is differentiated; biases are None where there are none."""

  x: jax.Array
  gates: jax.Array
  w_in: jax.Array
  w_out: jax.Array
  bias_in: jax.Array | None
  bias_out: jax.Array | None


def inputs(case, dtype, *, gated=True, bias=True, seed=0):
  rng = np.random.default_rng(seed)
  num_experts, d, n = case.num_experts, case.d, case.n
  m = 2 * n if gated else n

  def normal(*shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), dtype)

  return Inputs(
    normal(case.num_tokens, d),
    normal(case.num_tokens, case.top_k),
    normal(num_experts, d, m, scale=d**-0.5),
    normal(num_experts, n, d, scale=n**-0.5),
    normal(num_experts, m) if bias else None,
    normal(num_experts, d) if bias else None,
  )


def ours(inputs, ids, activation, num_experts, **options):
  x, gates, w_in, w_out, bias_in, bias_out = inputs
  return smoe_mlp(
    x,
    gates,
    route(ids, num_experts),
    w_in,
    w_out,
    bias_in=bias_in,
    bias_out=bias_out,
    activation=activation,
    precision="highest",
    **options,
  )


def theirs(inputs, ids, activation, num_experts, matmul=None):
  del num_experts
  x, gates, *weights = inputs
  return plain.smoe_mlp(
    x, gates, ids, *weights, activation=activation, matmul=matmul
  )


textbook = functools.partial(theirs, matmul=plain.textbook_matmul)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def value_and_grads(function, inputs, ids, activation, num_experts):
  """(y, gradients of <y, dy> in the order of `inputs`), biases only if any."""
  y, vjp = jax.vjp(
    lambda inputs: function(inputs, ids, activation, num_experts), inputs
  )
  # Counted in float32: float16 ends at 65504.
  dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32))
  dy = dy.astype(y.dtype).reshape(y.shape)
  return jax.tree.leaves((y, vjp(dy)))


NAMES = ("y", "dx", "dgates", "dw_in", "dw_out", "dbias_in", "dbias_out")


def assert_all_accurate(got, truth, baseline=None, err_msg=""):
  baseline = baseline or [None] * len(got)
  for name, a, b, c in zip(NAMES, got, truth, baseline, strict=False):
    assert_accurate(a, b, c, err_msg=f"{err_msg} {name}")
  assert len(got) == len(truth) == len(baseline)


@pytest.mark.parametrize(("activation", "gated"), FORMS)
def test_every_form_equals_autodiff_in_float64(activation, gated, x64):
  arrays = inputs(CASE, jnp.float64, gated=gated)
  ids = strategies.expert_ids(CASE, "some_not_here")
  form = (arrays, ids, activation, CASE.num_experts)
  got = value_and_grads(ours, *form)
  assert_all_accurate(got, value_and_grads(theirs, *form))
  x, gates, w_in, w_out, bias_in, bias_out = arrays
  truth = oracle.smoe_mlp(
    x,
    gates,
    ids,
    w_in,
    w_out,
    bias_in=bias_in,
    bias_out=bias_out,
    activation=activation,
  )
  assert_accurate(got[0], truth, None)


@pytest.mark.parametrize("pattern", strategies.PATTERNS)
def test_every_routing_equals_autodiff_in_float64(pattern, x64):
  arrays = inputs(CASE, jnp.float64)
  ids = strategies.expert_ids(CASE, pattern)
  form = (arrays, ids, "silu", CASE.num_experts)
  assert_all_accurate(
    value_and_grads(ours, *form), value_and_grads(theirs, *form)
  )


# The last has slices of a single column.
@pytest.mark.parametrize(
  "unroll, num_chunks", [(False, 2), (True, 2), (False, 10)]
)
def test_slices_of_columns_equal_autodiff_in_float64(
  unroll, num_chunks, monkeypatch, x64
):
  if unroll:  # Any backend but xla has no loop over slices.
    another = types.ModuleType("another")
    vars(another).update(vars(xla))
    forms = composed.fused_forms(xla.scatter2scatter, xla.group_xty)
    vars(another).update(forms._asdict())
    module = importlib.import_module("scattermoe_jax.ops.smoe_mlp")
    monkeypatch.setattr(module, "choose_backend", lambda *_: another)
  arrays = inputs(CASE, jnp.float64)
  ids = strategies.expert_ids(CASE, "some_not_here")
  form = (ids, "silu", CASE.num_experts)
  chunked = functools.partial(ours, num_chunks=num_chunks)
  got = value_and_grads(chunked, arrays, *form)
  assert_all_accurate(got, value_and_grads(theirs, arrays, *form))
  x, gates, w_in, w_out, bias_in, bias_out = arrays
  truth = oracle.smoe_mlp(
    x, gates, ids, w_in, w_out, bias_in=bias_in, bias_out=bias_out
  )
  assert_accurate(got[0], truth, None)


@pytest.mark.parametrize(
  "case", strategies.CASES[1:3], ids=["T1_k_is_E", "ones"]
)
def test_small_shapes_equal_autodiff_in_float64(case, x64):
  arrays = inputs(case, jnp.float64)
  ids = strategies.expert_ids(case, "even")
  form = (arrays, ids, "gelu", case.num_experts)
  assert_all_accurate(
    value_and_grads(ours, *form), value_and_grads(theirs, *form)
  )


@pytest.mark.parametrize("keep", [None, "h"])
def test_one_choice_a_token_equals_autodiff_in_float64(keep, x64):
  case = CASE._replace(num_tokens=23, top_k=1)
  arrays = inputs(case, jnp.float64)
  ids = strategies.expert_ids(case, "some_not_here")
  here = (ids >= 0) & (ids < case.num_experts)
  form = (ids, "silu", case.num_experts)
  expected = value_and_grads(theirs, arrays, *form)
  # What is not here may hold anything.
  x = jnp.where(here, arrays.x, jnp.nan)
  gates = jnp.where(here, arrays.gates, jnp.nan)
  layer = functools.partial(ours, num_chunks=2)
  if keep:

    def saving(arrays, *static):
      run = lambda arrays: layer(arrays, *static)
      return jax.checkpoint(run, policy=remat_policy(keep))(arrays)

  function = saving if keep else layer
  got = value_and_grads(function, arrays._replace(x=x, gates=gates), *form)
  assert_all_accurate(got, expected)
  nowhere = ~here[:, 0]
  assert nowhere.any() and not any(np.any(a[nowhere]) for a in got[:3])


def test_gradients_equal_finite_differences(x64):
  arrays = inputs(CASE, jnp.float64)
  ids = jnp.asarray(strategies.expert_ids(CASE, "skewed"))
  layer = jax.jit(lambda arrays: ours(arrays, ids, "silu", CASE.num_experts))
  check_grads(layer, (arrays,), order=1, modes=["rev"])


def assert_as_accurate_as_plain_xla(
  case, dtype, activation, *, gated, bias, function=ours, orders=(theirs,)
):
  arrays = inputs(case, dtype, gated=gated, bias=bias)
  ids = strategies.expert_ids(case, "skewed")
  form = (ids, activation, case.num_experts)
  baselines = [value_and_grads(order, arrays, *form) for order in orders]
  baseline = [list(results) for results in zip(*baselines, strict=True)]
  poison_memory()
  got = value_and_grads(function, arrays, *form)
  with on_cpu(), enable_x64():
    wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), "float64"), arrays)
    truth = value_and_grads(theirs, wide, *form)
  for a, array in zip(got[1:], jax.tree.leaves(arrays), strict=True):
    assert a.dtype == array.dtype
  assert_all_accurate(got, truth, baseline, err_msg=str(case))


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_every_dtype_is_as_accurate_as_plain_xla(dtype):
  assert_as_accurate_as_plain_xla(CASE, dtype, "silu", gated=True, bias=True)


_IMPLEMENTED = {
  name: functools.partial(ours, implementation=name) for name in IMPLEMENTATIONS
}


def assert_gates_of_no_group_add_nothing(case, dtype, function):
  ids = jnp.asarray(strategies.expert_ids(case, "some_not_here"))
  here = (ids >= 0) & (ids < case.num_experts)
  arrays = inputs(case, dtype)
  form = (ids, "silu", case.num_experts)
  expected = value_and_grads(function, arrays, *form)
  for value in (jnp.nan, jnp.inf):
    gates = jnp.where(here, arrays.gates, jnp.full_like(arrays.gates, value))
    got = value_and_grads(function, arrays._replace(gates=gates), *form)
    for name, a, b in zip(NAMES, got, expected, strict=True):
      np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_gates_of_no_group_may_hold_anything(num_chunks):
  chunked = functools.partial(ours, num_chunks=num_chunks)
  assert_gates_of_no_group_add_nothing(CASE, jnp.float32, chunked)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gates_of_no_group_may_hold_anything_on_a_gpu(name, top_k):
  case = Case(300, top_k, 8, 256, 128)
  problem = Problem(case.num_rows, 8, 256, 128, "bfloat16", current_device())
  if reason := reason_against(name, [problem]):
    pytest.skip(reason)
  assert_gates_of_no_group_add_nothing(case, jnp.bfloat16, _IMPLEMENTED[name])


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_backend_trains_on_a_gpu(name, top_k, dtype, bias):
  case = Case(300, top_k, 8, 256, 128)
  problem = Problem(
    case.num_rows, 8, 256, 128, str(jnp.dtype(dtype)), current_device()
  )
  if reason := reason_against(name, [problem]):
    pytest.skip(reason)
  assert_as_accurate_as_plain_xla(
    case,
    dtype,
    "silu",
    gated=True,
    bias=bias,
    function=_IMPLEMENTED[name],
    orders=(theirs, textbook) if dtype == jnp.float32 else (theirs,),
  )


# In two chunks rows of dx and dw_in take turns in memory; in four they are
# made together, by a backend that can.
@pytest.mark.gpu
@pytest.mark.parametrize("num_chunks", [2, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_chunks_train_on_a_gpu(name, num_chunks):
  case = Case(1000, 4, 8, 256, 128)
  problem = Problem(case.num_rows, 8, 256, 128, "bfloat16", current_device())
  if reason := reason_against(name, [problem]):
    pytest.skip(reason)
  whole = _IMPLEMENTED[name]
  chunked = functools.partial(whole, num_chunks=num_chunks)
  assert_as_accurate_as_plain_xla(
    case, jnp.bfloat16, "silu", gated=True, bias=True, function=chunked
  )
  if name != "mosaic":
    return
  ids = strategies.expert_ids(case, "skewed")
  form = (inputs(case, jnp.bfloat16), ids, "silu", case.num_experts)
  expected = value_and_grads(whole, *form)
  for _ in range(3):
    poison_memory()
    got = value_and_grads(chunked, *form)
    for field, a, b in zip(NAMES, got, expected, strict=True):
      np.testing.assert_array_equal(a, b, err_msg=field)


def _matrix():
  """The predecessor's own test matrix: n = 4d // k, E = 8, GELU."""
  sizes = itertools.product((128, 256, 512, 600, 100), (1, 256, 512))
  for (d, tokens), top_k, bias in itertools.product(
    sizes, (2, 3, 4), (False, True)
  ):
    case = Case(tokens, top_k, 8, d, 4 * d // top_k)
    run_id = f"{tokens}-{d}-{top_k}{'-bias' if bias else ''}"
    marks = [] if run_id in _ALWAYS else [pytest.mark.slow]
    yield pytest.param(case, bias, id=run_id, marks=marks)


# Every value of every axis; the rest is for `-m slow`.
_ALWAYS = ("256-128-2-bias", "512-256-3", "1-600-4-bias", "256-100-3-bias")


@pytest.mark.optimised
@pytest.mark.parametrize(("case", "bias"), list(_matrix()))
def test_the_predecessors_matrix(case, bias):
  assert_as_accurate_as_plain_xla(
    case, jnp.float32, "gelu", gated=False, bias=bias
  )


def small_layer(dtype=jnp.float32):
  ids = jnp.asarray(strategies.expert_ids(CASE, "skewed"))
  return inputs(CASE, dtype, bias=False), route(ids, CASE.num_experts)


def layer_of(routing):
  return lambda x, gates, w_in, w_out: smoe_mlp(x, gates, routing, w_in, w_out)


def id_bytes(case):
  return 4 * (3 * case.num_rows + case.num_experts)


@pytest.mark.parametrize("gated", [False, True])
def test_residuals_are_those_of_a_dense_mlp(gated):
  # 2 T d + 2 S m bytes in bfloat16, m = 2n with a gate; beyond them only the
  # gates, the ids and the weights, which exist anyway.
  case = CASE
  ids = jnp.asarray(strategies.expert_ids(case, "even"))
  arrays = inputs(case, jnp.bfloat16, gated=gated, bias=False)
  x, gates, w_in, w_out = arrays[:4]
  layer = layer_of(route(ids, case.num_experts))
  kept = jax.tree.leaves(
    jax.eval_shape(lambda *given: jax.vjp(layer, *given)[1], *arrays[:4])
  )
  m = (2 if gated else 1) * case.n
  activations = 2 * case.num_tokens * case.d + 2 * case.num_rows * m
  others = gates.nbytes + w_in.nbytes + w_out.nbytes + id_bytes(case)
  kept_bytes = sum(a.size * a.dtype.itemsize for a in kept)
  assert kept_bytes == activations + others
  shapes = [a.shape for a in kept]
  assert (case.num_rows, case.d) not in shapes  # neither grouped x nor y
  assert gated <= ((case.num_rows, case.n) not in shapes)  # nor a


def test_checkpoint_policies_see_h_by_its_name():
  arrays, routing = small_layer()
  weights = arrays[1:4]
  layer = lambda x: layer_of(routing)(x, *weights)

  def kept(policy):
    saving = jax.checkpoint(layer, policy=policy)
    vjp = jax.eval_shape(lambda x: jax.vjp(saving, x)[1], arrays.x)
    return [a.shape for a in jax.tree.leaves(vjp)]

  h = (CASE.num_rows, 2 * CASE.n)
  policies = jax.checkpoint_policies
  assert h in kept(policies.save_only_these_names("smoe_h"))
  assert h not in kept(policies.save_only_these_names("another"))
  assert h not in kept(policies.nothing_saveable)


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_runs_under_vmap(num_chunks, x64):
  arrays, _ = small_layer(jnp.float64)
  x, gates, w_in, w_out = arrays[:4]
  ids = jnp.asarray(strategies.expert_ids(CASE, "skewed"))

  def grads(x, w_in, ids):
    routing = route(ids, CASE.num_experts)
    loss = lambda x, w_in: jnp.sum(
      jnp.sin(smoe_mlp(x, gates, routing, w_in, w_out, num_chunks=num_chunks))
    )
    return jax.grad(loss, argnums=(0, 1))(x, w_in)

  xs, ws = jnp.stack([x, 2 * x]), jnp.stack([w_in, -w_in])
  both_ids = jnp.stack([ids, ids[::-1]])
  batched = jax.jit(jax.vmap(grads))(xs, ws, both_ids)
  one = jax.jit(grads)
  for i in range(2):
    for a, b in zip(batched, one(xs[i], ws[i], both_ids[i]), strict=True):
      assert_accurate(a[i], b, None)


def test_runs_under_scan_and_checkpoint(x64):
  arrays, routing = small_layer(jnp.float64)
  x, gates, w_in, w_out = arrays[:4]
  layer = lambda x, w: x + smoe_mlp(x, gates, routing, w, w_out)

  def by_scan(x, ws):
    step = jax.checkpoint(lambda x, w: (layer(x, w), None))
    return jnp.sum(jax.lax.scan(step, x, ws)[0])

  def by_loop(x, ws):
    for w in ws:
      x = layer(x, w)
    return jnp.sum(x)

  ws = jnp.stack([w_in, -w_in])
  scanned = jax.jit(jax.grad(by_scan, argnums=(0, 1)))(x, ws)
  looped = jax.jit(jax.grad(by_loop, argnums=(0, 1)))(x, ws)
  for a, b in zip(scanned, looped, strict=True):
    assert_accurate(a, b, None)


def test_no_tokens_give_no_rows_and_no_gradient():
  routing = route(jnp.zeros((0, 2), jnp.int32), 3)
  w_in, w_out = jnp.ones((3, 4, 10)), jnp.ones((3, 5, 4))
  biases = {"bias_in": jnp.ones((3, 10)), "bias_out": jnp.ones((3, 4))}
  y, vjp = jax.vjp(
    lambda x, gates, w_in, w_out, biases: smoe_mlp(
      x, gates, routing, w_in, w_out, **biases
    ),
    jnp.ones((0, 4)),
    jnp.ones((0, 2)),
    w_in,
    w_out,
    biases,
  )
  assert y.shape == (0, 4)
  dx, dgates, *dweights = vjp(y)
  assert dx.shape == (0, 4) and dgates.shape == (0, 2)
  assert not any(np.any(a) for a in jax.tree.leaves(dweights))


def test_only_the_first_derivative_is_defined():
  arrays, routing = small_layer()
  x, *weights = arrays[:4]
  layer = lambda x: jnp.sum(jnp.sin(layer_of(routing)(x, *weights)))
  with pytest.raises(
    NotImplementedError, match="smoe_mlp: second derivatives are not defined"
  ):
    jax.grad(lambda x: jnp.sum(jax.grad(layer)(x) ** 2))(x)


def test_gates_may_be_wider_than_x():
  arrays, routing = small_layer(jnp.bfloat16)
  x, gates, w_in, w_out = arrays[:4]
  gates = gates.astype(jnp.float32)
  y, vjp = jax.vjp(layer_of(routing), x, gates, w_in, w_out)
  assert y.dtype == jnp.bfloat16
  assert [a.dtype for a in vjp(y)] == [x.dtype, gates.dtype, x.dtype, x.dtype]


def test_routing_is_a_plain_tuple_of_arrays():
  _, routing = small_layer()
  rebuilt = Routing(*jax.tree.map(lambda a: a + 0, tuple(routing)))
  assert jax.tree.structure(rebuilt) == jax.tree.structure(routing)
