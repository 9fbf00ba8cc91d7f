"""What does a mixture of attention cost beside dense attention and regrouping?

  python -m benchmarks.bench_attention [--top-k 8 4 2 1] [--directions ...]
      [--layers moa dense ...] [--implementation mosaic|triton|xla] [--tiny]
      [--budget-seconds 150] [--write]

Attention layers of the same active heads, in bfloat16 on normal data:

  moa      `MixtureOfAttention`
  dense    multi-head attention, keys and values of all heads
  regroup  moa's parameters and arithmetic, built the usual way: copy the rows
           into expert order, multiply, copy back, attend, copy, multiply, copy
           back, weigh and sum; the same grouped matmul kernel. Each copy is a
           pass of its own, as in a library of separate kernels, and so is its
           backward
  regroup_fused  the same, where XLA may make copies part of their neighbours:
           it does so with the copies back, as moa is built to

T = 16 x 2048 tokens, d = 4096, 32 active heads of 128; k experts of 32 / k
heads each, E = 8 k; causal, rotary positions, one attention core for all.
The router's weights are random and its load nearly even. `training` is y and
the gradient of every parameter and of x.

Before a time is printed, the measured programs themselves are checked: y of the
first sequence, and all gradients where only its dy is not zero, against plain
float32; everything at full size, moa against both regroups.

Most of a run is compiling. The first k is compiled, measured and stored alone,
the others then together. XLA's own products are cuBLAS's, in every layer:
looking among Triton's as well would take most of the time.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks import command, timing
from scattermoe_jax import nn as smnn
from scattermoe_jax.kernels import IMPLEMENTATIONS
from scattermoe_jax.ops import parallel_linear
from scattermoe_jax.routing import Routing, input_rows, route
from tests.accuracy import assert_accurate

LAYERS = ("moa", "dense", "regroup", "regroup_fused")
DIRECTIONS = ("forward", "training")
_KEY = ("shape", "direction", "implementation")
# On a bfloat16 result of thousands of terms, summed in another order.
_AGREEMENT = 0.02

# Of the measured programs; and of the one that checks them, run once.
_COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_CHECK_OPTIONS = {**_COMPILER_OPTIONS, "xla_gpu_autotune_level": 0}

Layer = Callable[[Any, Array], Array]
# A program by (direction, layer), or by "inputs" and "evidence".
Key = tuple[str, str] | str


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
  """Returns the layers by name: functions of (params, x)."""
  module = moa_module(shape, implementation)
  regroup = functools.partial(regroup_layer, shape, implementation)
  return {
    "moa": lambda params, x: module.apply({"params": params}, x)[0],
    "dense": functools.partial(dense_layer, shape),
    "regroup": functools.partial(regroup, False),
    "regroup_fused": functools.partial(regroup, True),
  }


def dense_layer(shape: Shape, params, x: Float[Array, "B L d"]) -> Array:
  """Returns multi-head attention with rotary positions."""
  heads = (*x.shape[:2], shape.num_heads, shape.head_dim)
  query, key, value = (
    a.reshape(heads) for a in jnp.split(x @ params["qkv"], 3, axis=-1)
  )
  return _attend(query, key, value).reshape(*x.shape[:2], -1) @ params["out"]


def regroup_layer(
  shape: Shape,
  implementation: str | None,
  fused: bool,
  params,
  x: Float[Array, "B L d"],
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
  query = multiply(group(fused, rows, routing), params["query"]["kernel"])
  query = ungroup(fused, query, routing)
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
  y = multiply(group(fused, heads, routing), params["output"]["kernel"])
  y = ungroup(fused, y, routing).reshape(-1, shape.top_k, d)
  gates = routed.gates.astype(x.dtype)
  y = jnp.einsum("tk,tkd->td", gates, y, preferred_element_type=x.dtype)
  return y.reshape(x.shape)


def _attend(query, key, value) -> Array:
  positions = smnn.consecutive_positions(*query.shape[:2])
  query, key = (smnn.rotary_embedding(a, positions) for a in (query, key))
  return smnn.attend(query, key, value)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def group(fused: bool, rows: Float[Array, "rows d"], routing: Routing) -> Array:
  """Returns a copy of (T or S) scattered rows in grouped order."""
  ids = input_rows(routing, rows.shape[0], grouped=False)
  return _copy(fused, rows, ids)


def _group_fwd(fused, rows, routing):
  return group(fused, rows, routing), (routing, rows.shape[0])


def _group_bwd(fused, residuals, dy):
  routing, num_rows = residuals
  drows = _copy(fused, dy, routing.grouped_ids.reshape(-1))
  if num_rows == routing.num_rows:
    return drows, None
  drows = drows.reshape(num_rows, -1, drows.shape[1]).astype(jnp.float32)
  return drows.sum(axis=1).astype(dy.dtype), None


group.defvjp(_group_fwd, _group_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ungroup(fused: bool, rows: Float[Array, "S d"], routing: Routing) -> Array:
  """Returns a copy of S grouped rows in scattered order."""
  return _copy(fused, rows, routing.grouped_ids.reshape(-1))


ungroup.defvjp(
  lambda fused, rows, routing: (ungroup(fused, rows, routing), routing),
  lambda fused, routing, dy: (_copy(fused, dy, routing.scattered_ids), None),
)


def _copy(fused: bool, rows, ids) -> Array:
  copied = rows[ids]
  return copied if fused else jax.lax.optimization_barrier(copied)


def plain_dense(shape: Shape, params, x: Float[Array, "B L d"]) -> Array:
  """Returns the dense layer, no kernels."""
  qkv = jnp.einsum("bld,dn->bln", x, params["qkv"], precision="highest")
  heads = (*x.shape[:2], shape.num_heads, shape.head_dim)
  attended = _plain_attend(
    *(a.reshape(heads) for a in jnp.split(qkv, 3, axis=-1))
  )
  return jnp.einsum(
    "bln,nd->bld",
    attended.reshape(*x.shape[:2], -1),
    params["out"],
    precision="highest",
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
  heads = _plain_attend(query, key, value)
  heads = heads.reshape(rows.shape[0], shape.top_k, -1)
  gates = routed.gates.astype(x.dtype)
  heads = product("tke,tkn->ten", mine * gates[:, :, None], heads)
  return product("ten,end->td", heads, params["output"]["kernel"]).reshape(
    x.shape
  )


def _plain_attend(query, key, value) -> Array:
  product = functools.partial(jnp.einsum, precision="highest")
  positions = smnn.consecutive_positions(*query.shape[:2])
  query, key = (smnn.rotary_embedding(a, positions) for a in (query, key))
  logits = product("blhc,bmhc->bhlm", query, key) * query.shape[-1] ** -0.5
  causal = np.tri(query.shape[1], dtype=bool)[None, None]
  probs = jax.nn.softmax(jnp.where(causal, logits, -1e30).astype(jnp.float32))
  return product("bhlm,bmhc->blhc", probs.astype(value.dtype), value)


class Inputs(NamedTuple):
  """What the programs of one shape are given.

  Attributes:
    params: by layer; all but dense's are the same.
    x: tokens.
    dy: the gradient of y.
    dy_first: the same in the first sequence, zero in the others.
  """

  params: dict[str, Any]
  x: Float[Array, "B L d"]
  dy: Float[Array, "B L d"]
  dy_first: Float[Array, "B L d"]


def inputs(shape: Shape) -> Inputs:
  """Returns normal data, in bfloat16 but for the router's parameters."""
  d, experts = shape.d_model, shape.num_experts
  active = shape.num_heads * shape.head_dim
  n = active // shape.top_k
  moa = {
    # In float32, but of numbers that bfloat16 has.
    "router": {"kernel": _normal(0, d, experts).astype(jnp.float32)},
    "query": {"kernel": _normal(1, experts, d, n)},
    "key_value": {"kernel": _normal(2, d, 2 * n)},
    "output": {"kernel": _normal(3, experts, n, d)},
  }
  dense = {"qkv": _normal(4, d, 3 * active), "out": _normal(5, active, d)}
  tokens = (shape.batch, shape.length, d)
  x, dy = (_normal(seed, *tokens, scale=1.0) for seed in (6, 7))
  first = (jnp.arange(shape.batch) == 0)[:, None, None]
  dy_first = jnp.where(first, dy, jnp.zeros_like(dy))
  params = {name: moa for name in LAYERS} | {"dense": dense}
  return Inputs(params, x, dy, dy_first)


