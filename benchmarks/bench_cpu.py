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

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import command, timing
from scattermoe_jax.ops import parallel_linear
from scattermoe_jax.routing import Routing, input_rows, route
from tests.accuracy import assert_accurate

NUM_TOKENS, TOP_K, NUM_EXPERTS, D, N = 2048, 4, 64, 512, 512
PROMISE = 8.0


def main() -> None:
  """Checks, measures and prints; raises if the promise is broken."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--samples", type=int, default=20)
  parser.add_argument("--write", action="store_true")
  options = parser.parse_args()
  records = []
  for groups in ("even", "skewed"):
    for direction in ("forward", "forward+backward"):
      made = [measure(groups, direction, options.samples)]
      key = ("groups", "direction")
      records += command.store(made, options, bench="bench_cpu", key=key)
  for record in records:
    assert record["times_faster"] >= PROMISE, record
    assert record["temp_ratio"] <= 1 / PROMISE, record


def measure(groups: str, direction: str, samples: int) -> dict:
  """Returns the record of one kind of groups, in one direction."""
  x, w, dy, ids = inputs(groups)
  routing = jax.block_until_ready(route(ids, NUM_EXPERTS))
  form = forward if direction == "forward" else gradient
  compiled = {
    name: jax.jit(functools.partial(form, product))
    .lower(x, w, dy, routing)
    .compile()
    for name, product in (("ours", ours), ("ragged_dot", ragged_dot))
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
  record = summarise(groups, direction, times, temp)
  report(record)
  return record


def inputs(groups: str):
  """Returns x (T, d), w (E, d, n), dy (S, n) and ids (T, k)."""
  rng = np.random.default_rng(0)
  x, w, dy = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in (
      (NUM_TOKENS, D),
      (NUM_EXPERTS, D, N),
      (NUM_TOKENS * TOP_K, N),
    )
  )
  # Skewed: the popularity of experts falls as 1 / rank.
  popularity = 1.0 / np.arange(1, NUM_EXPERTS + 1)
  if groups == "even":
    popularity = np.ones(NUM_EXPERTS)
  logits = np.log(popularity) + rng.gumbel(size=(NUM_TOKENS, NUM_EXPERTS))
  ids = np.argsort(-logits, axis=1)[:, :TOP_K]
  return x, w, dy, jnp.asarray(ids, jnp.int32)


def ours(x, w, routing: Routing):
  """Returns (S, n) in grouped order."""
  return parallel_linear(x, w, routing, grouped_out=True, implementation="xla")


def ragged_dot(x, w, routing: Routing):
  """Returns the same by gathering the rows for `jax.lax.ragged_dot`."""
  rows = input_rows(routing, x.shape[0], grouped=False)
  return lax.ragged_dot(x[rows], w, routing.group_sizes)


def forward(product, x, w, dy, routing):
  """Returns (y,)."""
  del dy
  return (product(x, w, routing),)


def gradient(product, x, w, dy, routing):
  """Returns (y, dx, dw)."""
  y, vjp = jax.vjp(lambda x, w: product(x, w, routing), x, w)
  return y, *vjp(dy)


def check(results, x, w, dy, order, ids) -> None:
  """Raises unless both agree with NumPy, one expert after another, in float64.

  The baseline of the tolerance rule is plain products of one expert each.
  """
  experts = np.asarray(ids).reshape(-1)[order]
  tokens = order // TOP_K
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
  for e in range(NUM_EXPERTS):
    mine = (experts == e)[:, None]
    y = np.where(mine, matmul(x_rows, w[e]), y)
    dx_rows = np.where(mine, matmul(dy, w[e].T), dx_rows)
    dw[e] = matmul((x_rows * mine).T, dy)
  # In float64 whatever the dtype: the sum of k rows is no matter of products.
  dx = np.zeros(x.shape)
  np.add.at(dx, tokens, dx_rows.astype(np.float64))
  return y, dx.astype(x.dtype), dw


def summarise(groups, direction, times, temp) -> dict:
  """Returns one record of both variants."""
  passes = 1 if direction == "forward" else 3
  flops = 2 * NUM_TOKENS * TOP_K * D * N * passes
  mine, theirs = times["ours"], times["ragged_dot"]
  return {
    "groups": groups,
    "direction": direction,
    "shape": f"S={NUM_TOKENS * TOP_K} k={TOP_K} E={NUM_EXPERTS} d={D} n={N}",
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
