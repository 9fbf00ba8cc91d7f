"""How long does a training step of the SMoE MLP take, and in how much memory?

  python -m benchmarks.bench_mlp [--shapes C1 C3] [--implementations ...]
      [--directions forward forward+backward] [--peer-seconds 60] [--write]

A SwiGLU layer in bfloat16, from x, top-k expert ids and gates to y, or to y and
the gradients of x, gates and both weights. Sorting the ids is timed, choosing
them is not. All implementations of a shape take turns in one run:

  scattermoe_jax           smoe_mlp, with the backend that `--backend` names
  scattermoe_jax_chunked   the same in chunks of columns (`chunks_of`): less
                           memory
  dense                    the dense products of the same FLOPs, nothing else
  composed                 a gather, jax.lax.ragged_dot twice, a weighed sum
  sonicmoe scattermoe tokamax   if installed (`benchmarks.peers`)

`peak_mib` is what a step needs beside its arguments: XLA's temporaries and the
results, or what a peer's allocator says. `held_mib` is what is kept from the
forward to the backward, less the inputs: x, gates, weights, ids. Before its
time is printed, an implementation is compared with float32: y and the gradients
of x and gates for some tokens, the weight gradients of one expert (of peers,
the former). SonicMoE is replayed as a CUDA graph, where its record notes it;
its memory is that of a step launched kernel by kernel.

`times_ours` is over the time of scattermoe_jax in the same turns: records of
one layer may come from several runs, whose times do not compare.

All shapes are compiled side by side, then measured one after the other. Records
of what needs no installing are made first; peers are built after that,
each in at most `--peer-seconds`, and measured in turns with all of the rest.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import baselines, command, peers, timing
from benchmarks.compiling import Job, abstract, compile_together
from benchmarks.peers import Layer, Step
from benchmarks.shapes import (
  LAYERS,
  ROUTINGS,
  SHAPES,
  Shape,
  expert_ids,
  normal_array,
)
from scattermoe_jax.ops import smoe_mlp
from scattermoe_jax.routing import route
from tests.accuracy import assert_accurate

DIRECTIONS = ("forward", "forward+backward")
IMPLEMENTATIONS = ("scattermoe_jax", "scattermoe_jax_chunked", "dense")
KEY = ("shape", "direction", "routing", "implementation")
_CHUNKS = 4
# The widest tile of the kernels: a narrower slice is multiplied as wide.
_TILE_COLUMNS = 256
_CHECKED_TOKENS = 8
_CHECKED_ROWS = 64
_MIB = 2**20


class Inputs(NamedTuple):
  """What a step is given; `dy` is the gradient of y."""

  x: jax.Array
  gates: jax.Array
  w_in: jax.Array
  w_out: jax.Array
  expert_ids: jax.Array
  dy: jax.Array


def _inputs(shape: Shape, routing: str) -> Inputs:
  rows = (shape.num_tokens, shape.d_model)
  experts, d, n = shape.num_experts, shape.d_model, shape.d_expert
  gates = normal_array(1, rows[0], shape.top_k, dtype=jnp.float32)
  return Inputs(
    normal_array(0, *rows),
    jax.nn.softmax(gates),
    normal_array(2, experts, d, 2 * n) * jnp.bfloat16(d**-0.5),
    normal_array(3, experts, n, d) * jnp.bfloat16(n**-0.5),
    expert_ids(shape, routing),
    normal_array(4, *rows),
  )


def step_of(layer: Layer, direction: str):
  """Returns a step of `layer(x, gates, w_in, w_out, expert_ids)`."""

  def step(x, gates, w_in, w_out, ids, dy):
    forward = functools.partial(layer, expert_ids=ids)
    if direction == "forward":
      return (forward(x, gates, w_in, w_out),)
    y, backward = jax.vjp(forward, x, gates, w_in, w_out)
    # As where dy is made from y: no part of the forward waits for the backward.
    y, dy = lax.optimization_barrier((y, dy))
    return y, *backward(dy)

  return step


def jax_steps(
  layers: Mapping[str, Layer], data: Inputs, directions: Sequence[str]
) -> dict[tuple[str, str], Step]:
  """Returns the steps of layers by name and direction, compiled together."""
  made = compile_together(step_jobs(layers, abstract(data), directions))
  return {
    key: compiled_step(future.result(), layers[key[0]], data, key[1])
    for key, future in made.items()
  }


def step_jobs(
  layers: Mapping[str, Layer], shapes: Inputs, directions: Sequence[str]
) -> dict[tuple[str, str], Job]:
  """Returns what to compile, by name and direction."""
  return {
    (name, direction): Job(step_of(layer, direction), tuple(shapes))
    for name, layer in layers.items()
    for direction in directions
  }


def compiled_step(
  compiled: jax.stages.Compiled, layer: Layer, data: Inputs, direction: str
) -> Step:
  """Returns a compiled step of a layer, and what it says of its memory."""
  memory = compiled.memory_analysis()
  return Step(
    functools.partial(compiled, *data),
    memory.temp_size_in_bytes + memory.output_size_in_bytes,
    held_bytes(layer, abstract(data)) if direction != "forward" else None,
  )


def held_bytes(layer: Layer, data: Inputs) -> int:
  """Returns the bytes that `jax.vjp` of the layer keeps beside its inputs."""

  def residuals(x, gates, w_in, w_out, ids):
    forward = functools.partial(layer, expert_ids=ids)
    return jax.vjp(forward, x, gates, w_in, w_out)[1]

  traced = jax.make_jaxpr(residuals)(*data[:5]).jaxpr
  # Each array once, and only what is none of the inputs.
  kept = {v for v in traced.outvars if isinstance(v, jax.extend.core.Var)}
  kept -= set(traced.invars)
  return sum(int(v.aval.size) * v.aval.dtype.itemsize for v in kept)


def ours(num_experts: int, backend: str | None, num_chunks: int = 1) -> Layer:
  """Returns the library's layer."""

  def layer(x, gates, w_in, w_out, expert_ids):
    routing = route(expert_ids, num_experts)
    return smoe_mlp(
      x,
      gates,
      routing,
      w_in,
      w_out,
      num_chunks=num_chunks,
      implementation=backend,
    )

  return layer


