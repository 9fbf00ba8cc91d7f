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
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from scattermoe_jax import ops
from scattermoe_jax.kernels import IMPLEMENTATIONS, choose_backend
from scattermoe_jax.ops.parallel_linear import linear_problems
from scattermoe_jax.routing import route
from tests.accuracy import assert_accurate

COPY_BYTES_PER_SECOND = 4.26e12
LAYERS = 4


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


def inputs(shape: Shape):
  """Returns (x, gates, ids per layer, w_gate_up, w_out): normal, seeded."""
  rng = np.random.default_rng(0)
  scores = rng.random((LAYERS, shape.num_tokens, shape.num_experts))
  ids = np.argsort(-scores, axis=-1)[..., : shape.top_k].astype(np.int32)

  def normal(key, *dims):
    make = jax.jit(
      lambda: jax.random.normal(jax.random.key(key), dims, jnp.bfloat16)
    )
    return make()

  tokens, d, n, experts, top_k = shape
  gates = jax.nn.softmax(normal(1, tokens, top_k), axis=-1)
  w_in = normal(2, experts, d, 2 * n) * jnp.bfloat16(d**-0.5)
  w_out = normal(3, experts, n, d) * jnp.bfloat16(n**-0.5)
  return normal(0, tokens, d), gates, jnp.asarray(ids), w_in, w_out


def layer(implementation, num_experts):
  """Returns the layer, a function of (x, gates, ids, w_in, w_out)."""

  def forward(x, gates, ids, w_in, w_out):
    routing = route(ids, num_experts)
    return ops.smoe_mlp(
      x, gates, routing, w_in, w_out, implementation=implementation
    )

  return forward


def layers(implementation, num_experts):
  """Returns several of them in one program."""
  one = layer(implementation, num_experts)

  def forward(x, gates, all_ids, w_in, w_out):
    for ids in all_ids:
      x = one(x, gates, ids, w_in, w_out)
    return x

  return forward


def truth(x, gates, ids, w_in, w_out, tokens):
  """Returns y of the first tokens in float32, choice by choice."""
  y = []
  for t in range(tokens):
    total = 0.0
    for j, expert in enumerate(np.asarray(ids[t])):
      w1, w2 = (w[expert].astype(jnp.float32) for w in (w_in, w_out))
      h = jnp.dot(x[t].astype(jnp.float32), w1, precision="highest")
      g, u = jnp.split(h, 2)
      out = jnp.dot(jax.nn.silu(g) * u, w2, precision="highest")
      total += gates[t, j].astype(jnp.float32) * out
    y.append(total)
  return np.asarray(jnp.stack(y))


def measure(name: str, shape: Shape, others: bool):
  """Returns the record of one shape."""
  x, gates, all_ids, w_in, w_out = inputs(shape)
  ids, experts = all_ids[0], shape.num_experts
  problems = linear_problems(route(ids, experts), w_in, x.dtype)
  chosen = choose_backend(problems).__name__.rpartition(".")[2]

  few = min(2, shape.num_tokens)
  oracle = truth(x, gates, ids, w_in, w_out, few)
  args = x, gates, ids, w_in, w_out
  baseline = jax.jit(layer("xla", experts))(*args)[:few]
  calls = {}
  for implementation in IMPLEMENTATIONS[:-1] if others else (chosen,):
    try:
      call = jax.jit(layer(implementation, experts))
      got = call(*args)[:few]
    except NotImplementedError as reason:
      print(f"{name} {implementation}: {reason}")
      continue
    assert_accurate(got, oracle, baseline, err_msg=f"{name} {implementation}")
    calls[implementation] = lambda call=call: call(*args)
  times = timing.time_interleaved(calls, sample_ms=10.0)
  program = jax.jit(layers(chosen, experts))
  run_program = lambda: program(x, gates, all_ids, w_in, w_out)
  in_program = timing.time_interleaved({chosen: run_program}, samples=5)

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
    "touched_experts": len(np.unique(np.asarray(ids))),
    "implementation": chosen,
    "ms_median": round(call_ms.ms_median, 4),
    "ms_p20": round(call_ms.ms_p20, 4),
    "ms_p80": round(call_ms.ms_p80, 4),
    "bound_ms": round(bound[0], 4),
    "of_bytes_bound": round(bound[0] / call_ms.ms_median, 3),
    "layer_ms": round(layer_ms, 4),
    "layer_of_bytes_bound": round(float(np.mean(bound)) / layer_ms, 3),
    "ms_median_of_others": {
      other: round(times[other].ms_median, 4)
      for other in times
      if other != chosen
    },
    **timing.environment(),
  }


def main():
  """Prints a line for each shape asked for."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("shapes", nargs="*", default=list(SHAPES))
  parser.add_argument("--others", action="store_true", help="compare backends")
  parser.add_argument("--write", action="store_true", help="keep the records")
  arguments = parser.parse_args()
  path = timing.results_path("bench_decode")
  for name in arguments.shapes:
    record = measure(name, SHAPES[name], arguments.others)
    print(
      f"{name:11} {record['implementation']:7} "
      f"call {record['ms_median']:.4f} ms {record['of_bytes_bound']:.2f} | "
      f"layer {record['layer_ms']:.4f} ms "
      f"{record['layer_of_bytes_bound']:.2f} of the bytes | "
      f"{record['ms_median_of_others']}",
      flush=True,
    )
    if arguments.write:
      records = timing.read_records(path) if path.exists() else []
      kept = {record["shape"]: record for record in records}
      kept[name] = record
      timing.write_records(path, [kept[n] for n in SHAPES if n in kept])


if __name__ == "__main__":
  main()
