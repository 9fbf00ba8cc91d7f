"""How long does a training step of the SMoE MLP take, and in how much memory?

  python -m benchmarks.bench_mlp [--shapes C1 C3] [--implementations ...]
      [--directions forward forward+backward] [--peer-seconds 60] [--write]

A SwiGLU layer in bfloat16, from x, top-k expert ids and gates to y, or to y and
the gradients of x, gates and both weights. Sorting the ids is timed, choosing
them is not. All implementations of a shape take turns in one run:

  scattermoe_jax           smoe_mlp, with the backend that `--backend` names
  scattermoe_jax_chunked   the same in chunks of columns, as many as
                           `layer_steps.chunks_of` says: less memory
  dense                    the dense products of the same FLOPs, nothing else
  composed                 a gather, jax.lax.ragged_dot twice, a weighted sum
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
from typing import Any

import jax

from benchmarks import baselines, command, peers, timing
from benchmarks.compiling import Job, compile_together
from benchmarks.layer_steps import Inputs, own_layers
from benchmarks.layer_truth import Truth, check, checked_jobs, checked_steps
from benchmarks.peers import Layer, Step
from benchmarks.shapes import LAYERS, ROUTINGS, SHAPES, Shape

DIRECTIONS = ("forward", "forward+backward")
IMPLEMENTATIONS = ("scattermoe_jax", "scattermoe_jax_chunked", "dense")
KEY = ("shape", "direction", "routing", "implementation")
_MIB = 2**20


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