def chunks_of(width: int) -> int:
  """Returns the most chunks, at most four, of whole tiles; four if none are.

  Example:
    >>> chunks_of(4096), chunks_of(1536)
    (4, 3)
  """
  few = [count for count in whole_chunks(width) if count <= _CHUNKS]
  return max(few, default=_CHUNKS)


def whole_chunks(width: int) -> list[int]:
  """Returns in how many chunks of whole tiles a width can be cut, from two.

  Example:
    >>> whole_chunks(1536)
    [2, 3, 6]
  """
  tiles = width // _TILE_COLUMNS
  counts = range(2, tiles + 1) if tiles * _TILE_COLUMNS == width else ()
  return [count for count in counts if tiles % count == 0]


def composed(num_experts: int) -> Layer:
  """Returns the layer of `baselines.composed_mlp`."""

  def layer(x, gates, w_in, w_out, expert_ids):
    routing = route(expert_ids, num_experts)
    return baselines.composed_mlp(x, gates, routing, w_in, w_out)

  return layer


def own_layers(
  shape: Shape, implementations: Sequence[str], backend: str | None
) -> dict[str, Layer]:
  """Returns the layers in JAX that need no installing, by name."""
  known = {
    "scattermoe_jax": ours(shape.num_experts, backend),
    "scattermoe_jax_chunked": ours(
      shape.num_experts, backend, chunks_of(shape.d_model)
    ),
    "composed": composed(shape.num_experts),
  }
  return {name: known[name] for name in implementations if name in known}


