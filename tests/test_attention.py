"""Mixture of attention, its cache, masks and memory, against plain loops."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

import scattermoe_jax as sm
from benchmarks import attention_layers, bench_attention
from scattermoe_jax import nn as smnn
from scattermoe_jax.kernels import mosaic
from scattermoe_jax.ops import linear_combine
from tests import oracle
from tests.accuracy import assert_accurate
from tests.test_lowering import described

B, L, D, E, K, H, C = 2, 7, 12, 6, 2, 3, 8
T = B * L


def module(**fields):
  return smnn.MixtureOfAttention(
    num_experts=E, top_k=K, num_heads=H, head_dim=C, **fields
  )


def tokens(length=L, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(0), (B, length, D), dtype)


def randomized(layer, x):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
  return jax.tree.map(
    lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.4, a.dtype), shapes
  )


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_moa_on_several_devices_runs_inside_shard_map_and_says_so():
  layer, x = module(implementation="xla"), tokens()
  variables = randomized(layer, x)
  apply = lambda v, x: layer.apply(v, x)[0]
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
  split, whole = jax.P("data"), jax.P()
  wrapped = jax.shard_map(
    apply, mesh=mesh, in_specs=(whole, split), out_specs=split
  )
  expected = jax.jit(apply)(variables, x)
  error = jnp.abs(jax.jit(wrapped)(variables, x) - expected).max()
  assert error < 1e-6 * jnp.abs(expected).max()
  x = jax.device_put(x, jax.sharding.NamedSharding(mesh, split))
  with pytest.warns(UserWarning, match="shard_map.*MixtureOfAttention"):
    jax.jit(apply).lower(variables, x)


@contextlib.contextmanager
def as_users_have_it():
  """JAX's own settings for promotion, which a program runs under."""
  with (
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    yield


def slow_rotary(vector, position, theta=10000.0):
  half = len(vector) // 2
  out = np.empty_like(vector)
  for i in range(half):
    angle = position * theta ** (-i / half)
    a, b = vector[i], vector[i + half]
    out[i] = a * np.cos(angle) - b * np.sin(angle)
    out[i + half] = b * np.cos(angle) + a * np.sin(angle)
  return out


def slow_moa(params, x, segment_ids, positions, window=None):
  """Loops over token, choice, head and earlier token, in float64."""
  params = jax.tree.map(oracle.f64, params)
  x = oracle.f64(x)
  y = np.zeros_like(x)
  key, value = np.split(x @ params["key_value"]["kernel"], 2, axis=-1)
  logits = x @ params["router"]["kernel"]
  heads = lambda row: row.reshape(H, C)
  for b in range(B):
    for t in range(x.shape[1]):
      if segment_ids[b, t] == 0:
        continue
      ids = sorted(range(E), key=lambda e: -logits[b, t, e])[:K]
      gates = np.exp(logits[b, t, ids] - logits[b, t, ids].max())
      gates /= gates.sum()
      seen = [
        s
        for s in range(t + 1)
        if segment_ids[b, s] == segment_ids[b, t]
        and (window is None or t - s < window)
      ]
      for gate, e in zip(gates, ids, strict=True):
        query = heads(x[b, t] @ params["query"]["kernel"][e])
        out = np.zeros((H, C))
        for i in range(H):
          q = slow_rotary(query[i], positions[b, t])
          scores = np.array(
            [
              q @ slow_rotary(heads(key[b, s])[i], positions[b, s])
              for s in seen
            ]
          )
          probs = np.exp((scores - scores.max()) * C**-0.5)
          probs /= probs.sum()
          out[i] = sum(
            p * heads(value[b, s])[i] for p, s in zip(probs, seen, strict=True)
          )
        y[b, t] += gate * (out.reshape(-1) @ params["output"]["kernel"][e])
  return y


PADDED = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
PACKED = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 3, 3, 0]])
RESTARTED = np.array([[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 0]])
ONES, IN_ORDER = np.ones((B, L), int), np.tile(np.arange(L), (B, 1))


