"""What does a mixture of attention cost beside dense attention and regrouping?

  python -m benchmarks.bench_attention [--top-k 1 2 4 8] [--directions ...]
      [--implementation mosaic|triton|xla] [--tiny] [--write]

Three attention layers of the same active heads, in bfloat16 on normal data:

  moa      `MixtureOfAttention`: rows read and written in token order
  dense    multi-head attention, keys and values of all heads
  regroup  moa's parameters and arithmetic, built the usual way: copy the rows
           into expert order, multiply, copy back, attend, copy, multiply, copy
           back, weigh and sum; the same grouped matmul kernel, and copies whose
           backward is a copy

T = 16 x 2048 tokens, d = 4096, 32 active heads of 128; k experts of 32 / k
heads each, E = 8 k; causal, rotary positions. The router's weights are random
and its load nearly even. `training` is the gradient of every parameter and of
x, after a forward. On short sequences of the same widths, results and gradients
are first compared with plain float32; at full size moa with regroup.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks import timing
from scattermoe_jax import nn as smnn
from scattermoe_jax.ops import parallel_linear
from scattermoe_jax.routing import Routing, input_rows, route
from tests.accuracy import assert_accurate

LAYERS = ("moa", "dense", "regroup")
DIRECTIONS = ("forward", "training")
# On a bfloat16 result of thousands of terms, summed in another order.
_AGREEMENT = 0.02

Layer = Callable[[Any, Array], Array]


class Shape(NamedTuple):
  """An attention layer: B sequences of L tokens of width d."""

  batch: int
  length: int
  d_model: int
  num_heads: int
  head_dim: int
  top_k: int

  @property
  def num_experts(self) -> int:
    """E = 8 k: one in eight is active, whatever the granularity."""
    return 8 * self.top_k

  @property
  def heads_per_expert(self) -> int:
    """h_expert, the heads of keys and values of a mixture of attention."""
    return self.num_heads // self.top_k

  def flops(self, layer: str) -> int:
    """Of the forward; of causal attention only the half that is not masked."""
    tokens, active = self.batch * self.length, self.num_heads * self.head_dim
    kv_width = active if layer == "dense" else active // self.top_k
    projections = 2 * tokens * self.d_model * (2 * active + 2 * kv_width)
    return projections + 2 * tokens * self.length * active


def full(top_k: int) -> Shape:
  """Returns the shape of the paper's granularity study."""
  return Shape(16, 2048, 4096, 32, 128, top_k)


def tiny(top_k: int) -> Shape:
  """Returns a shape for a CPU; not a measurement of anything."""
  return Shape(2, 16, 64, 8, 8, top_k)


def moa_module(shape: Shape, implementation: str | None, dtype=jnp.bfloat16):
  """Returns the module that is measured."""
  return smnn.MixtureOfAttention(
    num_experts=shape.num_experts,
    top_k=shape.top_k,
    num_heads=shape.heads_per_expert,
    head_dim=shape.head_dim,
    dtype=dtype,
    param_dtype=dtype,
    implementation=implementation,
  )


def layers(shape: Shape, implementation: str | None) -> dict[str, Layer]:
  """Returns the three layers by name: functions of (params, x)."""
  module = moa_module(shape, implementation)
  return {
    "moa": lambda params, x: module.apply({"params": params}, x)[0],
    "dense": functools.partial(dense_layer, shape),
    "regroup": functools.partial(regroup_layer, shape, implementation),
  }


def dense_layer(shape: Shape, params, x: Float[Array, "B L d"]) -> Array:
  """Returns multi-head attention with rotary positions."""
  heads = (*x.shape[:2], shape.num_heads, shape.head_dim)
  query, key, value = (
    a.reshape(heads) for a in jnp.split(x @ params["qkv"], 3, axis=-1)
  )
  return _attend(query, key, value).reshape(*x.shape[:2], -1) @ params["out"]


def regroup_layer(
  shape: Shape, implementation: str | None, params, x: Float[Array, "B L d"]
) -> Array:
  """Returns the mixture of attention with its rows regrouped twice."""
  batch, length, d = x.shape
  rows = x.reshape(-1, d)
  router = smnn.Router(shape.num_experts, shape.top_k, "top_k_softmax")
  routed = router.apply({"params": params["router"]}, rows)
  routing = route(routed.expert_ids, shape.num_experts)
  multiply = functools.partial(
    parallel_linear,
    routing=routing,
    grouped_in=True,
    grouped_out=True,
    implementation=implementation,
  )
  query = multiply(group(rows, routing), params["query"]["kernel"])
  query = ungroup(query, routing)
  query = jnp.swapaxes(
    query.reshape(batch, length, shape.top_k, -1, shape.head_dim), 2, 3
  )
  key, value = jnp.split(x @ params["key_value"]["kernel"], 2, axis=-1)
  kv_heads = (batch, length, -1, shape.head_dim)
  heads = _attend(
    query.reshape(kv_heads), key.reshape(kv_heads), value.reshape(kv_heads)
  )
  heads = heads.reshape(batch, length, -1, shape.top_k, shape.head_dim)
  heads = jnp.swapaxes(heads, 2, 3).reshape(routing.num_rows, -1)
  y = multiply(group(heads, routing), params["output"]["kernel"])
  y = ungroup(y, routing).reshape(-1, shape.top_k, d)
  gates = routed.gates.astype(x.dtype)
  y = jnp.einsum("tk,tkd->td", gates, y, preferred_element_type=x.dtype)
  return y.reshape(x.shape)


