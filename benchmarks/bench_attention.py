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
from jaxtyping import Array, Float

from benchmarks import command, timing
from benchmarks.attention_layers import (
  LAYERS,
  Inputs,
  Layer,
  Shape,
  full,
  inputs,
  layers,
  plain_dense,
  plain_moa,
  tiny,
)
from scattermoe_jax.kernels import IMPLEMENTATIONS
from tests.accuracy import assert_accurate

DIRECTIONS = ("forward", "training")
_KEY = ("shape", "direction", "implementation")
# On a bfloat16 result of thousands of terms, summed in another order.
_AGREEMENT = 0.02

# Of the measured programs; and of the one that checks them, run once.
_COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_CHECK_OPTIONS = {**_COMPILER_OPTIONS, "xla_gpu_autotune_level": 0}

# A program by (direction, layer), or by "inputs" and "evidence".
Key = tuple[str, str] | str


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
