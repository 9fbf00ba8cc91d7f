"""What does a training step save of memory for how much of its time?

  python -m benchmarks.bench_memory [--shapes C1 C2 C3] [--backend xla]
      [--variants chunks_1 chunks_4 keep_h] [--write]

Forward and backward of the layer of `benchmarks.bench_mlp`, all in turns:

  chunks_1         as it is: h and the ids are kept for the backward
  chunks_2, 4, 8   the expanded (S, d) array in slices of its columns
  keep_nothing, keep_h, keep_everything
                   under `jax.checkpoint` with that `remat_policy`
  keep_h_chunks_4  both

`peak_mib` is XLA's temporaries and results, `held_mib` what stays from the
forward to the backward beside x, gates and weights.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks import bench_mlp, command
from benchmarks.peers import Layer
from benchmarks.shapes import Shape
from scattermoe_jax.ops import remat_policy

_DIRECTION = "forward+backward"
_KEEP = ("nothing", "h", "everything")
VARIANTS = (
  *(f"chunks_{count}" for count in (1, 2, 4, 8)),
  *(f"keep_{keep}" for keep in _KEEP),
  "keep_h_chunks_4",
)


def variant(name: str, num_experts: int, backend: str | None) -> Layer:
  """Returns the layer that a name in `VARIANTS` stands for."""
  keep, chunks = name.removeprefix("keep_"), 1
  if "chunks_" in name:
    keep, _, count = keep.rpartition("chunks_")
    keep, chunks = keep.removesuffix("_"), int(count)
  layer = bench_mlp.ours(num_experts, backend, chunks)
  if not keep:
    return layer

  def rematerialised(*given, expert_ids):
    # Ids are no constants, so that both runs are one program.
    run = lambda ids, *given: layer(*given, expert_ids=ids)
    return jax.checkpoint(run, policy=remat_policy(keep))(expert_ids, *given)

  return rematerialised


def run(
  shape: Shape,
  *,
  variants: Sequence[str] = VARIANTS,
  backend: str | None = None,
  **sampling: Any,
) -> Iterator[list[dict[str, Any]]]:
  """Yields the records of one shape."""
  data = bench_mlp.inputs(shape, "random")
  layers = {
    name: variant(name, shape.num_experts, backend) for name in variants
  }
  made = bench_mlp.jax_steps(layers, data, [_DIRECTION])
  steps = {name: step for (name, _), step in made.items()}
  truth = bench_mlp.truth_of(data)
  for step in steps.values():
    bench_mlp.check(data, truth, step.call())
  records = bench_mlp.measured(shape, _DIRECTION, "random", steps, sampling)
  first = records[0]
  for record in records:
    record["of_time"] = record["ms_median"] / first["ms_median"]
    record["of_peak"] = record["peak_mib"] / first["peak_mib"]
  yield records


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores."""
  parser = command.parser(__doc__, shapes=("C1", "C2", "C3"))
  parser.add_argument("--variants", nargs="+", default=VARIANTS)
  parser.add_argument("--backend", default=None)
  options = parser.parse_args(arguments)
  measure = functools.partial(
    run,
    variants=options.variants,
    backend=options.backend,
    **command.sampling(options),
  )
  return command.measure_each(
    options, measure, bench="bench_memory", key=bench_mlp.KEY
  )


if __name__ == "__main__":
  main()