@pytest.mark.parametrize(
  ("segment_ids", "positions", "window"),
  [
    (ONES, IN_ORDER, None),
    (ONES, IN_ORDER, 3),
    (PADDED, IN_ORDER, None),
    (PACKED, RESTARTED, 2),
  ],
  ids=["causal", "window", "padded", "packed"],
)
def test_moa_equals_its_definition(segment_ids, positions, window):
  layer, x = module(sliding_window=window), tokens()
  variables = randomized(layer, x)
  given = {}
  if segment_ids is not ONES:
    given["segment_ids"] = jnp.asarray(segment_ids)
  if positions is not IN_ORDER:
    given["positions"] = jnp.asarray(positions)
  y, metrics, cache = jax.jit(lambda v, x: layer.apply(v, x, **given))(
    variables, x
  )
  expected = slow_moa(variables["params"], x, segment_ids, positions, window)
  error = np.abs(y - expected).max() / np.abs(expected).max()
  assert error < 2e-6
  assert metrics.tokens_per_expert.sum() == K * (segment_ids != 0).sum()
  assert cache is None


def test_a_new_layer_answers_as_loudly_as_a_dense_one():
  # Values of variance one, seen by themselves alone, and gates that are even.
  layer = smnn.MixtureOfAttention(
    num_experts=8, top_k=4, num_heads=4, head_dim=16, sliding_window=1,
    router_kernel_init=nn.initializers.zeros_init(),
  )  # fmt: skip
  x = jax.random.normal(jax.random.key(0), (8, 16, 128))
  variables = jax.jit(layer.init)(jax.random.key(1), x)
  y = jax.jit(layer.apply)(variables, x)[0]
  np.testing.assert_allclose(np.var(y), 1, rtol=0.1)


@pytest.mark.parametrize("shape", [(0, L, D), (B, 0, D)])
def test_no_tokens_give_an_empty_result(shape):
  layer = module(use_output_bias=True)
  variables = randomized(layer, tokens())
  y, metrics, _ = layer.apply(
    variables, jnp.zeros(shape), mask=jnp.ones(shape[:2], bool)
  )
  assert y.shape == shape
  assert metrics.load_balancing_loss == 0
  assert not np.any(metrics.tokens_per_expert)
  total = lambda variables: jnp.sum(layer.apply(variables, jnp.zeros(shape))[0])
  assert not any(map(np.any, jax.tree.leaves(jax.grad(total)(variables))))


def test_mask_is_padding():
  layer, x = module(use_output_bias=True), tokens()
  variables = randomized(layer, x)
  apply = jax.jit(lambda **given: layer.apply(variables, x, **given)[0])
  masked = apply(mask=jnp.asarray(PADDED != 0))
  segments = apply(segment_ids=jnp.asarray(PADDED))
  np.testing.assert_array_equal(masked, segments)
  assert not np.any(np.asarray(masked)[PADDED == 0])
  both = apply(mask=jnp.asarray(PADDED != 0), segment_ids=jnp.asarray(PACKED))
  packed = apply(segment_ids=jnp.asarray(PACKED * (PADDED != 0)))
  np.testing.assert_array_equal(both, packed)


def test_padding_may_hold_anything():
  layer, x = module(use_output_bias=True), tokens()
  params = randomized(layer, x)["params"]
  ids = jnp.asarray(PADDED)

  def run(params, x):
    y, metrics, _ = layer.apply({"params": params}, x, segment_ids=ids)
    return jnp.sum(y**2) + metrics.load_balancing_loss, (y, metrics)

  step = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
  clean = step(params, x)
  for padding in (jnp.nan, jnp.inf):
    got = step(params, jnp.where((ids == 0)[:, :, None], padding, x))
    jax.tree.map(np.testing.assert_array_equal, got, clean)


@pytest.mark.parametrize("window", [None, 3])
def test_prefill_and_decode_equal_the_full_pass(window):
  layer, x = module(sliding_window=window), tokens()
  variables = randomized(layer, x)
  # Left padding in one sequence: slots and positions differ.
  segment_ids = jnp.asarray(PADDED).at[1].set(1)
  positions = jnp.asarray(np.maximum(np.cumsum(segment_ids, axis=1) - 1, 0))
  apply = jax.jit(
    lambda x, s, p, cache: layer.apply(
      variables, x, segment_ids=s, positions=p, cache=cache
    )
  )
  full = apply(x, segment_ids, positions, None)[0]
  cache = smnn.KVCache.empty(B, L + 2, H, C)
  parts, start = [], 0
  for length in (4, 1, 1, 1):
    part = slice(start, start + length)
    y, _, cache = apply(
      x[:, part], segment_ids[:, part], positions[:, part], cache
    )
    parts.append(y)
    start += length
  got = jnp.concatenate(parts, axis=1)
  real = np.asarray(segment_ids != 0)
  error = np.abs(np.asarray(got - full)[real]).max() / np.abs(full).max()
  assert error < 1e-6
  assert cache.length == L