def _attend(query, key, value) -> Array:
  positions = smnn.consecutive_positions(*query.shape[:2])
  query, key = (smnn.rotary_embedding(a, positions) for a in (query, key))
  return smnn.attend(query, key, value)[0]


@jax.custom_vjp
def group(rows: Float[Array, "rows d"], routing: Routing) -> Array:
  """Returns a copy of (T or S) scattered rows in grouped order."""
  return rows[input_rows(routing, rows.shape[0], grouped=False)]


def _group_fwd(rows, routing):
  return group(rows, routing), (routing, rows.shape[0])


def _group_bwd(residuals, dy):
  routing, num_rows = residuals
  drows = dy[routing.grouped_ids.reshape(-1)]
  if num_rows == routing.num_rows:
    return drows, None
  drows = drows.reshape(num_rows, -1, drows.shape[1]).astype(jnp.float32)
  return drows.sum(axis=1).astype(dy.dtype), None


group.defvjp(_group_fwd, _group_bwd)


@jax.custom_vjp
def ungroup(rows: Float[Array, "S d"], routing: Routing) -> Array:
  """Returns a copy of S grouped rows in scattered order."""
  return rows[routing.grouped_ids.reshape(-1)]


ungroup.defvjp(
  lambda rows, routing: (ungroup(rows, routing), routing),
  lambda routing, dy: (dy[routing.scattered_ids], None),
)


def plain_moa(shape: Shape, params, x: Float[Array, "B L d"]) -> Array:
  """Returns the mixture of attention, every row by every expert, no kernels."""
  module_router = smnn.Router(shape.num_experts, shape.top_k, "top_k_softmax")
  rows = x.reshape(-1, x.shape[-1])
  routed = module_router.apply({"params": params["router"]}, rows)
  mine = jax.nn.one_hot(routed.expert_ids, shape.num_experts, dtype=x.dtype)
  product = functools.partial(jnp.einsum, precision="highest")
  every = product("td,edn->ten", rows, params["query"]["kernel"])
  query = product("tke,ten->tkn", mine, every)
  query = query.reshape(*x.shape[:2], shape.num_heads, shape.head_dim)
  key, value = (
    # Head j n + i reads keys and values of head i: tiled k times.
    jnp.tile(
      a.reshape(*x.shape[:2], -1, shape.head_dim), (1, 1, shape.top_k, 1)
    )
    for a in jnp.split(
      product("bld,dn->bln", x, params["key_value"]["kernel"]), 2, axis=-1
    )
  )
  positions = smnn.consecutive_positions(*x.shape[:2])
  query, key = (smnn.rotary_embedding(a, positions) for a in (query, key))
  logits = product("blhc,bmhc->bhlm", query, key) * shape.head_dim**-0.5
  causal = np.tri(x.shape[1], dtype=bool)[None, None]
  probs = jax.nn.softmax(jnp.where(causal, logits, -1e30).astype(jnp.float32))
  heads = product("bhlm,bmhc->blhc", probs.astype(x.dtype), value)
  heads = heads.reshape(rows.shape[0], shape.top_k, -1)
  every = product("tkn,tke,end->tked", heads, mine, params["output"]["kernel"])
  gates = routed.gates.astype(x.dtype)
  return product("tk,tked->td", gates, every).reshape(x.shape)


def parameters(shape: Shape) -> dict[str, Any]:
  """Returns the parameters of each layer, in bfloat16; moa's are regroup's."""
  x = jnp.zeros((1, 2, shape.d_model), jnp.bfloat16)
  module = moa_module(shape, "xla")
  moa = jax.jit(module.init)(jax.random.key(0), x)["params"]
  # A router in bfloat16 holds the same numbers in float32.
  moa["router"] = jax.tree.map(lambda a: a.astype(jnp.float32), moa["router"])
  active = shape.num_heads * shape.head_dim
  dense = {
    "qkv": _normal(1, shape.d_model, 3 * active),
    "out": _normal(2, active, shape.d_model),
  }
  return {"moa": moa, "dense": dense, "regroup": moa}


def _normal(seed: int, fan_in: int, features: int) -> Array:
  draw = jax.random.normal(jax.random.key(seed), (fan_in, features))
  return (draw * fan_in**-0.5).astype(jnp.bfloat16)


def tokens(shape: Shape, seed: int) -> Array:
  """Returns (B, L, d) normal values; also used as the gradient of y."""
  size = (shape.batch, shape.length, shape.d_model)
  return jax.random.normal(jax.random.key(seed), size).astype(jnp.bfloat16)


