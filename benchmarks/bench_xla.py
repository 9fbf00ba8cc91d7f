"""Is the plain JAX backend worth having on a GPU that no kernel runs on?

  python -m benchmarks.bench_xla [--write]

Against `jax.lax.ragged_dot`, whose lowering outside TPUs multiplies every row
by every expert: one gathered product, in bfloat16, seeded normal inputs, random
routing; forward, and forward with both gradients. Times are printed only after
both results passed the tolerance rule of the tests against float32, one expert
after another. It fails if the promise, 5 times faster, is broken.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import command, timing
from benchmarks.compiling import Job, compile_together
from benchmarks.shapes import Shape, expert_ids, normal
from scattermoe_jax.ops import parallel_linear
from scattermoe_jax.routing import Routing, input_rows, route
from tests.accuracy import assert_accurate

# A model's layer where launches, not products, are what takes time.
SHAPE = Shape("xla", 4096, 1024, 512, 64, 4)
TINY = Shape("tiny", 48, 64, 32, 4, 2)
PROMISE = 5.0
DIRECTIONS = ("forward", "forward+backward")


def ours(x, w, routing: Routing):
  """Returns (S, n) in grouped order."""
  return parallel_linear(x, w, routing, grouped_out=True, implementation="xla")


def ragged_dot(x, w, routing: Routing):
  """Returns the same by gathering the rows for `jax.lax.ragged_dot`."""
  rows = input_rows(routing, x.shape[0], grouped=False)
  return lax.ragged_dot(x[rows], w, routing.group_sizes)


def plain(x, w, routing: Routing):
  """Returns the same, one expert after another, each with all rows."""
  rows = x[input_rows(routing, x.shape[0], grouped=False)]

  def add(y, expert_and_w):
    expert, w_e = expert_and_w
    mine = (routing.expert_ids == expert)[:, None]
    product = jnp.dot(rows, w_e, precision=lax.Precision.HIGHEST)
    return jnp.where(mine, product, y), None

  y = jnp.zeros((routing.num_rows, w.shape[2]), x.dtype)
  experts = jnp.arange(w.shape[0], dtype=jnp.int32)
  return lax.scan(add, y, (experts, w))[0]


def results(product, direction, x, w, dy, routing: Routing):
  """Returns (y,), or (y, dx, dw)."""
  if direction == "forward":
    return (product(x, w, routing),)
  y, vjp = jax.vjp(lambda x, w: product(x, w, routing), x, w)
  return y, *vjp(dy)


def truth(direction, x, w, dy, routing: Routing):
  """Returns the results in float32."""
  wide = (a.astype(jnp.float32) for a in (x, w, dy))
  return results(plain, direction, *wide, routing)


def measure(
  shape: Shape, direction: str, *, samples: int = 20
) -> dict[str, Any]:
  """Returns the record of one direction, having printed it."""
  x = normal(0, shape.num_tokens, shape.d_model)
  w = normal(1, shape.num_experts, shape.d_model, shape.d_expert)
  dy = normal(2, shape.num_rows, shape.d_expert)
  routing = jax.jit(route, static_argnums=1)(
    expert_ids(shape), shape.num_experts
  )
  args = (x, w, dy, routing)
  jobs = {
    product.__name__: Job(functools.partial(results, product, direction), args)
    for product in (ours, ragged_dot, plain)
  }
  jobs["truth"] = Job(functools.partial(truth, direction), args)
  program = {name: job.result() for name, job in compile_together(jobs).items()}
  right, baseline = program["truth"](*args), program["plain"](*args)
  calls, temp = {}, {}
  for name in ("ours", "ragged_dot"):
    got = program[name](*args)
    for i, part in enumerate(("y", "dx", "dw")[: len(got)]):
      said = f"{name} {part}"
      assert_accurate(got[i], np.asarray(right[i]), baseline[i], err_msg=said)
    calls[name] = functools.partial(program[name], *args)
    temp[name] = program[name].memory_analysis().temp_size_in_bytes
  times = timing.time_interleaved(calls, samples=samples, sample_ms=10.0)
  mine, theirs = times["ours"], times["ragged_dot"]
  passes = 1 if direction == "forward" else 3
  flops = 2 * shape.num_rows * shape.d_model * shape.d_expert * passes
  record = {
    **shape._asdict(),
    "direction": direction,
    "dtype": str(x.dtype),
    "ours_ms": mine._asdict(),
    "ragged_dot_ms": theirs._asdict(),
    "ours_tflops": flops / mine.ms_median / 1e9,
    "times_faster": theirs.ms_median / mine.ms_median,
    "ours_temp_bytes": temp["ours"],
    "ragged_dot_temp_bytes": temp["ragged_dot"],
  }
  print(
    f"{direction:>16} · {mine.ms_median:.3f} ms "
    f"({mine.ms_p20:.3f}-{mine.ms_p80:.3f}) · "
    f"{record['ours_tflops']:.1f} TFLOP/s · ragged_dot "
    f"{theirs.ms_median:.3f} ms · {record['times_faster']:.1f}x faster · temp "
    f"{temp['ours'] / 2**20:.0f} of {temp['ragged_dot'] / 2**20:.0f} MiB",
    flush=True,
  )
  return record


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Checks, measures, prints, stores; raises if the promise is broken."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--samples", type=int, default=20)
  parser.add_argument(
    "--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS
  )
  parser.add_argument("--tiny", action="store_true", help="means nothing")
  parser.add_argument("--write", action="store_true", help="keep the records")
  options = parser.parse_args(arguments)
  shape = TINY if options.tiny else SHAPE
  records = []
  for direction in options.directions:
    made = [measure(shape, direction, samples=options.samples)]
    key = ("name", "direction")
    records += command.store(made, options, bench="bench_xla", key=key)
  for record in records:
    assert options.tiny or record["times_faster"] >= PROMISE, record
  return records


if __name__ == "__main__":
  main()
