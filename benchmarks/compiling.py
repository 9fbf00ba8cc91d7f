"""Programs compiled side by side, before anything is timed."""

import os
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax

_Name = TypeVar("_Name", bound=Hashable)

# XLA's own products are cuBLAS's: a search among Triton's as well took more
# than a minute for the large dense ones, and cuBLAS is what they stand for.
_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Job(NamedTuple):
  """A function and what it will be called with, arrays or only their shapes."""

  function: Callable[..., Any]
  arguments: tuple[Any, ...]


def compile_together(
  jobs: Mapping[_Name, Job],
  *,
  alone: Collection[_Name] = (),
  donate: tuple[int, ...] = (),
) -> dict[_Name, Future[jax.stages.Compiled]]:
  """Returns the compiled programs by name, each as a future.

  Python traces them one at a time; XLA and ptxas compile them on all cores.
  The result of a future raises what compiling raised.

  Args:
    jobs: what to compile.
    alone: names of those that are compiled first, one after another: dense
      products, for which XLA measures which of cuBLAS's algorithms is fastest,
      and is misled by what runs beside.
    donate: the arguments whose memory the results may take, of all jobs.
  """

  def compiled(job: Job) -> jax.stages.Compiled:
    made = jax.jit(job.function, donate_argnums=donate)
    return made.lower(*job.arguments).compile(_OPTIONS)

  found = {}
  for names, workers in (
    ([name for name in jobs if name in alone], 1),
    (
      [name for name in jobs if name not in alone],
      max(4, os.cpu_count() or 1),
    ),
  ):
    with ThreadPoolExecutor(max_workers=workers) as pool:
      for name in names:
        found[name] = pool.submit(compiled, jobs[name])
  return {name: found[name] for name in jobs}


def abstract(tree: Any) -> Any:
  """Returns the tree with each array replaced by its shape and dtype."""
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(jax.numpy.shape(a), a.dtype), tree
  )