def test_cache_holds_the_heads_of_one_expert():
  cache = jax.eval_shape(
    lambda: smnn.KVCache.empty(1, 1, 4, 128, dtype=jnp.bfloat16)
  )
  size = lambda a: a.size * a.dtype.itemsize
  assert size(cache.key) + size(cache.value) == 2048


def test_an_empty_cache_can_be_donated():
  longer = jax.jit(lambda c: c._replace(length=c.length + 1), donate_argnums=0)
  assert longer(smnn.KVCache.empty(1, 8, 2, 4)).length == 1


def test_a_cache_may_be_filled_to_its_last_slot():
  q, k, v = jax.random.normal(jax.random.key(0), (3, B, L, H, C))
  got, cache = smnn.attend(q, k, v, cache=smnn.KVCache.empty(B, L, H, C))
  assert cache.length == L
  expected, _ = smnn.attend(q, k, v)
  np.testing.assert_array_equal(got, expected)


def test_tokens_past_the_last_slot_make_nan():
  q, k, v = jax.random.normal(jax.random.key(0), (3, B, L, H, C))
  step = jax.jit(lambda q, k, v, cache: smnn.attend(q, k, v, cache=cache))
  y, cache = step(q, k, v, smnn.KVCache.empty(B, L, H, C))
  assert np.isfinite(y).all()
  for token in (0, 1):  # No later one is right again.
    part = (a[:, token : token + 1] for a in (q, k, v))
    y, cache = step(*part, cache)
    assert np.isnan(y).all() and cache.length == L + token + 1


def test_padding_of_wide_numpy_arrays_is_finite(unchecked):
  q = np.random.default_rng(0).normal(size=(1, 2, 2, 8))
  got, _ = smnn.attend(q, q, q, segment_ids=jnp.array([[1, 0]]))
  assert got.dtype == jnp.float32
  assert jnp.isfinite(got).all()


