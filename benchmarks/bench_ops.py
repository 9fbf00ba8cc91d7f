"""How close is each grouped product to a dense product of the same FLOPs?

  python -m benchmarks.bench_ops [--shapes L S] [--routings random zipf even]
      [--implementations mosaic triton xla] [--write]

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
All in one run, in turns. A product is compared with float32 on some of its rows
(or experts) before its time is printed. Operands are left in cache only where
they are smaller than it: here they are not.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import baselines, timing
from benchmarks.shapes import ROUTINGS, SHAPES, Shape, expert_ids, normal
from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels import Problem, choose_backend
from scattermoe_jax.routing import Routing, input_rows, route
from tests.accuracy import assert_accurate

OPS = ("up", "down", "dx_down", "dx_up", "dw_down", "dw_up")
_CHECKED_ROWS = 64


class Product(NamedTuple):
  """One of the six: its arguments by name, and its size."""

  op: str
  operands: tuple[str, str]
  x_grouped: bool
  y_grouped: bool  # of group_xty's second operand, or of the result
  transpose_w: bool
  widths: tuple[int, int]  # contraction and columns, or columns of x and y

  @property
  def is_weight_gradient(self) -> bool:
    """Whether rows are contracted."""
    return self.op.startswith("dw")


def products(shape: Shape) -> dict[str, Product]:
  """Returns the six products of a layer, by name."""
  d, n = shape.d_model, shape.d_expert
  rows = (
    Product("up", ("x", "w_in"), False, True, False, (d, 2 * n)),
    Product("down", ("a", "w_out"), True, True, False, (n, d)),
    Product("dx_down", ("dy", "w_out"), False, True, True, (d, n)),
    Product("dx_up", ("dh", "w_in"), True, True, True, (2 * n, d)),
    Product("dw_down", ("a", "dy"), True, False, False, (n, d)),
    Product("dw_up", ("x", "dh"), False, True, False, (d, 2 * n)),
  )
  return {product.op: product for product in rows}


def arrays(shape: Shape) -> dict[str, jax.Array]:
  """Returns the operands of all six, by name."""
  num_tokens, d, n = shape.num_tokens, shape.d_model, shape.d_expert
  rows, experts = shape.num_rows, shape.num_experts
  sizes = {
    "x": (num_tokens, d),
    "dy": (num_tokens, d),
    "a": (rows, n),
    "dh": (rows, 2 * n),
    "w_in": (experts, d, 2 * n),
    "w_out": (experts, n, d),
  }
  return {
    name: normal(seed, *dims) for seed, (name, dims) in enumerate(sizes.items())
  }


def compute(backend, product: Product, left, right, routing: Routing):
  """Returns the product, by one backend."""
  if product.is_weight_gradient:
    return backend.group_xty(
      left,
      right,
      routing,
      x_grouped=product.x_grouped,
      y_grouped=product.y_grouped,
    )
  return backend.scatter2scatter(
    left,
    right,
    routing,
    grouped_in=product.x_grouped,
    grouped_out=True,
    transpose_w=product.transpose_w,
  )


def check(product: Product, left, right, routing: Routing, got) -> None:
  """Raises AssertionError unless a sample of the product is right."""
  sizes = np.asarray(routing.group_sizes)
  ends = np.cumsum(sizes)
  x_rows = input_rows(routing, left.shape[0], grouped=product.x_grouped)
  if product.is_weight_gradient:
    y_rows = input_rows(routing, right.shape[0], grouped=product.y_grouped)
    # The largest group, a middling one and the smallest.
    for expert in np.argsort(sizes)[[0, len(sizes) // 2, -1]]:
      rows = slice(ends[expert] - sizes[expert], ends[expert])
      pair = (left[x_rows[rows]], right[y_rows[rows]])
      _assert_product(got[expert], pair[0].T, pair[1])
    return
  # Where one group meets the next is where a kernel goes wrong.
  edges = np.unique(np.concatenate([ends - sizes, ends - 1]).clip(0))
  for row in edges[:: max(1, len(edges) // _CHECKED_ROWS)]:
    expert = int(routing.expert_ids[row])
    if expert < len(sizes):
      w = right[expert].T if product.transpose_w else right[expert]
      _assert_product(got[row][None], left[x_rows[row]][None], w)


def _assert_product(got, a, b) -> None:
  truth, baseline = _both_products(a, b)
  assert_accurate(got, np.asarray(truth, np.float64), baseline)


@jax.jit
def _both_products(a, b):
  wide = [v.astype(jnp.float32) for v in (a, b)]
  truth = jnp.dot(*wide, precision=lax.Precision.HIGHEST)
  return truth, jnp.dot(a, b, preferred_element_type=jnp.float32).astype(
    a.dtype
  )


def run(
  shape: Shape,
  *,
  routings: Sequence[str] = ROUTINGS,
  implementations: Sequence[str] = ("mosaic",),
  ops: Sequence[str] = OPS,
  samples: int = 20,
  sample_ms: float = 10.0,
) -> list[dict[str, Any]]:
  """Returns the records of one shape, having printed each."""
  data = arrays(shape)
  routes = {
    name: jax.jit(functools.partial(route, num_experts=shape.num_experts))(
      expert_ids(shape, name)
    )
    for name in routings
  }
  bandwidth = baselines.copy_bandwidth(
    2 * 2**30 if shape.name != "tiny" else 64
  )
  records = []
  for op in ops:
    product = products(shape)[op]
    left, right = (data[name] for name in product.operands)
    calls = _calls(shape, product, left, right, routes, implementations)
    calls["dense", "even"] = _dense(shape, product)
    taken = timing.time_interleaved(calls, samples=samples, sample_ms=sample_ms)
    flops = 2 * shape.num_rows * product.widths[0] * product.widths[1]
    num_bytes = _bytes_moved(shape, product, left, right)
    for (implementation, routing), time in taken.items():
      record = {
        "bench": "bench_ops",
        "shape": shape.name,
        "op": op,
        "routing": routing,
        "implementation": implementation,
        **time._asdict(),
        "tflops": flops / time.ms_median / 1e9,
        "of_dense": taken["dense", "even"].ms_median / time.ms_median,
        "of_bytes_bound": num_bytes / bandwidth * 1e3 / time.ms_median,
        "gb_per_s": num_bytes / time.ms_median / 1e6,
        "copy_gb_per_s": bandwidth / 1e9,
      }
      records.append(record)
      print(_line(record), flush=True)
  return records


def _calls(
  shape, product, left, right, routes, implementations
) -> dict[tuple[str, str], Callable]:
  calls = {}
  for implementation in implementations:
    problem = Problem(
      shape.num_rows,
      shape.num_experts,
      *product.widths,
      str(left.dtype),
      current_device(),
    )
    try:
      backend = choose_backend([problem], implementation)
    except NotImplementedError as error:
      print(f"{shape.name} {product.op}: {error}", flush=True)
      continue
    call = jax.jit(functools.partial(compute, backend, product))
    for routing, routed in routes.items():
      check(product, left, right, routed, call(left, right, routed))
      calls[implementation, routing] = functools.partial(
        call, left, right, routed
      )
  return calls


def _dense(shape: Shape, product: Product) -> Callable:
  first, second = product.widths
  if product.is_weight_gradient:
    return baselines.dense_product(
      first, shape.num_rows, second, contract_rows=True
    )
  return baselines.dense_product(shape.num_rows, first, second)


def _bytes_moved(shape: Shape, product: Product, left, right) -> int:
  if product.is_weight_gradient:
    result = shape.num_experts * product.widths[0] * product.widths[1]
  else:
    result = shape.num_rows * product.widths[1]
  return left.nbytes + right.nbytes + result * left.dtype.itemsize


def _line(r: dict[str, Any]) -> str:
  return (
    f"{r['shape']:>16} {r['op']:<8} {r['routing']:<7} "
    f"{r['implementation']:<8} {r['ms_median']:9.4f} ms "
    f"[{r['ms_p20']:.4f}, {r['ms_p80']:.4f}] {r['tflops']:7.1f} TFLOP/s "
    f"{r['gb_per_s']:7.0f} GB/s  {r['of_dense']:.3f} of dense  "
    f"{r['of_bytes_bound']:.3f} of bytes bound"
  )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shapes", nargs="+", default=["L", "S"])
  parser.add_argument("--routings", nargs="+", default=list(ROUTINGS))
  parser.add_argument("--implementations", nargs="+", default=["mosaic"])
  parser.add_argument("--ops", nargs="+", default=list(OPS))
  parser.add_argument("--samples", type=int, default=20)
  parser.add_argument("--sample-ms", type=float, default=10.0)
  parser.add_argument("--write", action="store_true")
  options = parser.parse_args(arguments)
  records = []
  for name in options.shapes:
    records += run(
      SHAPES[name],
      routings=options.routings,
      implementations=options.implementations,
      ops=options.ops,
      samples=options.samples,
      sample_ms=options.sample_ms,
    )
    if options.write:
      timing.merge_records(
        timing.results_path("bench_ops"),
        records,
        key=("shape", "op", "routing", "implementation"),
      )
  return records


if __name__ == "__main__":
  main()
