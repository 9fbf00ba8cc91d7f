"""Products of bfloat16 and float32 by parts, against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import nn as smnn
from scattermoe_jax._compat import Device
from scattermoe_jax.nn import router as router_module
from scattermoe_jax.ops.split_dot import multiplies_bfloat16, split_dot
from tests.accuracy import assert_accurate

T, D, E = 256, 96, 12
H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)


def operands(seed=0):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16)
  # Of many sizes, so that a part which is left out shows.
  w = rng.normal(size=(D, E)) * 10.0 ** rng.integers(-3, 4, size=(D, E))
  return x, jnp.asarray(w, jnp.float32), rng.normal(size=(T, E))


def wide_dot(x, w):
  return jnp.dot(x.astype(jnp.float32), w, precision="highest")


def test_split_dot_is_as_exact_as_float32():
  x, w, _ = operands()
  truth = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  got = jax.jit(split_dot)(x, w)
  assert got.dtype == jnp.float32
  assert_accurate(got, truth, wide_dot(x, w))


def test_gradients_of_split_dot_are_as_exact_as_their_dtypes():
  x, w, dy = operands()
  dy = jnp.asarray(dy, jnp.float32)
  pull = lambda f: jax.jit(lambda x, w: jax.vjp(f, x, w)[1](dy))(x, w)
  (dx, dw), (plain_dx, plain_dw) = pull(split_dot), pull(wide_dot)
  assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
  x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
  assert_accurate(dx, dy64 @ w64.T, plain_dx)
  assert_accurate(dw, x64.T @ dy64, plain_dw)
  # A part that is left out is worth as much as dx's own rounding.
  rms = lambda a: np.sqrt(
    np.mean((np.asarray(a, np.float64) - dy64 @ w64.T) ** 2)
  )
  assert rms(dx) < 1.02 * rms(plain_dx)


def test_split_dot_in_a_batch():
  x, w, _ = operands()
  batch = jnp.stack([x, 2 * x])
  got = jax.vmap(split_dot, in_axes=(0, None))(batch, w)
  truth = np.asarray(batch, np.float64) @ np.asarray(w, np.float64)
  assert_accurate(got, truth, wide_dot(batch, w))


def test_split_dot_refuses_a_second_derivative():
  x, w, _ = operands()
  slope = jax.grad(lambda w: jnp.sum(split_dot(x, w) ** 2))
  with pytest.raises(NotImplementedError, match="split_dot: second"):
    jax.grad(lambda w: jnp.sum(slope(w)))(w)


def test_split_dot_is_for_gpus_that_multiply_bfloat16():
  assert multiplies_bfloat16(H200)
  assert multiplies_bfloat16(Device("gpu", "NVIDIA A100", (8, 0), 108))
  assert not multiplies_bfloat16(Device("gpu", "Tesla T4", (7, 5), 40))
  assert not multiplies_bfloat16(Device("cpu", "cpu"))


@pytest.mark.parametrize("setting", [None, "BF16_BF16_BF16", "highest"])
def test_split_dot_multiplies_bfloat16_on_a_gpu(setting):
  x, w, dy = operands()
  step = lambda x, w, dy: jax.vjp(split_dot, x, w)[1](dy)
  with jax.default_matmul_precision(setting):
    traced = jax.jit(step).trace(x, w, jnp.asarray(dy, jnp.float32))
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  # A pair of casts could be taken for nothing.
  assert "stablehlo.reduce_precision" in text
  dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  assert len(dots) == 2, "the forward's has no user"
  for line in dots:
    operands_of_dot = line[line.index(": (") : line.index("->")]
    assert operands_of_dot.count("xbf16>") == 2, line
    assert "algorithm" not in line and "HIGHEST" not in line, line


@pytest.mark.parametrize(
  ("fields", "x_dtype", "splits"),
  [
    ({}, jnp.bfloat16, True),
    ({}, jnp.float32, False),
    ({}, jnp.float16, False),
    ({"jitter": 0.1}, jnp.bfloat16, False),
    ({"dtype": jnp.bfloat16}, jnp.bfloat16, False),
    ({"param_dtype": jnp.bfloat16}, jnp.bfloat16, False),
    ({"precision": None}, jnp.bfloat16, False),
  ],
)
def test_router_splits_where_nothing_else_is_asked_for(
  monkeypatch, fields, x_dtype, splits
):
  calls = []

  def counted(x, w):
    calls.append(x.dtype)
    return split_dot(x, w)

  monkeypatch.setattr(router_module, "split_dot", counted)
  x = operands()[0].astype(x_dtype)
  router = smnn.Router(E, 2, **fields)
  keys = {"params": jax.random.key(0), "router": jax.random.key(1)}
  call = functools.partial(router.init_with_output, deterministic=False)
  plain, _ = call(keys, x)
  assert not calls, "on a CPU"
  monkeypatch.setattr(router_module, "current_device", lambda: H200)
  out, params = call(keys, x)
  assert bool(calls) == splits
  np.testing.assert_array_equal(out.expert_ids, plain.expert_ids)
  if splits:
    kernel = params["params"]["kernel"]
    truth = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert_accurate(out.logits, truth, plain.logits)


def test_router_does_not_split_few_tokens(monkeypatch):
  monkeypatch.setattr(router_module, "current_device", lambda: H200)
  refuse = lambda *_: pytest.fail("split")
  monkeypatch.setattr(router_module, "split_dot", refuse)
  smnn.Router(E, 2).init_with_output(jax.random.key(0), operands()[0][:255])


def test_split_dot_under_shard_map():
  x, w, dy = operands()
  dy = jnp.asarray(dy, jnp.float32)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
  spec = jax.sharding.PartitionSpec

  def step(x, w, dy):
    y, pull = jax.vjp(split_dot, x, w)
    return y, *pull(dy)

  data, everywhere = spec("data"), spec()
  sharded = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(data, everywhere, data),
    out_specs=(data, data, everywhere),
  )
  got, whole = jax.jit(sharded)(x, w, dy), step(x, w, dy)
  x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
  truth = (x64 @ w64, dy64 @ w64.T, x64.T @ dy64)
  for one, right, plain in zip(got, truth, whole, strict=True):
    assert_accurate(one, right, plain)


@pytest.mark.gpu
def test_split_dot_on_a_gpu_rounds_no_operand():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(4096, 2048)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(2048, 128)), jnp.float32)
  dy = jnp.asarray(rng.normal(size=(4096, 128)), jnp.float32)
  y, pull = jax.vjp(jax.jit(split_dot), x, w)
  dx, dw = pull(dy)
  x64, w64, dy64 = (np.asarray(a, np.float64) for a in (x, w, dy))
  # A part left out would show at 2^-17, TF32 at 2^-11, of the sum of sizes.
  for got, a, b in ((y, x64, w64), (dw, x64.T, dy64)):
    bound = 2.0**-19 * np.max(np.abs(a) @ np.abs(b))
    assert np.max(np.abs(np.asarray(got, np.float64) - a @ b)) < bound
  assert_accurate(dx, dy64 @ w64.T, None)
