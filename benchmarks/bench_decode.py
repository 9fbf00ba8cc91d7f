"""How close is a small batch to reading each touched expert's weights once?

  python -m benchmarks.bench_decode [T1 T8 ...] [--others] [--write]

The forward of one SwiGLU layer from (x, expert ids, gates) to y in bfloat16,
routing and schedule included. With few tokens nothing but the weights matters:
the bound is their bytes, of the experts that are touched, at the bandwidth that
a copy reaches on an H200 (4.26 TB/s, read and write).

Two times of the same layer. `call`: jitted calls dispatched back to back, so
that what shows is the slower of Python and the device. `layer`: one of four
layers in one program, each with its own routing and fed with the last one's
result, as in a model's decode step; the weights are shared, but by T = 1 they
already pass the L2 cache's 50 MB. No time is corrected for anything.

Everything is compiled side by side first. A shape's record is kept as soon as
it is measured.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import command, timing
from benchmarks.compiling import Job, abstract, compile_together
from benchmarks.shapes import normal_array
from scattermoe_jax import ops
from scattermoe_jax.kernels import IMPLEMENTATIONS, choose_backend
from scattermoe_jax.ops.parallel_linear import linear_problems
from scattermoe_jax.routing import route
from tests.accuracy import assert_accurate

COPY_BYTES_PER_SECOND = 4.26e12
LAYERS = 4
_CHECKED_TOKENS = 2


class Shape(NamedTuple):
  """T tokens to k of E experts of width n, in a model of width d."""

  num_tokens: int
  d: int = 4096
  n: int = 1024
  num_experts: int = 128
  top_k: int = 8


MIXTRAL = Shape(1, n=14336, num_experts=8, top_k=2)
SHAPES = {f"T{t}": Shape(t) for t in (1, 8, 64, 512)} | {
  f"mixtral_T{t}": MIXTRAL._replace(num_tokens=t) for t in (1, 8, 64)
}
# Small enough for a CPU; not a measurement of anything.
TINY = {"tiny": Shape(3, d=32, n=16, num_experts=8, top_k=2)}


def inputs(shape: Shape):
  """Returns (x, gates, ids per layer): normal, seeded."""
  tokens, d, _, experts, top_k = shape
  rng = np.random.default_rng(0)
  scores = rng.random((LAYERS, tokens, experts))
  ids = np.argsort(-scores, axis=-1)[..., :top_k].astype(np.int32)
  gates = jax.nn.softmax(normal_array(1, tokens, top_k), axis=-1)
  return normal_array(0, tokens, d), gates, jnp.asarray(ids)


@functools.cache
def weights(d: int, n: int, num_experts: int):
  """Returns (w_gate_up, w_out), made once for all batches of a model."""

  def make():
    w_in = normal_array(2, num_experts, d, 2 * n) * jnp.bfloat16(d**-0.5)
    w_out = normal_array(3, num_experts, n, d) * jnp.bfloat16(n**-0.5)
    return w_in, w_out

  return jax.jit(make)()


def layer(x, gates, ids, w_in, w_out, *, implementation):
  """Returns what is measured: y of one layer."""
  routing = route(ids, w_in.shape[0])
  return ops.smoe_mlp(
    x, gates, routing, w_in, w_out, implementation=implementation
  )


def layers(x, gates, all_ids, w_in, w_out, *, implementation):
  """Returns the last y of several layers in one program."""
  for ids in all_ids:
    x = layer(x, gates, ids, w_in, w_out, implementation=implementation)
  return x


def plain(x, gates, ids, w_in, w_out):
  """Returns (truth, baseline): y of the first tokens, choice by choice.

  In float32, and with every step rounded to the dtype of x.
  """
  few = min(_CHECKED_TOKENS, x.shape[0])

  def choice(row_and_expert, wide):
    row, expert = row_and_expert
    w1, w2 = w_in[expert], w_out[expert]
    if wide:
      row, w1, w2 = (a.astype(jnp.float32) for a in (row, w1, w2))
    g, u = jnp.split(jnp.dot(row, w1, precision=lax.Precision.HIGHEST), 2)
    a = jax.nn.silu(g) * u
    y = jnp.dot(a, w2, precision=lax.Precision.HIGHEST)
    return y.astype(jnp.float32)

  def tokens(wide):
    rows = jnp.repeat(x[:few], ids.shape[1], axis=0)
    y = lax.map(
      functools.partial(choice, wide=wide), (rows, ids[:few].reshape(-1))
    )
    y = y.reshape(few, -1, y.shape[-1])
    return jnp.einsum(
      "tj,tjd->td", gates[:few].astype(jnp.float32), y,
      precision=lax.Precision.HIGHEST,
    )  # fmt: skip

  return tokens(True), tokens(False).astype(x.dtype)


def chosen_for(shape: Shape) -> str:
  """Returns the implementation that runs a shape here by default."""
  tokens, d, n, experts, top_k = shape
  bfloat16 = jnp.bfloat16

  def name(ids):
    routing = route(ids, experts)
    w_in = jax.ShapeDtypeStruct((experts, d, 2 * n), bfloat16)
    found.append(choose_backend(linear_problems(routing, w_in, bfloat16)))

  found: list[Any] = []
  jax.eval_shape(name, jax.ShapeDtypeStruct((tokens, top_k), jnp.int32))
  return found[0].__name__.rpartition(".")[2]


def jobs_of(name: str, shape: Shape, others: bool) -> dict[Any, Job]:
  """Returns the programs of one shape, by (shape, implementation or kind)."""
  experts, d, n = shape.num_experts, shape.d, shape.n
  x, gates, all_ids = abstract(inputs(shape))
  ids = jax.ShapeDtypeStruct(all_ids.shape[1:], all_ids.dtype)
  w_in = jax.ShapeDtypeStruct((experts, d, 2 * n), x.dtype)
  w_out = jax.ShapeDtypeStruct((experts, n, d), x.dtype)
  chosen = chosen_for(shape)
  several = functools.partial(layers, implementation=chosen)
  jobs = {
    (name, "plain"): Job(plain, (x, gates, ids, w_in, w_out)),
    (name, "layers"): Job(several, (x, gates, all_ids, w_in, w_out)),
  }
  kernels = IMPLEMENTATIONS[:-1] if others else ()
  for implementation in dict.fromkeys((chosen, *kernels)):
    one = functools.partial(layer, implementation=implementation)
    jobs[name, implementation] = Job(one, (x, gates, ids, w_in, w_out))
  return jobs


def measure(name: str, shape: Shape, programs) -> dict[str, Any]:
  """Returns the record of one shape.

  Args:
    name: of the shape.
    shape: the problem.
    programs: futures by (shape, implementation or kind).
  """
  x, gates, all_ids = inputs(shape)
  w_in, w_out = weights(shape.d, shape.n, shape.num_experts)
  chosen = chosen_for(shape)
  args = x, gates, all_ids[0], w_in, w_out
  truth, baseline = programs[name, "plain"].result()(*args)
  calls = {}
  for (of, implementation), program in programs.items():
    if of != name or implementation not in IMPLEMENTATIONS:
      continue
    try:
      call = program.result()
    except NotImplementedError as reason:
      print(f"{name} {implementation}: {reason}", flush=True)
      continue
    got = call(*args)[: len(truth)]
    said = f"{name} {implementation}"
    assert_accurate(got, np.asarray(truth), baseline, err_msg=said)
    calls[implementation] = functools.partial(call, *args)
  times = timing.time_interleaved(calls, sample_ms=10.0)
  several = functools.partial(
    programs[name, "layers"].result(), x, gates, all_ids, w_in, w_out
  )
  in_program = timing.time_interleaved({chosen: several}, samples=5)

  expert_bytes = 3 * shape.d * shape.n * 2
  bound = [
    len(np.unique(i)) * expert_bytes / COPY_BYTES_PER_SECOND * 1e3
    for i in np.asarray(all_ids)
  ]
  call_ms = times[chosen]
  layer_ms = in_program[chosen].ms_median / LAYERS
  return {
    "shape": name,
    **shape._asdict(),
    "touched_experts": len(np.unique(np.asarray(all_ids[0]))),
    "implementation": chosen,
    "ms_median": round(call_ms.ms_median, 4),
    "ms_p20": round(call_ms.ms_p20, 4),
    "ms_p80": round(call_ms.ms_p80, 4),
    "samples": call_ms.samples,
    "bound_ms": round(bound[0], 4),
    "of_bytes_bound": round(bound[0] / call_ms.ms_median, 3),
    "layer_ms": round(layer_ms, 4),
    "layer_of_bytes_bound": round(float(np.mean(bound)) / layer_ms, 3),
    "ms_median_of_others": {
      other: round(times[other].ms_median, 4)
      for other in times
      if other != chosen
    },
  }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Prints a line for each shape asked for, returns the records."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  known = SHAPES | TINY
  parser.add_argument(
    "shapes", nargs="*", default=list(SHAPES), help=f"of {', '.join(known)}"
  )
  parser.add_argument(
    "--others",
    action="store_true",
    help="time all kernels, not the default alone",
  )
  parser.add_argument("--write", action="store_true", help="keep the records")
  options = parser.parse_args(arguments)
  if unknown := [name for name in options.shapes if name not in known]:
    parser.error(f"unknown shapes {unknown}; known are {', '.join(known)}")
  shapes = {name: known[name] for name in options.shapes}
  start = time.perf_counter()
  jobs: dict[Any, Job] = {}
  for name, shape in shapes.items():
    jobs |= jobs_of(name, shape, options.others)
  programs = compile_together(jobs)
  print(f"{len(jobs)} programs in {time.perf_counter() - start:.0f} s")
  records = []
  for name, shape in shapes.items():
    record = measure(name, shape, programs)
    key = ("shape",)
    records += command.store([record], options, bench="bench_decode", key=key)
    print(
      f"{name:11} {record['implementation']:7} "
      f"call {record['ms_median']:.4f} ms {record['of_bytes_bound']:.2f} | "
      f"layer {record['layer_ms']:.4f} ms "
      f"{record['layer_of_bytes_bound']:.2f} of the bytes | "
      f"{record['ms_median_of_others']}",
      flush=True,
    )
  return records


if __name__ == "__main__":
  main()
