"""How long does a router take, forward and backward?

  python -m benchmarks.bench_router [--shapes S L C2] [--write]

From bfloat16 tokens and a float32 kernel to gates, experts and the gradients of
both: the linear layer, softmax, the top k. Implementations, in turns:

  split     `Router` as a model has it: on a GPU, products of bfloat16 parts
  float32   the same router given float32 tokens: products of float32

`of_bytes_bound` is against reading the tokens twice and writing their gradient.
Each one's logits are compared with float64 for some tokens, and both must send
nearly all tokens to the same experts, before a time is printed.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import baselines, command, timing
from benchmarks.compiling import Job, compile_together
from benchmarks.shapes import Shape, normal
from scattermoe_jax.nn import Router

_DTYPES = {"split": jnp.bfloat16, "float32": jnp.float32}
_CHECKED_TOKENS = 1024
# Of logits of deviation one; tensor cores sum with a few bits less.
_LOGIT_ERROR = 1e-4
# Near a tie either choice is right.
_SAME_EXPERTS = 0.999


def step(router: Router, dtype, x, kernel, dgates):
  """Returns the logits, the experts and the gradients of x and kernel."""

  def apply(x, kernel):
    routed = router.apply({"params": {"kernel": kernel}}, x.astype(dtype))
    return routed.gates, (routed.logits, routed.expert_ids)

  _, backward, (logits, ids) = jax.vjp(apply, x, kernel, has_aux=True)
  return logits, ids, *backward(dgates)


def check(results: dict[str, Sequence[jax.Array]], x, kernel) -> None:
  """Raises AssertionError unless logits are right and choices agree."""
  truth = np.asarray(x[:_CHECKED_TOKENS], np.float64) @ np.asarray(kernel)
  for name, (logits, *_) in results.items():
    error = np.max(np.abs(np.asarray(logits[:_CHECKED_TOKENS]) - truth))
    assert error < _LOGIT_ERROR, f"{name}: logits off by {error:.1e}"
  one, other = (np.sort(np.asarray(ids), 1) for _, ids, *_ in results.values())
  same = np.mean(np.all(one == other, axis=1))
  assert same >= _SAME_EXPERTS, f"{same:.4f} of tokens go the same way"


def run(
  shape: Shape, *, bandwidth: float, **sampling: Any
) -> Iterator[list[dict[str, Any]]]:
  """Yields the records of one shape, having printed each.

  Args:
    shape: tokens, width, experts, top k.
    bandwidth: bytes per second that the device copies.
    sampling: see `timing.time_interleaved`.
  """
  x = normal(0, shape.num_tokens, shape.d_model)
  kernel = normal(1, shape.d_model, shape.num_experts, dtype=jnp.float32)
  kernel *= shape.d_model**-0.5
  dgates = normal(2, shape.num_tokens, shape.top_k, dtype=jnp.float32)
  given = (x, kernel, dgates)
  router = Router(shape.num_experts, shape.top_k)
  jobs = {
    name: Job(functools.partial(step, router, dtype), given)
    for name, dtype in _DTYPES.items()
  }
  compiled = {k: made.result() for k, made in compile_together(jobs).items()}
  check({name: made(*given) for name, made in compiled.items()}, x, kernel)
  calls = {k: functools.partial(made, *given) for k, made in compiled.items()}
  taken = timing.time_interleaved(calls, **sampling)
  records = []
  for name, took in taken.items():
    bound = 3 * x.nbytes / bandwidth * 1e3
    records.append(
      {
        "shape": shape.name,
        "implementation": name,
        **took._asdict(),
        "of_bytes_bound": bound / took.ms_median,
        "times_faster": taken["float32"].ms_median / took.ms_median,
      }
    )
    print(
      f"{shape.name:>6} {name:<8} {took.ms_median:8.3f} ms "
      f"[{took.ms_p20:.3f}, {took.ms_p80:.3f}]  "
      f"{records[-1]['of_bytes_bound']:.2f} of the bytes bound",
      flush=True,
    )
  yield records


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores."""
  options = command.parser(__doc__, shapes=("S", "L", "C2")).parse_args(
    arguments
  )
  measure = functools.partial(
    run, bandwidth=baselines.copy_bandwidth(), **command.sampling(options)
  )
  return command.measure_each(
    options, measure, bench="bench_router", key=("shape", "implementation")
  )


if __name__ == "__main__":
  main()
