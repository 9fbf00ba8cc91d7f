"""How long does a training step of the SMoE MLP take, and in how much memory?

  python -m benchmarks.bench_mlp [--shapes C1 C3] [--implementations ...]
      [--directions forward forward+backward] [--write]

A SwiGLU layer in bfloat16, from x, top-k expert ids and gates to y, or to y and
the gradients of x, gates and both weights. Sorting the ids is timed, choosing
them is not. All implementations of a shape take turns in one run:

  scattermoe_jax           smoe_mlp, with the backend that `--backend` names
  scattermoe_jax_chunked   the same in four chunks of columns: less memory
  dense                    the dense products of the same FLOPs, nothing else
  composed                 a gather, jax.lax.ragged_dot twice, a weighed sum
  sonicmoe scattermoe tokamax   if installed (`benchmarks.peers`)

`peak_mib` is what a step needs beside its arguments: XLA's temporaries and the
results, or what a peer's allocator says. `held_mib` is what is kept from the
forward to the backward, less x, gates and weights. Before its time is printed,
an implementation is compared with float32 on some tokens and on one expert.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import baselines, peers, timing
from benchmarks.peers import Step
from benchmarks.shapes import LAYERS, SHAPES, Shape, expert_ids, normal
from scattermoe_jax.ops import smoe_mlp
from scattermoe_jax.routing import route
from tests.accuracy import assert_accurate

DIRECTIONS = ("forward", "forward+backward")
IMPLEMENTATIONS = ("scattermoe_jax", "scattermoe_jax_chunked", "dense")
_CHUNKS = 4
_CHECKED_TOKENS = 8
_MIB = 2**20


class Inputs(NamedTuple):
  """What a step is given; `dy` is the gradient of y."""

  x: jax.Array
  gates: jax.Array
  w_in: jax.Array
  w_out: jax.Array
  expert_ids: jax.Array
  dy: jax.Array


def inputs(shape: Shape, routing: str) -> Inputs:
  """Returns normal data, weights scaled to keep activations near one."""
  rows = (shape.num_tokens, shape.d_model)
  experts, d, n = shape.num_experts, shape.d_model, shape.d_expert
  scale = jax.jit(lambda a, s: (a * s).astype(a.dtype), donate_argnums=0)
  gates = jax.nn.softmax(normal(1, *rows[:1], shape.top_k, dtype=jnp.float32))
  return Inputs(
    normal(0, *rows),
    gates,
    scale(normal(2, experts, d, 2 * n), jnp.bfloat16(d**-0.5)),
    scale(normal(3, experts, n, d), jnp.bfloat16(n**-0.5)),
    expert_ids(shape, routing),
    normal(4, *rows),
  )


def jax_step(layer, data: Inputs, direction: str) -> Step:
  """Returns a step of `layer(x, gates, w_in, w_out, expert_ids)`, compiled."""

  def step(x, gates, w_in, w_out, ids, dy):
    forward = functools.partial(layer, expert_ids=ids)
    if direction == "forward":
      return forward(x, gates, w_in, w_out)
    y, backward = jax.vjp(forward, x, gates, w_in, w_out)
    return y, *backward(dy)

  compiled = jax.jit(step).lower(*data).compile()
  memory = compiled.memory_analysis()
  peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
  return Step(lambda: compiled(*data), peak, held_bytes(layer, data))


def held_bytes(layer, data: Inputs) -> int:
  """Returns the bytes that `jax.vjp` of the layer keeps beside its inputs."""
  given = [data.x, data.gates, data.w_in, data.w_out]

  def residuals(x, gates, w_in, w_out, ids):
    forward = functools.partial(layer, expert_ids=ids)
    return jax.vjp(forward, x, gates, w_in, w_out)[1]

  kept = jax.eval_shape(residuals, *given, data.expert_ids)
  left = [(a.shape, a.dtype) for a in jax.tree.leaves(kept)]
  for array in given:
    if (array.shape, array.dtype) in left:
      left.remove((array.shape, array.dtype))
  return sum(int(np.prod(s)) * dtype.itemsize for s, dtype in left)


def ours(num_experts: int, backend: str | None, num_chunks: int = 1):
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


def composed(num_experts: int):
  """Returns the layer of `baselines.composed_mlp`."""

  def layer(x, gates, w_in, w_out, expert_ids):
    routing = route(expert_ids, num_experts)
    return baselines.composed_mlp(x, gates, routing, w_in, w_out)

  return layer


def build(
  implementation: str, shape: Shape, data: Inputs, direction: str, backend
) -> Step:
  """Returns the step of one implementation.

  Raises:
    peers.Absent: if it is a peer that is not installed.
  """
  experts = shape.num_experts
  if implementation == "scattermoe_jax":
    return jax_step(ours(experts, backend), data, direction)
  if implementation == "scattermoe_jax_chunked":
    return jax_step(ours(experts, backend, _CHUNKS), data, direction)
  if implementation == "composed":
    return jax_step(composed(experts), data, direction)
  if implementation == "dense":
    calls = baselines.dense_mlp_calls(shape, backward="back" in direction)
    return Step(lambda: [call() for call in calls])
  return peers.build(implementation, shape, data, direction)


def token_layer(x, gates, w_in, w_out):
  """One token: x (d), gates (k), and its experts' (k, d, 2n) and (k, n, d)."""
  dots = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
  gate, up = jnp.split(dots("d,kdm->km", x, w_in), 2, axis=-1)
  y = dots("kn,knd->kd", jax.nn.silu(gate) * up, w_out)
  return dots("k,kd->d", gates.astype(y.dtype), y)


