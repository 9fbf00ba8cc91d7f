"""How close is each grouped product to a dense product of the same FLOPs?

  python -m benchmarks.bench_ops [--shapes L S] [--routings random zipf even]
      [--implementations mosaic triton xla scattermoe] [--ops up dw_up]
      [--write]

Six products of a SwiGLU layer, forward and backward, in bfloat16 on normal
data, for random, Zipf-skewed and even routing, schedule included:

  up        x gathered         times w_in     -> h grouped
  down      a grouped          times w_out    -> y grouped
  dx_down   dy gathered        times w_out^T  -> da grouped
  dx_up     dh grouped         times w_in^T   -> dx grouped
  dw_down   a^T grouped        times dy gathered
  dw_up     x^T gathered       times dh grouped

`of_dense` is the time of `jnp.dot` of the same FLOPs, with the operands dense
and the same contraction, over the product's; `of_bytes_bound` the time of
moving every operand and the result once, at the bandwidth of a copy, over it.
All in one run, in turns, of programs that were compiled beforehand. Before any
time is taken, products are compared with float32: rows where one group meets
the next, or 64 rows of the weight gradients of three experts. Operands are left
in cache only where they are smaller than it: here they are not. `scattermoe`,
where it is installed, is its own Triton kernels on the same arrays: up and
dw_up.
"""

import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import baselines, command, timing
from benchmarks.compiling import Job, abstract, compile_together
from benchmarks.layer_products import (
  OPS,
  Data,
  Product,
  arrays,
  compute,
  problem_of,
  products,
  routing_of,
)
from benchmarks.peers import Absent, scattermoe_adapter
from benchmarks.shapes import ROUTINGS, Shape
from scattermoe_jax.kernels import choose_backend
from scattermoe_jax.routing import Routing, input_rows
from tests.accuracy import assert_accurate

IMPLEMENTATIONS = ("mosaic", "triton", "xla", "scattermoe")
_PEER = "scattermoe"
_KEY = ("shape", "op", "routing", "implementation")
_CHECKED_ROWS = 64


def dense(product: Product, data: Data) -> jax.Array:
  """Returns the product of the same size of one expert that has every row."""
  left, right = (
    # What is gathered becomes rows of its own.
    data["rows"] if name in ("x", "dy") else data[name]
    for name in product.operands
  )
  if product.is_weight_gradient:
    return jnp.dot(left.T, right)
  return jnp.dot(left, right[0].T if product.transpose_w else right[0])


def sampled(product: Product, left, right, routing: Routing, got):
  """Returns (truth, baseline, got) of some of the product, of equal shapes."""
  sample = _sampled_experts if product.is_weight_gradient else _sampled_rows
  return sample(product, left, right, routing, got)


def _sampled_rows(product: Product, left, right, routing: Routing, got):
  # Where one group meets the next is where a kernel goes wrong.
  ends = jnp.cumsum(routing.group_sizes)
  edges = jnp.concatenate([ends - routing.group_sizes, ends - 1])
  edges = jnp.sort(jnp.clip(edges, 0, routing.num_rows - 1))
  rows = edges[_spread(edges.shape[0])]
  x_rows = input_rows(routing, left.shape[0], grouped=product.x_grouped)

  def one(row):
    w = right[routing.expert_ids[row]]
    x = left[x_rows[row]][None, :]
    return _both_products(x, w.T if product.transpose_w else w)

  truth, baseline = lax.map(one, rows)
  return truth[:, 0], baseline[:, 0], got[rows]