def step(layer: Layer, direction: str) -> Callable[[Any, Array, Array], Any]:
  """Returns a function of (params, x, dy): y, or the gradients."""
  if direction == "forward":
    return lambda params, x, dy: layer(params, x)

  def gradients(params, x, dy):
    _, pull_back = jax.vjp(layer, params, x)
    return pull_back(dy)

  return gradients


def check(shape: Shape, implementation: str | None) -> None:
  """Asserts that moa and regroup equal plain float32 on short sequences."""
  shape = shape._replace(batch=2, length=min(shape.length, 64))
  params = parameters(shape)["moa"]
  x, dy = tokens(shape, 3), tokens(shape, 4)
  plain = jax.jit(step(functools.partial(plain_moa, shape), "training"))
  wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
  oracle = plain(wide(params), wide(x), wide(dy))
  baseline = plain(params, x, dy)
  for name in ("moa", "regroup"):
    layer = layers(shape, implementation)[name]
    got = jax.jit(step(layer, "training"))(params, x, dy)
    for (path, a), b, c in zip(
      jax.tree_util.tree_leaves_with_path(got),
      jax.tree.leaves(oracle),
      jax.tree.leaves(baseline),
      strict=True,
    ):
      where = f"{name}{jax.tree_util.keystr(path)}"
      assert_accurate(a, b, c.astype(a.dtype), err_msg=where)


def measure(
  shape: Shape,
  directions: Sequence[str],
  implementation: str | None,
  *,
  samples: int = 20,
) -> list[dict[str, Any]]:
  """Returns the records of one shape, all variants timed in turns."""
  params = parameters(shape)
  x, dy = tokens(shape, 3), tokens(shape, 4)
  variants = layers(shape, implementation)

  cases = [(direction, name) for direction in directions for name in LAYERS]
  lowered = [
    jax.jit(step(variants[name], direction)).lower(params[name], x, dy)
    for direction, name in cases
  ]
  with ThreadPoolExecutor() as pool:
    compiled = pool.map(lambda program: program.compile(), lowered)
    programs = dict(zip(cases, compiled, strict=True))
  for direction in directions:
    _assert_agree(
      programs[direction, "moa"](params["moa"], x, dy),
      programs[direction, "regroup"](params["moa"], x, dy),
    )
  calls = {
    case: functools.partial(program, params[case[1]], x, dy)
    for case, program in programs.items()
  }
  timings = timing.time_interleaved(calls, samples=samples, max_calls=3)
  return [
    _record(shape, case, timings, programs[case], implementation)
    for case in cases
  ]


def _assert_agree(got, expected) -> None:
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    off = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
    assert off <= _AGREEMENT, f"moa and regroup differ by {off:.3g}"


def _record(shape, case, timings, program, implementation) -> dict[str, Any]:
  direction, name = case
  taken = timings[case]
  # The backward of attention computes its logits again: 2.5 forwards.
  factor = 1 if direction == "forward" else 3
  tflops = factor * shape.flops(name) / taken.ms_median / 1e9
  of = lambda other: timings[direction, other].ms_median / taken.ms_median
  return {
    "shape": f"k{shape.top_k}",
    "direction": direction,
    "implementation": name,
    "kernels": implementation or "default",
    **shape._asdict(),
    **taken._asdict(),
    "tflops": round(tflops, 1),
    "speed_over_regroup": round(of("regroup"), 3),
    "time_over_dense": round(1 / of("dense"), 3),
    "temp_bytes": program.memory_analysis().temp_size_in_bytes,
  }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Checks, times, prints and, with --write, keeps the records."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 4, 8])
  parser.add_argument("--directions", nargs="+", default=DIRECTIONS)
  parser.add_argument("--implementation", default=None)
  parser.add_argument("--samples", type=int, default=20)
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("--write", action="store_true")
  options = parser.parse_args(arguments)
  records = []
  for top_k in options.top_k:
    shape = (tiny if options.tiny else full)(top_k)
    check(shape, options.implementation)
    new = measure(
      shape,
      options.directions,
      options.implementation,
      samples=options.samples,
    )
    for record in new:
      print(
        f"{record['shape']:3} {record['direction']:8} "
        f"{record['implementation']:8} {record['ms_median']:8.3f} ms "
        f"({record['ms_p20']:.3f}-{record['ms_p80']:.3f})  "
        f"{record['tflops']:6.1f} TFLOP/s  "
        f"{record['speed_over_regroup']:.2f}x regroup's speed  "
        f"{record['time_over_dense']:.2f}x dense's time  "
        f"{record['temp_bytes'] / 2**30:.2f} GiB",
        flush=True,
      )
    records += new
    if options.write:
      timing.merge_records(
        timing.results_path("bench_attention"),
        new,
        key=("shape", "direction", "implementation"),
      )
  return records


if __name__ == "__main__":
  main()