def _normal(seed: int, *size: int, scale: float | None = None) -> Array:
  draw = jax.random.normal(jax.random.key(seed), size, jnp.bfloat16)
  return draw * jnp.bfloat16(size[-2] ** -0.5 if scale is None else scale)


def step(layer: Layer, direction: str) -> Callable[[Any, Array, Array], Any]:
  """Returns a function of (params, x, dy): y; for training, the gradients too.

  Both, as the layers behind it need y: without it XLA would leave out products.
  """
  if direction == "forward":
    return lambda params, x, dy: layer(params, x)

  def gradients(params, x, dy):
    y, pull_back = jax.vjp(layer, params, x)
    return y, pull_back(dy)

  return gradients


class Evidence(NamedTuple):
  """What decides whether the layers are right; small enough for the host.

  Attributes:
    worst: for each result its elements, the truth's and a baseline's where
      result or baseline are furthest from the truth, or that is largest.
    apart: for each result of a layer but dense, how far moa's is from it.
  """

  worst: Any
  apart: Any


def evidence(shape: Shape, given: Inputs, first, whole) -> Evidence:
  """Compares the results of all layers with plain ones and with each other.

  Args:
    shape: of the layers.
    given: what they were given.
    first: by (direction, layer), the results for `dy_first`.
    whole: the results of all but dense for `dy`.
  """
  plain = _plain_results(shape, given, {direction for direction, _ in first})
  worst = {
    (direction, name): jax.tree.map(
      _worst,
      _of_first_sequence(got, direction),
      *plain["dense" if name == "dense" else "moa", direction],
    )
    for (direction, name), got in first.items()
  }
  apart = {
    (direction, name): jax.tree.map(_distance, whole[direction, "moa"], other)
    for (direction, name), other in whole.items()
  }
  return Evidence(worst, apart)


