"""How long does the first call of a kernel take, and does E matter?

  python -m benchmarks.bench_compile [--shapes S] [--experts 8 128 512]
      [--ops up dw_up] [--implementation mosaic] [--write]

Traces, lowers and compiles each product of `benchmarks.bench_ops` for so many
experts, one after another, as a first call does, and calls it once on zeros. A
small program is compiled before, so that no time is the compiler's own start.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import command, layer_products
from benchmarks.compiling import abstract
from benchmarks.shapes import Shape
from scattermoe_jax.kernels import IMPLEMENTATIONS, choose_backend
from scattermoe_jax.routing import Routing, route

_KEY = ("shape", "num_experts", "op", "implementation")


def run(
  shape: Shape,
  *,
  experts: Sequence[int],
  ops: Sequence[str],
  implementation: str | None = None,
) -> Iterator[list[dict[str, Any]]]:
  """Yields the records of each number of experts, having printed them."""
  jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(8)))
  for num_experts in experts:
    sized = shape._replace(num_experts=num_experts)
    data, routing = jax.eval_shape(lambda sized=sized: _operands(sized))
    records = []
    for op in ops:
      product = layer_products.products(sized)[op]
      problem = layer_products.problem_of(sized, product)
      backend = choose_backend([problem], implementation)
      function = _function(backend, product)
      operands = tuple(data[name] for name in product.operands)
      seconds = _first_call(function, *operands, routing)
      records.append(
        {
          "shape": shape.name,
          "num_experts": num_experts,
          "op": op,
          "implementation": backend.__name__.rpartition(".")[2],
          **seconds,
        }
      )
      print(_line(records[-1]), flush=True)
    yield records


def _operands(shape: Shape) -> tuple[dict[str, jax.Array], Routing]:
  ids = jnp.zeros((shape.num_tokens, shape.top_k), jnp.int32)
  return layer_products.arrays(shape), route(ids, shape.num_experts)


def _function(backend, product: layer_products.Product):
  # A function of its own each time: nothing of it is cached.
  return lambda left, right, routing: layer_products.compute(
    backend, product, left, right, routing
  )


def _first_call(function, *arguments) -> dict[str, float]:
  arguments = abstract(arguments)
  start = time.perf_counter()
  lowered = jax.jit(function).trace(*arguments).lower()
  lowered_at = time.perf_counter()
  compiled = lowered.compile()
  compiled_at = time.perf_counter()
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), arguments)
  jax.block_until_ready(zeros)
  called_from = time.perf_counter()
  jax.block_until_ready(compiled(*zeros))
  call_s = time.perf_counter() - called_from
  return {
    "lower_s": lowered_at - start,
    "compile_s": compiled_at - lowered_at,
    "call_s": call_s,
    "first_call_s": compiled_at - start + call_s,
  }


def _line(r: dict[str, Any]) -> str:
  return (
    f"{r['shape']} E={r['num_experts']:<4} {r['op']:<8} "
    f"{r['implementation']:<7} {r['first_call_s']:5.2f} s: trace and lower "
    f"{r['lower_s']:.2f}, compile {r['compile_s']:.2f}, run {r['call_s']:.3f}"
  )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores."""
  # There is one first call.
  parser = command.parser(__doc__, shapes=("S",), is_sampled=False)
  parser.add_argument("--experts", nargs="+", type=int, default=(8, 128, 512))
  parser.add_argument(
    "--ops",
    nargs="+",
    choices=layer_products.OPS,
    default=("up", "dx_up", "dw_up"),
  )
  parser.add_argument("--implementation", choices=IMPLEMENTATIONS)
  options = parser.parse_args(arguments)
  return command.measure_each(
    options,
    lambda shape: run(
      shape,
      experts=options.experts,
      ops=options.ops,
      implementation=options.implementation,
    ),
    bench="bench_compile",
    key=_KEY,
  )


if __name__ == "__main__":
  main()
