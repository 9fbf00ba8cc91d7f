"""How long does the first call of a kernel take, and does E matter?

  python -m benchmarks.bench_compile [--shapes S] [--experts 8 128 512]
      [--ops up dw_up] [--implementation mosaic] [--write]

Traces, lowers and compiles for so many experts, one after another, as a first
call does, and calls it once on zeros:

  up down dx_down dx_up dw_down dw_up   the products of `benchmarks.bench_ops`
  activation   up with the activation in its epilogue
  derivative   dx_down with the activation's derivative, and gradients of gates
  dw_up_sum    dw_up, beside the sum of each token's rows of dx, by mosaic
  step         forward and backward of a SwiGLU layer, all of its kernels; for
               one number of experts and no other op, since kernels that were
               compiled once in a process are not compiled again

A small program is compiled before, so that no time is the compiler's own start.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import command, layer_products, layer_steps
from benchmarks.compiling import Job
from benchmarks.shapes import Shape
from scattermoe_jax.kernels import IMPLEMENTATIONS, choose_backend
from scattermoe_jax.ops.activations import get_activation
from scattermoe_jax.routing import Routing, route

OPS = (*layer_products.OPS, "activation", "derivative", "dw_up_sum", "step")
_KEY = ("shape", "num_experts", "op", "implementation")


def run(
  shape: Shape,
  *,
  experts: Sequence[int],
  ops: Sequence[str] | None = None,
  implementation: str | None = None,
) -> Iterator[list[dict[str, Any]]]:
  """Yields the records of each number of experts, having printed them.

  Args:
    shape: the problem, of whatever E.
    experts: numbers of experts.
    ops: of `OPS`; None for all that the backend has but "step".
    implementation: "mosaic", "triton" or "xla"; None for the first that can.

  Raises:
    SystemExit: if the backend has no such op.
  """
  jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(8)))
  for num_experts in experts:
    sized = shape._replace(num_experts=num_experts)
    products = layer_products.products(sized)
    problems = [
      layer_products.problem_of(sized, product) for product in products.values()
    ]
    backend = choose_backend(problems, implementation)
    name = _name_of(backend)
    calls = jobs(sized, backend)
    if missing := set(ops or ()) - set(calls):
      raise SystemExit(f"--ops {missing.pop()}: of mosaic alone, not of {name}")
    records = []
    for op in ops or [op for op in OPS[:-1] if op in calls]:
      records.append(
        {
          "shape": shape.name,
          "num_experts": num_experts,
          "op": op,
          "implementation": name,
          **_first_call(calls[op]),
        }
      )
      print(_line(records[-1]), flush=True)
    yield records


def jobs(shape: Shape, backend) -> dict[str, Job]:
  """Returns what is compiled of a backend, by op, with types as arguments."""
  data, routing = jax.eval_shape(lambda: _operands(shape))
  calls = {
    op: _product(backend, product, data, routing)
    for op, product in layer_products.products(shape).items()
  }
  calls |= _fused(backend, data, routing)
  return calls | {"step": _step(shape, _name_of(backend))}


def _name_of(backend) -> str:
  return backend.__name__.rpartition(".")[2]


def _operands(shape: Shape) -> tuple[layer_products.Data, Routing]:
  ids = jnp.zeros((shape.num_tokens, shape.top_k), jnp.int32)
  return layer_products.arrays(shape), route(ids, shape.num_experts)


def _product(backend, product: layer_products.Product, data, routing) -> Job:
  # A function of its own each time: nothing of it is cached.
  compute = functools.partial(layer_products.compute, backend, product)
  return Job(compute, (*map(data.get, product.operands), routing))


def _fused(backend, data: layer_products.Data, routing) -> dict[str, Job]:
  """Returns what a layer makes of products."""
  activation = get_activation("silu", gated=True)
  gates = jax.ShapeDtypeStruct((routing.num_rows,), jnp.float32)

  def activated(x, w, routing):
    options = dict(bias=None, activation=activation, keep_h=True)
    return backend.up_projection(x, w, routing, **options)

  def derivative(dy, w, h, gates, routing):
    return backend.down_projection_grad(
      dy, w, h, gates, routing, activation=activation
    )

  def dw_up_sum(x, dh, rows, routing):
    from scattermoe_jax.kernels.mosaic import grouped_xty

    return grouped_xty.group_xty_and_sum(
      x, dh, lambda *_: rows, routing, y_grouped=True
    )

  x, dy, h, rows = (data[name] for name in ("x", "dy", "dh", "rows"))
  made = {
    "activation": Job(activated, (x, data["w_in"], routing)),
    "derivative": Job(derivative, (dy, data["w_out"], h, gates, routing)),
  }
  if _name_of(backend) == "mosaic":
    made["dw_up_sum"] = Job(dw_up_sum, (x, h, rows, routing))
  return made


def _step(shape: Shape, implementation: str) -> Job:
  """Returns forward and backward of a layer."""
  layer = layer_steps.ours(shape.num_experts, implementation)
  given = jax.eval_shape(lambda: layer_steps.inputs(shape, "even"))
  return Job(layer_steps.step_of(layer, "forward+backward"), tuple(given))


def _first_call(job: Job) -> dict[str, float]:
  start = time.perf_counter()
  lowered = jax.jit(job.function).trace(*job.arguments).lower()
  lowered_at = time.perf_counter()
  compiled = lowered.compile()
  compiled_at = time.perf_counter()
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), job.arguments)
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
    f"{r['shape']} E={r['num_experts']:<4} {r['op']:<10} "
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
    choices=OPS,
    help="all but step, if left out",
  )
  parser.add_argument("--implementation", choices=IMPLEMENTATIONS)
  options = parser.parse_args(arguments)
  ops = options.ops or ()
  if "step" in ops and len(ops) * len(options.experts) > 1:
    parser.error("--ops step: takes no other op, and one number of --experts")
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