def _of_first_sequence(results, direction: str):
  if direction == "forward":
    return results[:1]
  y, (dparams, dx) = results
  return y[:1], (dparams, dx[:1])


def _plain_results(shape: Shape, given: Inputs, directions):
  """Returns (truth, baseline) of the first sequence, by layer and direction."""
  results = {}
  for name, layer in (("moa", plain_moa), ("dense", plain_dense)):
    narrow = given.params[name], given.x[:1], given.dy[:1]
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), narrow)
    last = "training" if "training" in directions else "forward"
    run = step(functools.partial(layer, shape), last)
    pair = run(*wide), run(*narrow)
    results[name, last] = pair
    if last == "training":
      results[name, "forward"] = tuple(y for y, _ in pair)
  return results


class Worst(NamedTuple):
  """Elements of a result, of the truth and of a baseline; see `Evidence`."""

  got: Float[Array, " 3"]
  oracle: Float[Array, " 3"]
  baseline: Float[Array, " 3"]


def _worst(got, oracle, baseline) -> Worst:
  got, oracle = got.reshape(-1), oracle.reshape(-1)
  baseline = baseline.astype(got.dtype).reshape(-1)
  off = lambda a: jnp.abs(a.astype(jnp.float32) - oracle)
  places = jnp.stack(
    [jnp.argmax(a) for a in (off(got), off(baseline), jnp.abs(oracle))]
  )
  return Worst(got[places], oracle[places], baseline[places])


def _distance(a, b) -> Array:
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  # A router of one choice has no gradient: its gate is 1.
  apart, size = jnp.linalg.norm(a - b), jnp.linalg.norm(b)
  return apart / jnp.where(size == 0, jnp.ones_like(size), size)


def assert_right(found: Evidence) -> None:
  """Asserts that each layer equals the plain one, and moa the others."""
  is_worst = lambda a: isinstance(a, Worst)
  leaves = jax.tree_util.tree_leaves_with_path
  for path, worst in leaves(found.worst, is_leaf=is_worst):
    assert_accurate(*worst, err_msg=jax.tree_util.keystr(path))
  for path, apart in leaves(found.apart):
    where = jax.tree_util.keystr(path)
    assert apart <= _AGREEMENT, f"{where}: differs by {apart} from moa"


def programs(
  shape: Shape,
  names: Sequence[str],
  directions: Sequence[str],
  implementation: str | None,
) -> Iterator[tuple[Key, jax.stages.Lowered, dict[str, Any]]]:
  """Yields what one shape needs, lowered, with options of the compiler."""
  given = jax.eval_shape(lambda: inputs(shape))
  yield "inputs", jax.jit(lambda: inputs(shape)).lower(), _CHECK_OPTIONS
  traced = {}
  for name in names:
    for direction in directions:
      run = jax.jit(step(layers(shape, implementation)[name], direction))
      traced[direction, name] = run.trace(given.params[name], given.x, given.dy)
  # First, as it takes longest to compile.
  results = {key: program.out_info for key, program in traced.items()}
  whole = {key: r for key, r in results.items() if key[1] != "dense"}
  compare = jax.jit(functools.partial(evidence, shape))
  yield "evidence", compare.lower(given, results, whole), _CHECK_OPTIONS
  for key, program in traced.items():
    yield key, program.lower(), _COMPILER_OPTIONS


def compile_all(
  shapes: Sequence[Shape],
  names: Sequence[str],
  directions: Sequence[str],
  implementation: str | None,
) -> list[dict[Key, jax.stages.Compiled]]:
  """Returns the programs of each shape, compiled in as many threads as help."""
  with ThreadPoolExecutor() as pool:
    # Each compiles while the next is traced.
    tasks = [
      {
        key: pool.submit(lowered.compile, compiler_options=options)
        for key, lowered, options in programs(
          shape, names, directions, implementation
        )
      }
      for shape in shapes
    ]
    return [
      {key: task.result() for key, task in of_shape.items()}
      for of_shape in tasks
    ]