def check(data: Inputs, results: Sequence[jax.Array]) -> None:
  """Raises AssertionError unless y, dx and dgates are right on some tokens."""
  num_tokens = data.x.shape[0]
  tokens = range(0, num_tokens, max(1, num_tokens // _CHECKED_TOKENS))
  truths, baselines_ = [], []
  for t in tokens:
    ids = data.expert_ids[t]
    given = (data.x[t], data.gates[t], data.w_in[ids], data.w_out[ids])
    given += (data.dy[t],)
    truths.append(_token_step(*(a.astype(jnp.float32) for a in given)))
    baselines_.append(_token_step(*(a.astype(data.x.dtype) for a in given)))
  for got, name, truth, low in zip(
    results,
    ("y", "dx", "dgates"),
    zip(*truths, strict=True),
    zip(*baselines_, strict=True),
    strict=False,
  ):
    got = got[jnp.asarray(tokens)].astype(data.x.dtype)
    truth = np.asarray(jnp.stack(truth), np.float64)
    assert_accurate(got, truth, jnp.stack(low), err_msg=name)


@jax.jit
def _token_step(x, gates, w_in, w_out, dy):
  y, backward = jax.vjp(token_layer, x, gates, w_in, w_out)
  return y, *backward(dy)[:2]


def run(
  shape: Shape,
  *,
  implementations: Sequence[str] = IMPLEMENTATIONS,
  directions: Sequence[str] = DIRECTIONS,
  routing: str = "random",
  backend: str | None = None,
  samples: int = 20,
  sample_ms: float = 10.0,
) -> list[dict[str, Any]]:
  """Returns the records of one shape, having printed each."""
  data = inputs(shape, routing)
  records = []
  for direction in directions:
    steps = {}
    for name in implementations:
      try:
        step = build(name, shape, data, direction, backend)
        if name != "dense":
          _check_or_say(name, data, step)
        steps[name] = step
      except peers.Absent as absent:
        print(f"{shape.name} {direction} {name}: {absent}", flush=True)
    taken = timing.time_interleaved(
      {name: step.call for name, step in steps.items()},
      samples=samples,
      sample_ms=sample_ms,
    )
    flops = shape.flops * (3 if "backward" in direction else 1)
    for name, time in taken.items():
      step = steps[name]
      record = {
        "bench": "bench_mlp",
        "shape": shape.name,
        "direction": direction,
        "routing": routing,
        "implementation": name,
        **time._asdict(),
        "tflops": flops / time.ms_median / 1e9,
        "peak_mib": _mib(step.peak_bytes),
        "held_mib": _mib(step.held_bytes) if name != "dense" else None,
      }
      if "dense" in taken:
        record["of_dense"] = taken["dense"].ms_median / time.ms_median
      records.append(record)
      print(_line(record), flush=True)
  return records


def _check_or_say(name: str, data: Inputs, step: Step) -> None:
  """Checks a step; a peer of less accuracy is said so, not left out."""
  try:
    check(data, _arrays(step.call()))
  except AssertionError as error:
    if name not in peers.PEERS:
      raise
    print(f"{name} is less accurate than twice XLA's rounding: {error}")


def _arrays(results) -> list[jax.Array]:
  to_jax = getattr(results, "to_jax", None)
  return to_jax() if to_jax else jax.tree.leaves(results)


def _mib(num_bytes: int | None) -> float | None:
  return None if num_bytes is None else num_bytes / _MIB


def _line(r: dict[str, Any]) -> str:
  memory = " ".join(
    f"{key} {r[key]:.0f} MiB" for key in ("peak_mib", "held_mib") if r[key]
  )
  return (
    f"{r['shape']:>10} {r['direction']:<17} {r['implementation']:<23} "
    f"{r['ms_median']:9.4f} ms [{r['ms_p20']:.4f}, {r['ms_p80']:.4f}] "
    f"{r['tflops']:7.1f} TFLOP/s  {r.get('of_dense', 0):.3f} of dense  {memory}"
  )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shapes", nargs="+", default=list(LAYERS))
  parser.add_argument("--implementations", nargs="+", default=IMPLEMENTATIONS)
  parser.add_argument("--directions", nargs="+", default=DIRECTIONS)
  parser.add_argument("--routing", default="random")
  parser.add_argument("--backend", default=None)
  parser.add_argument("--samples", type=int, default=20)
  parser.add_argument("--sample-ms", type=float, default=10.0)
  parser.add_argument("--write", action="store_true")
  options = parser.parse_args(arguments)
  records = []
  for name in options.shapes:
    records += run(
      SHAPES[name],
      implementations=options.implementations,
      directions=options.directions,
      routing=options.routing,
      backend=options.backend,
      samples=options.samples,
      sample_ms=options.sample_ms,
    )
    if options.write:
      timing.merge_records(
        timing.results_path("bench_mlp"),
        records,
        key=("shape", "direction", "routing", "implementation"),
      )
  return records


if __name__ == "__main__":
  main()
