"""What does a training step save of memory for how much of its time?

  python -m benchmarks.bench_memory [--shapes C1 C2 C3] [--backend xla]
      [--variants chunks_1 chunks_4 keep_h] [--write]

Forward and backward of the layer of `benchmarks.bench_mlp`, all in turns:

  chunks_1         as it is: h and the ids are kept for the backward
  chunks_N         the expanded (S, d) array in N slices of its columns
  keep_nothing, keep_h, keep_everything
                   under `jax.checkpoint` with that `remat_policy`
  keep_h_chunks_N  both

Without `--variants` N is chosen for each shape so that a slice is whole tiles.
`peak_mib` is XLA's temporaries and results, `held_mib` what stays from the
forward to the backward beside x, gates, weights and ids.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from benchmarks import bench_mlp, command, layer_steps, layer_truth
from benchmarks.peers import Layer
from benchmarks.shapes import SHAPES, Shape
from scattermoe_jax.ops import remat_policy

_DIRECTION = "forward+backward"
_KEEP = ("nothing", "h", "everything")


_NAME = re.compile(
  rf"keep_({'|'.join(_KEEP)})(?:_chunks_([1-9]\d*))?|chunks_([1-9]\d*)"
)


def variant(name: str, num_experts: int, backend: str | None) -> Layer:
  """Returns the layer that a name of a variant stands for."""
  keep, *counts = _NAME.fullmatch(name).groups()
  chunks = int(next(filter(None, counts), 1))
  layer = layer_steps.ours(num_experts, backend, chunks)
  if not keep:
    return layer

  def rematerialised(*given, expert_ids):
    # Ids are no constants, so that both runs are one program.
    run = lambda ids, *given: layer(*given, expert_ids=ids)
    return jax.checkpoint(run, policy=remat_policy(keep))(expert_ids, *given)

  return rematerialised


def variants_of(shape: Shape) -> list[str]:
  """Returns what is measured of a shape.

  Chunks of whole tiles: as many as `layer_steps.chunks_of` takes, and the next
  count below. By XLA's count more of them save nothing of C1, 5 % of C2.
  """
  most = layer_steps.chunks_of(shape.d_model)
  whole = layer_steps.whole_chunks(shape.d_model)
  counts = [count for count in whole if count <= most][-2:]
  both = [f"keep_h_chunks_{most}"] if counts else []
  return [
    "chunks_1",
    *(f"chunks_{count}" for count in counts),
    *(f"keep_{keep}" for keep in _KEEP),
    *both,
  ]


def run(
  shape: Shape,
  compiled: Mapping[Any, jax.stages.Compiled],
  layers: Mapping[str, Layer],
  sampling: Mapping[str, Any],
) -> Iterator[list[dict[str, Any]]]:
  """Yields the records of one shape."""
  *_, steps = layer_truth.checked_steps(compiled, layers, [_DIRECTION])
  records = bench_mlp.measured(
    shape,
    _DIRECTION,
    "random",
    {name: step for (name, _), step in steps.items()},
    sampling,
  )
  first = records[0]
  for record in records:
    record["of_time"] = record["ms_median"] / first["ms_median"]
    record["of_peak"] = record["peak_mib"] / first["peak_mib"]
  yield records


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores."""
  parser = command.parser(__doc__, shapes=("C1", "C2", "C3"))
  parser.add_argument(
    "--variants",
    nargs="+",
    help="beside chunks_1, of which the others are fractions",
  )
  options = command.parse_with_backend(parser, arguments)
  for name in options.variants or ():
    if not _NAME.fullmatch(name):
      parser.error(
        f"--variants {name}: expected chunks_N, keep_K or keep_K_chunks_N, "
        f"where K is one of {', '.join(_KEEP)}"
      )
  layers = {}
  for name in options.shapes:
    shape = SHAPES[name]
    layers[name] = {
      each: variant(each, shape.num_experts, options.backend)
      for each in ("chunks_1", *(options.variants or variants_of(shape)))
    }
  compiled = bench_mlp.compile_shapes(
    layers,
    functools.partial(
      layer_truth.checked_jobs, directions=[_DIRECTION], routing="random"
    ),
  )

  def measure(shape: Shape):
    sampling = command.sampling(options)
    return run(shape, compiled(shape), layers[shape.name], sampling)

  return command.measure_each(
    options, measure, bench="bench_memory", key=bench_mlp.KEY
  )


if __name__ == "__main__":
  main()
