"""What a training step keeps and what it holds at its peak."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import scattermoe_jax as sm
from scattermoe_jax.kernels import composed, xla

# The package has the function by this name.
smoe_mlp_module = importlib.import_module("scattermoe_jax.ops.smoe_mlp")

T, k, E, d, n = 64, 4, 8, 96, 16


def layer_inputs(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(keys[0], (T, d), dtype)
  gates = jax.random.uniform(keys[1], (T, k), dtype)
  expert_ids = jax.random.randint(keys[2], (T, k), 0, E)
  w_in = jax.random.normal(keys[3], (E, d, 2 * n), dtype)
  w_out = jax.random.normal(keys[4], (E, n, d), dtype)
  bias_out = jax.random.normal(keys[5], (E, d), dtype)
  return (x, gates, w_in, w_out, bias_out), sm.route(expert_ids, E)


def step(inputs, routing, **options):
  def loss(x, gates, w_in, w_out, bias_out):
    y = sm.smoe_mlp(
      x, gates, routing, w_in, w_out, bias_out=bias_out, **options
    )
    return jnp.sum(y * y), y

  return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)(
    *inputs
  )


@functools.cache
def compiled_step(**options):
  return (
    jax.jit(functools.partial(step, **options)).lower(*layer_inputs()).compile()
  )


@pytest.mark.optimised
def test_chunks_change_no_result():
  inputs, routing = layer_inputs()
  whole = compiled_step()(inputs, routing)
  chunked = compiled_step(num_chunks=3)(inputs, routing)
  for a, b in zip(
    jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True
  ):
    np.testing.assert_array_almost_equal_nulp(
      np.asarray(a), np.asarray(b), nulp=64
    )


@pytest.mark.optimised
def test_chunks_lower_the_peak():
  def peak(**options):
    return compiled_step(**options).memory_analysis().temp_size_in_bytes

  expanded = T * k * d * 4
  assert peak(num_chunks=6) <= peak() - expanded // 2


def test_a_single_choice_is_neither_expanded_nor_summed(monkeypatch):
  (x, gates, w_in, w_out, _), _ = layer_inputs()
  ids = jax.random.randint(jax.random.key(6), (T, 1), -1, E)
  rows = []

  def record(*args, grouped_out=False, **options):
    rows.append((grouped_out, options.get("columns")))
    return xla.scatter2scatter(*args, grouped_out=grouped_out, **options)

  forms = composed.fused_forms(record, xla.group_xty)
  for name in ("down_projection", "up_projection_grad"):
    monkeypatch.setattr(xla, name, getattr(forms, name))
  for name in ("sum_choices", "weighted_sum"):
    monkeypatch.setattr(composed, name, None)

  def loss(x, gates, w_in, w_out):
    routing = sm.route(ids, E)
    options = dict(num_chunks=4, implementation="xla")
    return jnp.sum(sm.smoe_mlp(x, gates, routing, w_in, w_out, **options))

  jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(x, gates[:, :1], w_in, w_out)
  # y, and dx.
  assert rows == [(False, None)] * 2


@pytest.mark.parametrize(
  "case",
  [
    "rows_outgrow_dw_in",
    "rows_fit_in_dw_in",
    "frozen_w_in",
    "frozen_x",
    "on_a_mesh",
  ],
)
def test_gradients_are_made_one_after_the_other(monkeypatch, case):
  calls, within, at_once = [], [], []

  def record(module, name):
    """Keeps the calls that no other recorded call makes."""
    function = getattr(module, name)

    def recorded(*args, **kwargs):
      if not within:
        calls.append(name)
      if "at_once" in kwargs:
        at_once.append(kwargs["at_once"])
      within.append(name)
      results = function(*args, **kwargs)
      within.pop()
      return results

    monkeypatch.setattr(module, name, recorded)

  (x, gates, w_in, w_out, _), routing = layer_inputs()
  for name in (
    "scatter2scatter",
    "group_xty",
    "up_projection_grad",
    "down_projection_grad",
  ):
    record(xla, name)
  record(jax.lax, "optimization_barrier")

  def loss(x, w_in, routing):
    y = sm.smoe_mlp(x, gates, routing, w_in, w_out, implementation="xla")
    return jnp.sum(y)

  assert T * k * d == w_in.size
  if case != "rows_fit_in_dw_in":
    w_in = w_in[:, :, :n]  # Without a gate.
  # What nobody wants is made by itself, for XLA to drop.
  wanted = {"frozen_w_in": 0, "frozen_x": 1}.get(case, (0, 1))
  on_one_device = gradients = jax.grad(loss, wanted)
  if case == "on_a_mesh":
    automatic = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), axis_types=(automatic,))
    split, whole = PartitionSpec("data"), PartitionSpec()
    gradients = jax.shard_map(
      lambda *operands: on_one_device(*operands)[0],
      mesh=mesh,
      in_specs=(split, whole, whole),
      out_specs=split,
    )
    x = jnp.concatenate([x, x])
  jax.make_jaxpr(gradients)(x, w_in, routing)
  backward = calls[calls.index("down_projection_grad") + 1 :]
  assert backward[:3] == [
    "group_xty", "optimization_barrier", "up_projection_grad"
  ]  # fmt: skip
  assert at_once == [case == "rows_outgrow_dw_in"]


def test_gradients_of_biases_wait_for_dx(monkeypatch):
  given, both, bias_grad = {}, xla.up_projection_grad, smoe_mlp_module.bias_grad

  def record_both(x, w, dh, *args, **kwargs):
    given["dx"] = dh
    return both(x, w, dh, *args, **kwargs)

  def record_bias_grad(backend, dh, *args, **kwargs):
    given["dbias"] = dh
    return bias_grad(backend, dh, *args, **kwargs)

  monkeypatch.setattr(xla, "up_projection_grad", record_both)
  monkeypatch.setattr(smoe_mlp_module, "bias_grad", record_bias_grad)
  (x, gates, w_in, w_out, _), routing = layer_inputs()

  def loss(x, bias_in):
    options = dict(bias_in=bias_in, implementation="xla")
    return jnp.sum(sm.smoe_mlp(x, gates, routing, w_in, w_out, **options))

  jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, jnp.ones((E, 2 * n)))
  assert given["dbias"] is not given["dx"], "of a barrier behind dx"


@pytest.mark.parametrize(
  "rows, dw, num_chunks, outgrow",
  [
    (8, 8, 1, False),
    (9, 8, 1, True),
    (9, 4, 2, True),  # A slice outgrows dw as well.
    (8, 4, 2, False),  # A slice would have its memory.
    (8, 4, 3, False),
    (8, 4, 4, True),  # It would too, but is small.
    (4, 4, 8, False),  # All rows would have its memory.
  ],
)
def test_rows_stay_beside_dw_where_that_costs_little(
  rows, dw, num_chunks, outgrow
):
  assert smoe_mlp_module._outgrow(rows, dw, num_chunks) == outgrow


def test_rows_are_summed_before_the_product_is_made(monkeypatch):
  calls = []

  def recorded(name, function):
    def run(*args, **kwargs):
      calls.append(name)
      return function(*args, **kwargs)

    return run

  (x, _, w_in, *_), routing = layer_inputs()
  for module, name in (
    (composed, "sum_choices"),
    (jax.lax, "optimization_barrier"),
  ):
    monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
  rows_of_dx = lambda *_, **__: jnp.ones((T * k, d))
  forms = composed.fused_forms(rows_of_dx, recorded("group_xty", xla.group_xty))
  forms.up_projection_grad(x, w_in, jnp.ones((T * k, 2 * n)), routing)
  assert calls[:3] == ["sum_choices", "optimization_barrier", "group_xty"]


def test_chunks_must_divide_the_width():
  inputs, routing = layer_inputs()
  with pytest.raises(
    ValueError, match="num_chunks must be a divisor of d = 96"
  ):
    step(inputs, routing, num_chunks=5)


@pytest.mark.parametrize("keep", ["nothing", "h", "everything"])
def test_remat_policy_keeps_what_it_says(keep):
  inputs, routing = layer_inputs()

  def layer(x):
    return sm.smoe_mlp(x, inputs[1], routing, inputs[2], inputs[3])

  saving = jax.checkpoint(layer, policy=sm.remat_policy(keep))
  backward = jax.eval_shape(lambda x: jax.vjp(saving, x)[1], inputs[0])
  kept = [a.shape for a in jax.tree.leaves(backward)]
  h = (T * k, 2 * n)
  assert (h in kept) == (keep != "nothing")
  assert (T * k, d) not in kept


def test_unknown_remat_policy_is_named():
  with pytest.raises(ValueError, match="keep must be one of .*got 'all'"):
    sm.remat_policy("all")