def _sampled_experts(product: Product, left, right, routing: Routing, got):
  # The smallest group, a middling one and the largest; no token is in one
  # twice, so that T rows hold any of them.
  sizes = routing.group_sizes
  experts = jnp.argsort(sizes)[jnp.array([0, sizes.shape[0] // 2, -1])]
  starts = jnp.cumsum(sizes) - sizes
  columns = _spread(left.shape[1])
  x_rows = input_rows(routing, left.shape[0], grouped=product.x_grouped)
  y_rows = input_rows(routing, right.shape[0], grouped=product.y_grouped)

  def one(expert):
    row = jnp.arange(routing.num_tokens)
    mine = (row < sizes[expert])[:, None]
    row = jnp.minimum(starts[expert] + row, routing.num_rows - 1)
    x, y = left[x_rows[row]][:, columns], right[y_rows[row]]
    zeroed = (jnp.where(mine, a, jnp.zeros_like(a)) for a in (x, y))
    x, y = zeroed
    return _both_products(x.T, y)

  truth, baseline = lax.map(one, experts)
  return truth, baseline, got[experts][:, columns]


def _spread(size: int) -> np.ndarray:
  """Returns some of the indices below `size`, the first and last among them."""
  count = min(size, _CHECKED_ROWS)
  return np.unique(np.linspace(0, size - 1, count).astype(np.int32))


def _both_products(a, b) -> tuple[jax.Array, jax.Array]:
  wide = [v.astype(jnp.float32) for v in (a, b)]
  truth = jnp.dot(*wide, precision=lax.Precision.HIGHEST)
  low = jnp.dot(a, b, preferred_element_type=jnp.float32).astype(a.dtype)
  return truth, low


class Programs(NamedTuple):
  """What a shape needs, compiled.

  Attributes:
    dense: by op, functions of the data.
    products: by implementation and op, functions of (left, right, routing).
    samples: of (data, routing, results by op): what to compare, by op.
  """

  dense: dict[str, Any]
  products: dict[tuple[str, str], Any]
  samples: Any


def compile_programs(
  shape: Shape, ops, implementations, data: Data, routing: Routing
) -> Programs:
  """Returns all programs of a shape; one of each op, whatever the routing."""
  described = {op: products(shape)[op] for op in ops}
  data, routing = abstract((data, routing))
  jobs: dict[Any, Job] = {}
  for op, product in described.items():
    jobs["dense", op] = Job(functools.partial(dense, product), (data,))
    operands = tuple(data[name] for name in product.operands)
    for implementation in implementations:
      try:
        backend = choose_backend([problem_of(shape, product)], implementation)
      except NotImplementedError as error:
        print(f"{shape.name} {op}: {error}", flush=True)
        continue
      call = functools.partial(compute, backend, product)
      jobs[implementation, op] = Job(call, (*operands, routing))
  results = {
    op: jax.ShapeDtypeStruct(_result_shape(shape, product), jnp.bfloat16)
    for op, product in described.items()
  }

  def samples(data, routing, results):
    return {
      op: sampled(
        described[op],
        *(data[name] for name in described[op].operands),
        routing,
        result,
      )
      for op, result in results.items()
    }

  jobs["samples", ""] = Job(samples, (data, routing, results))
  compiled = compile_together(jobs, alone=[("dense", op) for op in ops])
  made = {name: job.result() for name, job in compiled.items()}
  return Programs(
    {op: made["dense", op] for op in ops},
    {name: made[name] for name in jobs if name[0] in implementations},
    made["samples", ""],
  )


def check(programs: Programs, ops, data: Data, routes, operands) -> None:
  """Raises AssertionError unless samples of every product are right."""
  for routing, routed in routes.items():
    for implementation in {name for name, _ in programs.products}:
      results = {
        op: programs.products[implementation, op](*operands[op], routed)
        for op in ops
      }
      samples = programs.samples(data, routed, results)
      for op, (truth, baseline, got) in jax.device_get(samples).items():
        said = f"{implementation} {op} {routing}"
        assert_accurate(got, truth, baseline, err_msg=said)


def peer_calls(product: Product, left, right, routes) -> dict[Any, Any]:
  """Returns calls of the peer by (name, routing), if it is here and right.

  Raises:
    AssertionError: if a sample of its results is wrong.
  """
  try:
    calls = scattermoe_adapter.products(product.op, left, right, routes)
  except Absent as absent:
    print(f"{_PEER} {product.op}: {absent}", flush=True)
    return {}
  sample = jax.jit(functools.partial(sampled, product))
  for routing, call in calls.items():
    (got,) = call().to_jax()
    found = jax.device_get(sample(left, right, routes[routing], got))
    truth, baseline, got = found
    said = f"{_PEER} {product.op} {routing}"
    assert_accurate(got, truth, baseline, err_msg=said)
  return {(_PEER, routing): call for routing, call in calls.items()}


def run(
  shape: Shape,
  *,
  routings: Sequence[str] = ROUTINGS,
  implementations: Sequence[str] = IMPLEMENTATIONS[:1],
  ops: Sequence[str] = OPS,
  bandwidth: float,
  samples: int = 20,
  sample_ms: float = timing.SAMPLE_MS,
) -> Iterator[list[dict[str, Any]]]:
  """Yields the records of one shape, those of an op together.

  Args:
    shape: the problem.
    routings: names in `ROUTINGS`.
    implementations: names in `IMPLEMENTATIONS`.
    ops: names in `OPS`.
    bandwidth: bytes per second of a copy.
    samples: of each time.
    sample_ms: about the length of each.
  """
  start = time.perf_counter()
  data, routes = jax.jit(
    lambda: (
      arrays(shape),
      {name: routing_of(shape, name) for name in routings},
    )
  )()
  programs = compile_programs(
    shape,
    ops,
    [name for name in implementations if name != _PEER],
    data,
    routes[routings[0]],
  )
  operands = {
    op: tuple(data[name] for name in products(shape)[op].operands) for op in ops
  }
  compiled = time.perf_counter()
  check(programs, ops, data, routes, operands)
  print(
    f"{shape.name}: compiled in {compiled - start:.1f} s, right "
    f"after {time.perf_counter() - compiled:.1f} s",
    flush=True,
  )
  for op in ops:
    product = products(shape)[op]
    calls = {
      (implementation, routing): functools.partial(
        programs.products[implementation, op], *operands[op], routed
      )
      for implementation, of in programs.products
      if of == op
      for routing, routed in routes.items()
    }
    if _PEER in implementations:
      calls |= peer_calls(product, *operands[op], routes)
    calls["dense", "even"] = functools.partial(programs.dense[op], data)
    taken = timing.time_interleaved(calls, samples=samples, sample_ms=sample_ms)
    flops = 2 * shape.num_rows * product.widths[0] * product.widths[1]
    num_bytes = _bytes_moved(shape, product, *operands[op])
    records = [
      {
        "shape": shape.name,
        "op": op,
        "routing": routing,
        "implementation": implementation,
        **took._asdict(),
        "tflops": flops / took.ms_median / 1e9,
        "of_dense": taken["dense", "even"].ms_median / took.ms_median,
        "of_bytes_bound": num_bytes / bandwidth * 1e3 / took.ms_median,
        "gb_per_s": num_bytes / took.ms_median / 1e6,
        "copy_gb_per_s": bandwidth / 1e9,
      }
      for (implementation, routing), took in taken.items()
    ]
    print("\n".join(map(_line, records)), flush=True)
    yield records


def _result_shape(shape: Shape, product: Product) -> tuple[int, ...]:
  if product.is_weight_gradient:
    return shape.num_experts, *product.widths
  return shape.num_rows, product.widths[1]


def _bytes_moved(shape: Shape, product: Product, left, right) -> int:
  result = math.prod(_result_shape(shape, product)) * left.dtype.itemsize
  return left.nbytes + right.nbytes + result


def _line(r: dict[str, Any]) -> str:
  return (
    f"{r['shape']:>16} {r['op']:<8} {r['routing']:<7} "
    f"{r['implementation']:<10} {r['ms_median']:9.4f} ms "
    f"[{r['ms_p20']:.4f}, {r['ms_p80']:.4f}] {r['tflops']:7.1f} TFLOP/s "
    f"{r['gb_per_s']:7.0f} GB/s  {r['of_dense']:.3f} of dense  "
    f"{r['of_bytes_bound']:.3f} of bytes bound"
  )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores."""
  parser = command.parser(__doc__, shapes=("L", "S"))
  parser.add_argument(
    "--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS
  )
  parser.add_argument(
    "--implementations",
    nargs="+",
    choices=IMPLEMENTATIONS,
    default=IMPLEMENTATIONS[:1],
  )
  parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
  options = parser.parse_args(arguments)
  size = 2**8 if options.shapes == ["tiny"] else 2**31
  measure = functools.partial(
    run,
    routings=options.routings,
    implementations=options.implementations,
    ops=options.ops,
    bandwidth=baselines.copy_bandwidth(size),
    **command.sampling(options),
  )
  return command.measure_each(options, measure, bench="bench_ops", key=_KEY)


if __name__ == "__main__":
  main()
