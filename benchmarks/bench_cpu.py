"""Does the cost of the plain JAX backend follow the rows, not the experts?

On a CPU, against `jax.lax.ragged_dot`, whose lowering outside TPUs multiplies
every row by every expert. Same rows, same routing, float32, seeded normal
inputs; even and skewed groups; forward, and forward with both gradients.

  python -m benchmarks.bench_cpu [--write]

Times are printed, and with --write stored, only after both results passed the
tolerance rule of the tests against NumPy in float64. It fails if the promise, 8
times faster in at most an eighth of the temporary memory, is broken.
"""

import argparse
import functools
import os
from collections.abc import Sequence

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench_xla, command, timing
from benchmarks.shapes import Shape
from scattermoe_jax.routing import route
from tests.accuracy import assert_accurate

SHAPE = Shape("cpu", 2048, 512, 512, 64, 4)
PROMISE = 8.0


def main(arguments: Sequence[str] | None = None) -> list[dict]:
  """Checks, measures, prints, stores; raises if the promise is broken."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--samples", type=int, default=20)
  parser.add_argument("--tiny", action="store_true", help="means nothing")
  parser.add_argument("--write", action="store_true", help="keep the records")
  options = parser.parse_args(arguments)
  shape = bench_xla.TINY if options.tiny else SHAPE
  records = []
  for groups in ("even", "skewed"):
    for direction in bench_xla.DIRECTIONS:
      made = [measure(shape, groups, direction, options.samples)]
      key = ("groups", "direction")
      records += command.store(made, options, bench="bench_cpu", key=key)
  for record in records:
    kept = (
      record["times_faster"] >= PROMISE and record["temp_ratio"] <= 1 / PROMISE
    )
    assert options.tiny or kept, record
  return records


def measure(shape: Shape, groups: str, direction: str, samples: int) -> dict:
  """Returns the record of one kind of groups, in one direction."""
  x, w, dy, ids = inputs(shape, groups)
  routing = jax.block_until_ready(route(ids, shape.num_experts))
  compiled = {
    product.__name__: jax.jit(
      functools.partial(bench_xla.results, product, direction)
    )
    .lower(x, w, dy, routing)
    .compile()
    for product in (bench_xla.ours, bench_xla.ragged_dot)
  }
  results = {name: run(x, w, dy, routing) for name, run in compiled.items()}
  check(results, x, w, dy, np.asarray(routing.scattered_ids), ids)
  times = timing.time_interleaved(
    {
      name: functools.partial(run, x, w, dy, routing)
      for name, run in compiled.items()
    },
    samples=samples,
  )
  temp = {
    name: run.memory_analysis().temp_size_in_bytes
    for name, run in compiled.items()
  }
  record = summarise(shape, groups, direction, times, temp)
  report(record)
  return record


def inputs(shape: Shape, groups: str):
  """Returns x (T, d), w (E, d, n), dy (S, n) and ids (T, k)."""
  rng = np.random.default_rng(0)
  num_tokens, num_experts = shape.num_tokens, shape.num_experts
  x, w, dy = (
    jnp.asarray(rng.normal(size=dims), jnp.float32)
    for dims in (
      (num_tokens, shape.d_model),
      (num_experts, shape.d_model, shape.d_expert),
      (shape.num_rows, shape.d_expert),
    )
  )
  # Skewed: the popularity of experts falls as 1 / rank.
  popularity = 1.0 / np.arange(1, num_experts + 1)
  if groups == "even":
    popularity = np.ones(num_experts)
  logits = np.log(popularity) + rng.gumbel(size=(num_tokens, num_experts))
  ids = np.argsort(-logits, axis=1)[:, : shape.top_k]
  return x, w, dy, jnp.asarray(ids, jnp.int32)


def check(results, x, w, dy, order, ids) -> None:
  """Raises unless both agree with NumPy, one expert after another, in float64.

  The baseline of the tolerance rule is plain products of one expert each.
  """
  experts = np.asarray(ids).reshape(-1)[order]
  tokens = order // ids.shape[1]
  wide = (np.asarray(a, np.float64) for a in (x, w, dy))
  truth = by_expert(np.matmul, *wide, tokens, experts)
  plain = by_expert(
    lambda a, b: np.asarray(_product(a, b)), x, w, dy, tokens, experts
  )
  for name, got in results.items():
    for a, right, baseline in zip(got, truth, plain, strict=False):
      assert_accurate(a, right, baseline, err_msg=name)


# Of all rows, so that it compiles once: who has what is chosen afterwards.
_product = jax.jit(jnp.matmul)


def by_expert(matmul, x, w, dy, tokens, experts):
  """Returns (y, dx, dw), every row by every expert, in the dtype of x."""
  x, w, dy = (np.asarray(a) for a in (x, w, dy))
  x_rows = x[tokens]
  y, dx_rows = np.zeros_like(dy), np.zeros_like(x_rows)
  dw = np.zeros_like(w)
  for e in range(len(w)):
    mine = (experts == e)[:, None]
    y = np.where(mine, matmul(x_rows, w[e]), y)
    dx_rows = np.where(mine, matmul(dy, w[e].T), dx_rows)
    dw[e] = matmul((x_rows * mine).T, dy)
  # In float64 whatever the dtype: the sum of k rows is no matter of products.
  dx = np.zeros(x.shape)
  np.add.at(dx, tokens, dx_rows.astype(np.float64))
  return y, dx.astype(x.dtype), dw


def summarise(shape: Shape, groups, direction, times, temp) -> dict:
  """Returns one record of both variants."""
  passes = 1 if direction == "forward" else 3
  d, n = shape.d_model, shape.d_expert
  flops = 2 * shape.num_rows * d * n * passes
  mine, theirs = times["ours"], times["ragged_dot"]
  return {
    "groups": groups,
    "direction": direction,
    "shape": f"S={shape.num_rows} k={shape.top_k} E={shape.num_experts} "
    f"d={d} n={n}",
    "dtype": "float32",
    "cores": os.cpu_count(),
    "ours_ms": mine._asdict(),
    "ragged_dot_ms": theirs._asdict(),
    "ours_gflops": flops / mine.ms_median / 1e6,
    "times_faster": theirs.ms_median / mine.ms_median,
    "ours_temp_bytes": temp["ours"],
    "ragged_dot_temp_bytes": temp["ragged_dot"],
    "temp_ratio": temp["ours"] / temp["ragged_dot"],
  }


def report(record: dict) -> None:
  """Prints one line."""
  mine, theirs = record["ours_ms"], record["ragged_dot_ms"]
  print(
    f"{record['shape']} {record['groups']:>6} {record['direction']:>16} · "
    f"{mine['ms_median']:.1f} ms ({mine['ms_p20']:.1f}-{mine['ms_p80']:.1f}) · "
    f"{record['ours_gflops']:.0f} GFLOP/s · ragged_dot "
    f"{theirs['ms_median']:.0f} ms · {record['times_faster']:.1f}x faster · "
    f"temp {record['ours_temp_bytes'] / 2**20:.1f} of "
    f"{record['ragged_dot_temp_bytes'] / 2**20:.1f} MiB",
    flush=True,
  )


if __name__ == "__main__":
  main()