def test_sinks_take_part_and_have_no_value():
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(B, L, 4, C)), jnp.float32)
  k, v = (
    jnp.asarray(rng.normal(size=(B, L, 2, C)), jnp.float32) for _ in range(2)
  )
  sinks = jnp.asarray(rng.normal(size=(4,)), jnp.float32)
  got, _ = smnn.attend(q, k, v, sinks=sinks, sliding_window=3)
  for h in range(4):
    for t in range(L):
      seen = slice(max(0, t - 2), t + 1)
      keys, values = (
        oracle.f64(k)[:, seen, h // 2],
        oracle.f64(v)[:, seen, h // 2],
      )
      scores = np.einsum("bc,bsc->bs", oracle.f64(q)[:, t, h], keys) * C**-0.5
      weights = np.exp(scores)
      weights /= weights.sum(1, keepdims=True) + np.exp(float(sinks[h]))
      expected = np.einsum("bs,bsc->bc", weights, values)
      np.testing.assert_allclose(got[:, t, h], expected, rtol=2e-4)


def test_sinks_of_an_empty_batch():
  q, k = jnp.ones((0, L, 4, C)), jnp.ones((0, L, 2, C))
  assert smnn.attend(q, k, k, sinks=jnp.ones((4,)))[0].shape == q.shape


def test_no_sinks_is_sinks_of_minus_infinity():
  q = jax.random.normal(jax.random.key(1), (B, L, 4, C))
  k = jax.random.normal(jax.random.key(2), (B, L, 2, C))
  without, _ = smnn.attend(q, k, k)
  with_sinks, _ = smnn.attend(q, k, k, sinks=jnp.full((4,), -1e30))
  np.testing.assert_allclose(without, with_sinks, rtol=1e-4)


def test_attend_is_double_where_its_operands_are(x64):
  rng = np.random.default_rng(0)
  q = rng.normal(size=(B, L, 4, C))
  k, v = rng.normal(size=(2, B, L, 2, C))
  # The second sequence is padding: its rows see nothing.
  segment_ids = jnp.asarray(np.stack([PADDED[0], 0 * PADDED[0]]))
  f = lambda q, k, v: smnn.attend(q, k, v, segment_ids=segment_ids)[0]
  got, backward = jax.vjp(f, *map(jnp.asarray, (q, k, v)))
  for array in (got, *backward(jnp.ones_like(got))):
    assert np.all(np.isfinite(array))
  for h in range(4):
    for t in range(2, L):  # behind the padding
      logits = k[0, 2 : t + 1, h // 2] @ q[0, t, h] * C**-0.5
      weights = np.exp(logits)
      expected = weights / weights.sum() @ v[0, 2 : t + 1, h // 2]
      np.testing.assert_allclose(got[0, t, h], expected, rtol=1e-11)


def test_attend_in_float16_runs_under_jit():
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.normal(size=(B, L, 4, C)), jnp.float16)
  k, v = jnp.asarray(rng.normal(size=(2, B, L, 2, C)), jnp.float16)

  def step(q, k, v):
    y, backward = jax.vjp(lambda *a: smnn.attend(*a)[0], q, k, v)
    return y, *backward(jnp.ones_like(y))

  wide = jax.jit(step)(*(a.astype(jnp.float32) for a in (q, k, v)))
  for got, expected in zip(jax.jit(step)(q, k, v), wide, strict=True):
    assert got.dtype == jnp.float16
    error = np.abs(oracle.f64(got) - oracle.f64(expected)).max()
    assert error <= 0.005 * np.abs(expected).max()


def heads(batch, length):
  random = np.random.default_rng(length)
  return jnp.asarray(random.normal(size=(batch, length, 2, 4)), jnp.float32)


@pytest.mark.parametrize("sinks", [None, (0.5, -0.5)], ids=str)
def test_attend_to_other_tokens_equals_a_plain_softmax(sinks):
  operands = heads(2, 3), heads(2, 5), heads(2, 5)[:, ::-1]

  def plain(dtype):
    q, k, v = (np.asarray(a, dtype) for a in operands)
    weights = np.exp(np.einsum("blhd,bmhd->bhlm", q, k) / 2)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
      total += np.exp(np.asarray(sinks, dtype))[None, :, None, None]
    return np.einsum("bhlm,bmhd->blhd", weights / total, v)

  logits = None if sinks is None else jnp.asarray(sinks, jnp.float32)
  got, _ = smnn.attend(*operands, causal=False, sinks=logits)
  assert_accurate(got, plain(np.float64), plain(np.float32))


def test_a_window_may_differ_by_layer():
  q = heads(1, 4)

  def layer(_, window):
    return None, smnn.attend(q, q, q, sliding_window=window)[0]

  _, got = jax.lax.scan(layer, None, jnp.array([1, 3]))
  for i, window in enumerate((1, 3)):
    _, want = layer(None, window)
    np.testing.assert_allclose(got[i], want, rtol=1e-5)


def test_attend_refuses_a_window_that_is_not_causal():
  q = jnp.ones((B, L, H, C))
  with pytest.raises(ValueError, match="need causal=True"):
    smnn.attend(q, q, q, causal=False, sliding_window=2)


def linear_inputs(dtype=np.float64, top_k=K):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, E + 1, (T, top_k))  # E: not here
  arrays = (
    rng.normal(size=(T * top_k, 5)), rng.uniform(size=(T, top_k)),
    rng.normal(size=(E, 5, 9)),
  )  # fmt: skip
  return ids, [jnp.asarray(a.astype(dtype)) for a in arrays]


@pytest.mark.parametrize("top_k", [K, 1])
@pytest.mark.parametrize("order", ["scattered", "grouped"])
def test_linear_combine_equals_its_definition(order, top_k):
  ids, (x, gates, w) = linear_inputs(np.float32, top_k)
  routing = sm.route(jnp.asarray(ids), E)
  rows = oracle.scatter2scatter(x, w, ids).reshape(T, top_k, -1)
  expected = np.sum(oracle.f64(gates)[:, :, None] * rows, axis=1)
  baseline = sm.combine(
    sm.parallel_linear(x, w, routing, grouped_out=True), gates, routing
  )
  grouped_in = order == "grouped"
  if grouped_in:
    x = x[routing.scattered_ids]
  got = linear_combine(x, gates, routing, w, grouped_in=grouped_in)
  assert_accurate(got, expected, baseline)


@pytest.mark.parametrize("top_k", [K, 1])
@pytest.mark.parametrize("order", ["scattered", "grouped"])
def test_linear_combine_gradients(x64, order, top_k):
  ids, arrays = linear_inputs(top_k=top_k)
  routing = sm.route(jnp.asarray(ids), E)
  f = jax.jit(
    lambda x, gates, w: linear_combine(
      x, gates, routing, w, grouped_in=order == "grouped"
    )
  )
  check_grads(f, arrays, 1, modes=["rev"])


@pytest.mark.parametrize("order", ["scattered", "grouped"])
def test_gates_that_are_not_here_add_nothing(order):
  ids, (x, gates, w) = linear_inputs(np.float32)
  routing = sm.route(jnp.asarray(ids), E)
  f = jax.jit(
    lambda x, gates, w: linear_combine(
      x, gates, routing, w, grouped_in=order == "grouped"
    )
  )

  def results(gates):
    y, backward = jax.vjp(f, x, gates, w)
    return y, backward(jnp.ones_like(y))

  got = results(jnp.where(ids == E, jnp.nan, gates))
  jax.tree.map(np.testing.assert_array_equal, got, results(gates))


@pytest.mark.parametrize("order", ["scattered", "grouped"])
def test_rows_that_are_not_here_have_no_gradients(order):
  ids, (x, gates, w) = linear_inputs(np.float32)
  routing = sm.route(jnp.asarray(ids), E)
  grouped_in = order == "grouped"
  gone = ids.reshape(-1) == E
  if grouped_in:
    gone = gone[np.asarray(routing.scattered_ids)]
  assert gone.any()
  x = jnp.where(gone[:, None], jnp.nan, x)
  f = lambda x, gates, w: linear_combine(
    x, gates, routing, w, grouped_in=grouped_in
  )
  y, backward = jax.vjp(f, x, gates, w)
  dx, dgates, dw = backward(jnp.ones_like(y))
  assert np.all(np.isfinite(y)) and np.all(np.isfinite(dw))
  assert not np.any(dx[gone]) and not np.any(dgates[ids == E])


def test_linear_combine_keeps_no_expanded_output():
  ids, (x, gates, w) = linear_inputs(np.float32)
  routing = sm.route(jnp.asarray(ids), E)
  backward = jax.eval_shape(
    lambda *given: jax.vjp(
      lambda x, gates, w: linear_combine(x, gates, routing, w), *given
    )[1],
    x, gates, w,
  )  # fmt: skip
  kept = jax.tree.leaves(backward)
  assert (T * K, w.shape[2]) not in [a.shape for a in kept]
  ids_bytes = sum(a.nbytes for a in routing)
  assert sum(a.size * a.dtype.itemsize for a in kept) <= (
    x.nbytes + gates.nbytes + w.nbytes + ids_bytes
  )


def test_moa_keeps_the_attention_output_once():
  # Wide d: an expanded output (S, d) would stand out.
  layer = module()
  x = jax.random.normal(jax.random.key(0), (B, L, 640))
  variables = randomized(layer, x)
  backward = jax.eval_shape(
    lambda x: jax.vjp(lambda x: layer.apply(variables, x)[0], x)[1], x
  )
  shapes = [a.shape for a in jax.tree.leaves(backward)]
  assert (T * K, 640) not in shapes
  assert (T * K, H * C) not in shapes


def equations(jaxpr):
  """Yields the equations of a jaxpr and of what it calls, but for kernels."""
  for equation in jaxpr.eqns:
    yield equation
    if equation.primitive.name not in ("mpmd_map", "pallas_call"):
      for value in jax.tree.leaves(tuple(equation.params.values())):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


@pytest.fixture
def on_hopper(monkeypatch):
  """Traces and lowers as on an H100 with cuDNN, neither of which is here."""
  if mosaic.missing_feature():
    pytest.skip(mosaic.missing_feature())
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
  with described("NVIDIA H100 80GB HBM3"), as_users_have_it():
    yield


def test_moa_on_hopper_copies_nothing_wide(on_hopper):
  top_k, heads, width, d, tokens = 4, 2, 64, 640, 128
  layer = smnn.MixtureOfAttention(
    num_experts=8, top_k=top_k, num_heads=heads, head_dim=width,
    dtype=jnp.bfloat16,
  )  # fmt: skip
  x = jax.ShapeDtypeStruct((2, tokens // 2, d), jnp.bfloat16)
  params = jax.eval_shape(layer.init, jax.random.key(0), x)

  def train(params, x, dy):
    y, backward = jax.vjp(lambda p, x: layer.apply(p, x)[0], params, x)
    return y, backward(dy)

  traced = jax.jit(train).trace(params, x, x)
  made = {}
  for equation in equations(traced.jaxpr.jaxpr):
    name = equation.primitive.name.replace("-", "_")
    made.setdefault(name, []).extend(out.aval for out in equation.outvars)
  wide = lambda avals: [a for a in avals if a.size >= tokens * top_k * d]
  # The sum over the choices of a token: of y, and of dx.
  assert [a.shape for a in wide(made["gather"])] == [(tokens, top_k, d)] * 2
  for name in ("scatter", "scatter_add", "concatenate", "transpose", "sort"):
    assert not wide(made.get(name, []))
  # Only the k largest logits have gradients that are added where they belong.
  assert [a.shape for a in made["scatter_add"]] == [(tokens, 8)]

  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu_v2(") == 6
  calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
  assert ["Backward" in line for line in calls] == [False, True]
  shape = "tensor<2x64x{}x64xbf16>".format
  queries, keys = shape(top_k * heads), shape(heads)
  for line in calls:
    assert f"({queries}, {keys}, {keys}" in line


def test_moa_under_bfloat16_remat_and_scan():
  x = tokens(dtype=jnp.bfloat16)
  layer = module(dtype=jnp.bfloat16)
  variables = randomized(layer, x)
  remat = nn.remat(smnn.MixtureOfAttention)(
    num_experts=E, top_k=K, num_heads=H, head_dim=C, dtype=jnp.bfloat16
  )

  def loss(layer, params):
    y = layer.apply({"params": params}, x)[0]
    assert y.dtype == jnp.bfloat16
    return y.astype(jnp.float32).sum()

  # Strict promotion refuses the backward of JAX's own attention in bfloat16.
  with jax.numpy_dtype_promotion("standard"):
    expected = jax.jit(jax.grad(lambda p: loss(layer, p)))(variables["params"])
    got = jax.jit(jax.grad(lambda p: loss(remat, p)))(variables["params"])
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == jnp.float32 and np.any(b)
    assert np.abs(a - b).max() <= 0.02 * np.abs(b).max()


def test_benchmark_checks_and_times_a_tiny_layer(capsys):
  arguments = ["--tiny", "--samples", "2", "--implementation", "xla"]
  with as_users_have_it():
    records = bench_attention.main(
      [*arguments, "--top-k", "2", "--directions", "forward"]
    )
    # No time is left for the second.
    assert not bench_attention.main([*arguments, "--budget-seconds", "0"])
  assert [r["implementation"] for r in records] == list(attention_layers.LAYERS)
  assert all(record["ms_median"] > 0 for record in records)
  assert capsys.readouterr().out.count("TFLOP/s") == 4


@pytest.mark.slow
def test_benchmark_checks_gradients_also_of_one_choice():
  with as_users_have_it():
    records = bench_attention.main(
      ["--tiny", "--samples", "2", "--implementation", "xla", "--top-k", "2",
       "1"]
    )  # fmt: skip
  assert len(records) == 16


@pytest.mark.parametrize("wrong", ["ungroup", "dense_layer"])
def test_benchmark_notices_a_wrong_layer(monkeypatch, wrong):
  once = getattr(attention_layers, wrong)
  monkeypatch.setattr(attention_layers, wrong, lambda *a: 2 * once(*a))
  shape, forward = attention_layers.tiny(2), ["forward"]
  with as_users_have_it():
    [compiled] = bench_attention.compile_all(
      [shape], ["moa", "dense", "regroup"], forward, "xla"
    )
    with pytest.raises(AssertionError, match="regroup|dense"):
      bench_attention.check(compiled, compiled["inputs"]())