def own_jobs(
  shape: Shape, layers: Mapping[str, Layer], directions, routing: str
) -> dict[Any, Job]:
  """Returns all that a shape has to have compiled, but for peers."""
  jobs = checked_jobs(shape, layers, directions, routing)
  operands = functools.partial(baselines.dense_operands, shape)
  for direction in directions:
    dense = functools.partial(baselines.dense_mlp, direction=direction)
    jobs["dense", direction] = Job(dense, (jax.eval_shape(operands),))
  jobs["operands"] = Job(operands, ())
  return jobs


def checked_jobs(
  shape: Shape, layers: Mapping[str, Layer], directions, routing: str
) -> dict[Any, Job]:
  """Returns the steps of layers, their inputs, and what they must return."""
  make = functools.partial(_inputs, shape, routing)
  data = jax.eval_shape(make)
  jobs: dict[Any, Job] = step_jobs(layers, data, directions)
  jobs["inputs"] = Job(make, ())
  jobs["truth"] = Job(_truth_of, (data,))
  return jobs


def compile_shapes(
  layers: Mapping[str, Mapping[str, Layer]],
  jobs_of: Callable[[Shape, Mapping[str, Layer]], Mapping[Any, Job]],
) -> Callable[[Shape], dict[Any, jax.stages.Compiled]]:
  """Compiles the programs of all shapes side by side.

  All before the first is measured: a compiler takes turns badly.

  Args:
    layers: by the name of their shape.
    jobs_of: what to compile for a shape and its layers.

  Returns:
    What returns a shape's programs, or raises what compiling them raised.
  """
  start = time.perf_counter()
  named = {
    (name, key): job
    for name, of_shape in layers.items()
    for key, job in jobs_of(SHAPES[name], of_shape).items()
  }
  dense = [(name, key) for name, key in named if key[0] == "dense"]
  made = compile_together(named, alone=dense)
  print(f"compiled after {time.perf_counter() - start:.1f} s", flush=True)
  return lambda shape: {
    key: future.result()
    for (name, key), future in made.items()
    if name == shape.name
  }


class Truth(NamedTuple):
  """Samples of y and all gradients: in float32, and in the inputs' dtype.

  Attributes:
    expert: whose weight gradients they are; its group is a middling one.
    truth: y, dx and dgates of some tokens, some rows of dw_in and dw_out.
    baseline: the same by plain XLA.
  """

  expert: jax.Array
  truth: tuple[jax.Array, ...]
  baseline: tuple[jax.Array, ...]


