"""How many bytes of registers do the Hopper kernels spill?

  python -m benchmarks.spills [--shapes S L] [--ops up derivative]

What a kernel holds and registers do not, it stores and loads again, through the
28 KB of L1 that its ring leaves: 76 to 224 bytes a thread slowed products of L
by 3 to 8 % (docs/kernels.md). ptxas says how much, for a device that is only
described: needs JAX with its CUDA plugin, but no GPU, where JAX asks for
JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1. Runs nothing. Ops are those of
`benchmarks.bench_compile`.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks import bench_compile, compile_for
from benchmarks.compiling import Job
from benchmarks.shapes import SHAPES
from scattermoe_jax.kernels import mosaic

_OPS = bench_compile.OPS[:-1]  # A step is made of the others' kernels.
_KERNEL = re.compile(
  r"Function properties for (\S+)\s+\d+ bytes stack frame, "
  r"(\d+) bytes spill stores, (\d+) bytes spill loads"
)


class Spill(NamedTuple):
  """What a thread of a kernel spills, in bytes."""

  kernel: str
  stored: int
  loaded: int


def spills_in(report: str) -> list[Spill]:
  """Returns what ptxas reports of each kernel."""
  found = _KERNEL.findall(report)
  return [
    Spill(kernel.removesuffix("_mosaic_gpu_kernel"), int(stored), int(loaded))
    for kernel, stored, loaded in found
  ]


def spills(job: Job) -> list[Spill]:
  """Returns what the kernels of a call spill on an H200."""
  lowered = compile_for.lower_for(compile_for.CARDS["H200"], job)
  with _printed() as lines:
    lowered.compile()
  return spills_in("".join(lines))


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
  """Lends the lines that C++ will have printed; they are there afterwards."""
  lines: list[str] = []
  sys.stdout.flush()
  sys.stderr.flush()
  with tempfile.TemporaryFile("w+") as file:
    kept = [os.dup(number) for number in (1, 2)]
    for number in (1, 2):
      os.dup2(file.fileno(), number)
    try:
      yield lines
    finally:
      for number, copy in zip((1, 2), kept, strict=True):
        os.dup2(copy, number)
        os.close(copy)
      file.seek(0)
      lines += file


def main(arguments: Sequence[str] | None = None) -> None:
  """Compiles and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["S", "L"])
  parser.add_argument("--ops", nargs="+", choices=_OPS, default=[*_OPS])
  options = parser.parse_args(arguments)
  os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # Read by JAX when it compiles.
  for shape in options.shapes:
    jobs = bench_compile.jobs(SHAPES[shape], mosaic)
    for op in options.ops:
      for spill in spills(jobs[op]):
        print(
          f"{shape:<16} {op:<10} {spill.kernel:<20} "
          f"{spill.stored:4} bytes stored, {spill.loaded:4} loaded",
          flush=True,
        )


if __name__ == "__main__":
  main()