def check(compiled: Mapping[Key, Any], given: Inputs) -> None:
  """Asserts that the programs of one shape are right."""
  steps = {key: run for key, run in compiled.items() if isinstance(key, tuple)}
  run = lambda key, dy: steps[key](given.params[key[1]], given.x, dy)
  first = {key: run(key, given.dy_first) for key in steps}
  whole = {key: run(key, given.dy) for key in steps if key[1] != "dense"}
  assert_right(jax.device_get(compiled["evidence"](given, first, whole)))


def measure(
  shape: Shape,
  compiled: Mapping[Key, Any],
  names: Sequence[str],
  directions: Sequence[str],
  implementation: str | None,
  *,
  samples: int = 20,
) -> list[dict[str, Any]]:
  """Returns the records of one shape, checked, all variants timed in turns."""
  given = compiled["inputs"]()
  check(compiled, given)
  cases = [(direction, name) for direction in directions for name in names]
  calls = {
    case: functools.partial(
      compiled[case], given.params[case[1]], given.x, given.dy
    )
    for case in cases
  }
  timings = timing.time_interleaved(calls, samples=samples, max_calls=3)
  return [
    _record(shape, case, timings, compiled[case], implementation)
    for case in cases
  ]


def _record(shape, case, timings, program, implementation) -> dict[str, Any]:
  direction, name = case
  taken = timings[case]
  # The backward of attention computes its logits again: 2.5 forwards.
  factor = 1 if direction == "forward" else 3
  tflops = factor * shape.flops(name) / taken.ms_median / 1e9
  record = {
    "shape": f"k{shape.top_k}",
    "direction": direction,
    "implementation": name,
    "kernels": implementation or "default",
    **shape._asdict(),
    **taken._asdict(),
    "tflops": round(tflops, 1),
    "temp_bytes": program.memory_analysis().temp_size_in_bytes,
  }
  for other in LAYERS[1:]:
    if (direction, other) in timings:
      of_other = timings[direction, other].ms_median / taken.ms_median
      record[f"speed_over_{other}"] = round(of_other, 3)
  return record


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Checks, times, prints and, with --write, keeps the records."""
  started = time.monotonic()
  elapsed = lambda: time.monotonic() - started
  say = lambda text: print(f"[{elapsed():5.1f} s] {text}", flush=True)
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--top-k", type=int, nargs="+", default=[8, 4, 2, 1])
  parser.add_argument("--layers", nargs="+", default=LAYERS, choices=LAYERS)
  parser.add_argument(
    "--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS
  )
  parser.add_argument(
    "--implementation",
    choices=IMPLEMENTATIONS,
    help="the backend (default: the first that can)",
  )
  parser.add_argument("--samples", type=int, default=20)
  parser.add_argument(
    "--budget-seconds",
    type=float,
    default=float("inf"),
    help="after which only the first k is measured",
  )
  parser.add_argument("--tiny", action="store_true", help="means nothing")
  parser.add_argument("--write", action="store_true", help="keep the records")
  options = parser.parse_args(arguments)
  if options.implementation and options.write:
    parser.error(
      f"--implementation {options.implementation} with --write would replace "
      "the records of the default backend"
    )
  say(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
  shapes = [(tiny if options.tiny else full)(k) for k in options.top_k]
  built = options.layers, options.directions, options.implementation
  records: list[dict[str, Any]] = []
  wrong: list[AssertionError] = []
  for wave in (shapes[:1], shapes[1:]):
    if not wave or elapsed() > options.budget_seconds:
      continue
    compiled = compile_all(wave, *built)
    say(f"compiled k = {', '.join(str(shape.top_k) for shape in wave)}")
    for shape, of_shape in zip(wave, compiled, strict=True):
      try:
        new = measure(shape, of_shape, *built, samples=options.samples)
      except AssertionError as error:
        wrong.append(error)
        say(f"k = {shape.top_k} is wrong: {error}")
        continue
      for record in new:
        print(_line(record), flush=True)
      say(f"measured k = {shape.top_k}")
      records += command.store(new, options, bench="bench_attention", key=_KEY)
  if wrong:
    raise wrong[0]
  return records


def _line(record: Mapping[str, Any]) -> str:
  faster = "  ".join(
    f"{value:.2f}x {key.removeprefix('speed_over_')}'s speed"
    for key, value in record.items()
    if key.startswith("speed_over_")
  )
  return (
    f"{record['shape']:3} {record['direction']:8} "
    f"{record['implementation']:13} {record['ms_median']:8.3f} ms "
    f"({record['ms_p20']:.3f}-{record['ms_p80']:.3f})  "
    f"{record['tflops']:6.1f} TFLOP/s  {faster}  "
    f"{record['temp_bytes'] / 2**30:.2f} GiB"
  )


if __name__ == "__main__":
  main()