def _truth_of(data: Inputs) -> Truth:
  experts = data.w_in.shape[0]
  sizes = jnp.zeros((experts,), jnp.int32).at[data.expert_ids].add(1)
  expert = jnp.argsort(sizes)[experts // 2]

  def samples(dtype):
    dtype = jnp.dtype(dtype)
    token = functools.partial(_token_step, data, dtype)
    dw_in, dw_out = _expert_step(data, dtype, expert)
    return (
      *lax.map(token, _tokens(data)),
      dw_in[_rows(dw_in)],
      dw_out[_rows(dw_out)],
    )

  return Truth(expert, samples(jnp.float32), samples(data.x.dtype))


def _token_step(data: Inputs, dtype, token):
  """Returns y, dx and dgates of one token."""
  ids = data.expert_ids[token]
  given = (data.x[token], data.gates[token], data.w_in[ids], data.w_out[ids])

  def layer(x, gates, w_in, w_out):
    dots = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    gate, up = jnp.split(dots("d,kdm->km", x, w_in), 2, axis=-1)
    y = dots("kn,knd->kd", jax.nn.silu(gate) * up, w_out)
    return dots("k,kd->d", gates.astype(y.dtype), y)

  y, backward = jax.vjp(layer, *(a.astype(dtype) for a in given))
  return y, *backward(data.dy[token].astype(dtype))[:2]


def _expert_step(data: Inputs, dtype, expert):
  """Returns dw_in and dw_out of one expert; who is not its, has gate 0."""
  mine = data.expert_ids == expert
  gates = jnp.sum(jnp.where(mine, data.gates, 0.0), axis=1)
  x, gates, dy = (a.astype(dtype) for a in (data.x, gates, data.dy))

  def layer(w_in, w_out):
    dots = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
    gate, up = jnp.split(dots(x, w_in), 2, axis=-1)
    return gates[:, None] * dots(jax.nn.silu(gate) * up, w_out)

  weights = (data.w_in[expert], data.w_out[expert])
  return jax.vjp(layer, *(w.astype(dtype) for w in weights))[1](dy)


def _tokens(data: Inputs) -> jax.Array:
  return jnp.arange(_CHECKED_TOKENS) * (data.x.shape[0] // _CHECKED_TOKENS)


def _rows(dw: jax.Array) -> np.ndarray:
  return np.linspace(0, dw.shape[0] - 1, _CHECKED_ROWS).astype(np.int32)


@jax.jit
def _sampled(data: Inputs, expert: jax.Array, results):
  """Returns of a step's results what `Truth` has of them."""
  of_tokens = [a[_tokens(data)].astype(data.x.dtype) for a in results[:3]]
  return of_tokens + [a[expert][_rows(a[0])] for a in results[3:]]


def check(data: Inputs, truth: Truth, results: Sequence[jax.Array]) -> None:
  """Raises AssertionError unless samples of all results are right."""
  sampled = _sampled(data, truth.expert, list(results))
  names = ("y", "dx", "dgates", "dw_in", "dw_out")
  for name, got, right, low in zip(
    names, sampled, truth.truth, truth.baseline, strict=False
  ):
    assert_accurate(got, right, low, err_msg=name)


def checked_steps(
  compiled: Mapping[Any, jax.stages.Compiled],
  layers: Mapping[str, Layer],
  directions: Sequence[str],
) -> tuple[Inputs, Truth, dict[tuple[str, str], Step]]:
  """Returns inputs, truth, and the steps of layers, each found right."""
  data = compiled["inputs"]()
  truth = compiled["truth"](data)
  steps = {
    key: compiled_step(compiled[key], layers[key[0]], data, key[1])
    for key in step_jobs(layers, data, directions)
  }
  for step in steps.values():
    check(data, truth, step.call())
  return data, truth, steps


def run(
  shape: Shape,
  compiled: Mapping[Any, jax.stages.Compiled],
  layers: Mapping[str, Layer],
  *,
  implementations: Sequence[str] = IMPLEMENTATIONS,
  directions: Sequence[str] = DIRECTIONS,
  routing: str = "random",
  peer_seconds: float = 60.0,
  **sampling: Any,
) -> Iterator[list[dict[str, Any]]]:
  """Yields the records of one shape, those of a direction together."""
  start = time.perf_counter()
  data, truth, steps = checked_steps(compiled, layers, directions)
  if "dense" in implementations:
    operands = compiled["operands"]()
    for direction in directions:
      call = functools.partial(compiled["dense", direction], operands)
      steps["dense", direction] = Step(call)
  _say(shape, "right", start)
  for direction in directions:
    chosen = {
      name: step for (name, of), step in steps.items() if of == direction
    }
    if chosen:
      yield measured(shape, direction, routing, chosen, sampling)
  wanted = [name for name in implementations if name in peers.PEERS]
  for direction in directions if wanted else ():
    chosen = {
      name: step for (name, of), step in steps.items() if of == direction
    }
    found = built_peers(wanted, shape, data, truth, direction, peer_seconds)
    if found:
      yield measured(shape, direction, routing, chosen | found, sampling)
    del found
    peers.release()


def built_peers(
  names: Sequence[str],
  shape: Shape,
  data: Inputs,
  truth: Truth,
  direction: str,
  seconds: float,
) -> dict[str, Step]:
  """Returns the steps of the peers that are here; says why of the others."""
  found = {}
  for name in names:
    start = time.perf_counter()
    try:
      step = peers.build(name, shape, data, direction, seconds=seconds)
      check(data, truth, _arrays(step.call())[:3])
    except peers.Absent as absent:
      print(f"{shape.name} {direction} {name}: {absent}", flush=True)
      continue
    except AssertionError as error:
      # Said, not left out.
      print(f"{name} is less accurate than twice XLA's rounding: {error}")
    _say(shape, f"{name} {direction} is ready", start)
    found[name] = step
  return found


def measured(
  shape: Shape,
  direction: str,
  routing: str,
  steps: Mapping[str, Step],
  sampling: Mapping[str, Any],
) -> list[dict[str, Any]]:
  """Returns the records of steps that took turns, having printed each."""
  calls = {name: step.call for name, step in steps.items()}
  taken = timing.time_interleaved(calls, **sampling)
  flops = shape.flops * (1 if direction == "forward" else 3)
  records = []
  for name, took in taken.items():
    step = steps[name]
    record = {
      "shape": shape.name,
      "direction": direction,
      "routing": routing,
      "implementation": name,
      **took._asdict(),
      "tflops": flops / took.ms_median / 1e9,
      "peak_mib": _mib(step.peak_bytes),
      "held_mib": _mib(step.held_bytes),
    }
    if "dense" in taken:
      record["of_dense"] = taken["dense"].ms_median / took.ms_median
    if "scattermoe_jax" in taken:
      ours = taken["scattermoe_jax"].ms_median
      record["times_ours"] = took.ms_median / ours
    if step.note:
      record["note"] = step.note
    records.append(record)
    print(_line(record), flush=True)
  return records


def _arrays(results) -> list[jax.Array]:
  to_jax = getattr(results, "to_jax", None)
  return to_jax() if to_jax else jax.tree.leaves(results)


def _mib(num_bytes: int | None) -> float | None:
  return None if num_bytes is None else num_bytes / _MIB


def _say(shape: Shape, what: str, start: float) -> None:
  seconds = time.perf_counter() - start
  print(f"{shape.name}: {what} after {seconds:.1f} s", flush=True)


def _line(r: dict[str, Any]) -> str:
  rest = [f"{r['of_dense']:.3f} of dense"] if "of_dense" in r else []
  rest += [
    f"{key} {r[key]:.0f} MiB" for key in ("peak_mib", "held_mib") if r[key]
  ]
  return (
    f"{r['shape']:>10} {r['direction']:<17} {r['implementation']:<23} "
    f"{r['ms_median']:9.4f} ms [{r['ms_p20']:.4f}, {r['ms_p80']:.4f}] "
    f"{r['tflops']:7.1f} TFLOP/s  {'  '.join(rest)}"
  )


def main(
  arguments: Sequence[str] | None = None,
  *,
  doc: str = __doc__,
  bench: str = "bench_mlp",
  shapes: Sequence[str] = LAYERS,
  implementations: Sequence[str] = IMPLEMENTATIONS,
) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores.

  Args:
    arguments: of the command line.
    doc: the question, of another benchmark of the same layers.
    bench: its name.
    shapes: its shapes.
    implementations: those that are measured if none is named.
  """
  parser = command.parser(doc, shapes=shapes)
  parser.add_argument(
    "--implementations",
    nargs="+",
    choices=(*IMPLEMENTATIONS, "composed", *peers.PEERS),
    default=implementations,
  )
  parser.add_argument(
    "--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS
  )
  parser.add_argument("--routing", choices=ROUTINGS, default="random")
  parser.add_argument(
    "--peer-seconds",
    type=float,
    default=60.0,
    help="after which building a peer is given up (default: 60)",
  )
  options = command.parse_with_backend(parser, arguments)
  layers = {
    name: own_layers(SHAPES[name], options.implementations, options.backend)
    for name in options.shapes
  }
  compiled = compile_shapes(
    layers,
    functools.partial(
      own_jobs, directions=options.directions, routing=options.routing
    ),
  )

  def measure(shape: Shape):
    return run(
      shape,
      compiled(shape),
      layers[shape.name],
      implementations=options.implementations,
      directions=options.directions,
      routing=options.routing,
      peer_seconds=options.peer_seconds,
      **command.sampling(options),
    )

  return command.measure_each(options, measure, bench=bench, key=KEY)


if __name__ == "__main__":
  main()
