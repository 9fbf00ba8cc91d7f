"""Products of bfloat16 and float32 by parts, against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import nn as smnn
from scattermoe_jax._compat import Device
from scattermoe_jax.nn import router as router_module
from scattermoe_jax.ops import split_dot as module
from scattermoe_jax.ops.split_dot import is_faster_on, split_dot
from tests.accuracy import assert_accurate

T, D, E = 40, 96, 12
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
  assert is_faster_on(H200)
  assert is_faster_on(Device("gpu", "NVIDIA A100", (8, 0), 108))
  assert not is_faster_on(Device("gpu", "Tesla T4", (7, 5), 40))
  assert not is_faster_on(Device("cpu", "cpu"))


def test_split_dot_multiplies_bfloat16_on_a_gpu(monkeypatch):
  monkeypatch.setattr(module, "current_device", lambda: H200)
  x, w, dy = operands()
  step = lambda x, w, dy: jax.vjp(split_dot, x, w)[1](dy)
  traced = jax.jit(step).trace(x, w, jnp.asarray(dy, jnp.float32))
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  assert len(dots) == 2, "the forward's has no user"
  for line in dots:
    operands_of_dot = line[line.index(": (") : line.index("->")]
    assert operands_of_dot.count("xbf16>") == 2, line


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
  out, _ = call(keys, x)
  assert bool(calls) == splits
  np.testing.assert_array_equal(out.expert_ids, plain.expert_ids)
  np.testing.assert_allclose(out.logits, plain.logits, rtol=0, atol=2e-6)
