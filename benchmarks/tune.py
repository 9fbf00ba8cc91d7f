"""Which tiles of the Hopper kernels are fastest, shape by shape?

  python -m benchmarks.tune [--shapes L S mixtral-8x7b] [--ops up_projection]
      [--write]

Measures the rule's tiles and their nearest neighbours among
`tuning.candidates`, at most eight for each product of a SwiGLU layer, compiled
side by side and timed in turns on random routing. With `--write` those that
beat the rule by more than 2 % go into `kernels/tables/`; the rule's own go with
them where a neighbour's entry would otherwise speak for a shape that they suit.
A candidate's result must equal that of the rule's tiles.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import command, layer_products, timing
from benchmarks.compiling import Job, abstract, compile_together
from benchmarks.shapes import Shape
from scattermoe_jax import kernels
from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels import Problem, tuning
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.tuning import Entry
from scattermoe_jax.ops.activations import get_activation

MOST_CANDIDATES = 8
# A table's tiles are faster than the rule's by more than noise.
_GAIN = 1.02
# Sums in another order differ in the last bits of bfloat16.
_AGREEMENT = 2.0**-6


class Case(NamedTuple):
  """One product: a kernel of `tuning.OPS` on a shape.

  Attributes:
    op: a name in `tuning.OPS`.
    widths: d_in and d_out of its problem.
    call: returns the product of (data, routing), by one config.
  """

  op: str
  widths: tuple[int, int]
  call: Callable[..., Any]


def cases(shape: Shape) -> list[Case]:
  """Returns the products of a layer's forward and backward, by kernel."""
  from scattermoe_jax.kernels import mosaic

  d, n = shape.d_model, shape.d_expert
  silu = get_activation("silu", gated=True)
  found = []
  for op, product in layer_products.products(shape).items():
    if product.is_weight_gradient:
      name = f"group_xty_gathered_{'y' if product.x_grouped else 'x'}"
    else:
      name = f"scatter2scatter_{'grouped' if product.x_grouped else 'gathered'}"
    if op == "dx_down":
      continue  # Gathered like `up`; its fused form is below.
    found.append(Case(name, product.widths, _plain(mosaic, product)))

  def up_projection(data, routing, config):
    return mosaic.up_projection(
      data["x"],
      data["w_in"],
      routing,
      bias=None,
      activation=silu,
      keep_h=True,
      config=config,
    )

  def down_projection_grad(data, routing, config):
    return mosaic.down_projection_grad(
      data["dy"],
      data["w_out"],
      data["dh"],
      jnp.ones((shape.num_rows,), jnp.float32),
      routing,
      activation=silu,
      config=config,
    )

  found.append(Case("up_projection", (d, 2 * n), up_projection))
  found.append(Case("down_projection_grad", (d, n), down_projection_grad))
  return found


def _plain(mosaic, product: layer_products.Product) -> Callable[..., Any]:
  def call(data, routing, config):
    backend = layer_products.WithConfig(mosaic, config)
    left, right = (data[name] for name in product.operands)
    return layer_products.compute(backend, product, left, right, routing)

  return call


def pruned(op: str, problem: Problem) -> list[TileConfig]:
  """Returns the rule's tiles, then candidates in the order of their likeness.

  Likeness is in how many ways tiles differ: blocks, stages, band.
  """
  rule = tuning.heuristic(op, problem)

  def unlike(config: TileConfig) -> int:
    blocks = (config.block_m, config.block_n)
    return (
      (blocks != (rule.block_m, rule.block_n))
      + (config.num_stages != rule.num_stages)
      + (config.band_n != rule.band_n)
    )

  others = [c for c in tuning.candidates(op, problem) if c != rule]
  return [rule, *sorted(others, key=unlike)][:MOST_CANDIDATES]


def winner(times: Mapping[TileConfig, float], rule: TileConfig) -> TileConfig:
  """Returns the fastest tiles, the rule's unless they are clearly beaten."""
  best = min(times, key=lambda config: times[config])
  return best if times[rule] > _GAIN * times[best] else rule


class Measured(NamedTuple):
  """What one case came to: the best tiles, and the rule's."""

  op: str
  problem: Problem
  best: TileConfig
  rule: TileConfig

  @property
  def entry(self) -> Entry:
    """The line of the table that says so."""
    problem = self.problem
    return Entry(
      self.op,
      -(-problem.num_rows // problem.num_experts),
      problem.num_experts,
      problem.d_in,
      problem.d_out,
      self.best,
    )


def table_of(old: Iterable[Entry], measured: Iterable[Measured]) -> list[Entry]:
  """Returns the new table: what was measured replaces what was there.

  Where the rule won, it gets an entry only if another one is near enough to be
  taken in its place.
  """
  table = {entry[:-1]: entry for entry in old}
  measured = list(measured)
  for one in measured:
    table.pop(one.entry[:-1], None)
    if one.best != one.rule:
      table[one.entry[:-1]] = one.entry
  won = list(table.values())
  for one in measured:
    if tuning.lookup(one.op, one.problem, won) not in (None, one.best):
      table[one.entry[:-1]] = one.entry
  return sorted(table.values(), key=lambda entry: entry[:-1])


def table_path(capability: tuple[int, int]) -> pathlib.Path:
  """Returns where the table of a compute capability stands."""
  folder = pathlib.Path(kernels.__file__).parent / "tables"
  return folder / tuning.table_name(capability)


def write_table(path: pathlib.Path, entries: Sequence[Entry]) -> None:
  """Writes a table as `tuning.table` reads it."""
  records = [
    {**e._asdict(), "config": dataclasses.asdict(e.config)} for e in entries
  ]
  timing.write_records(path, records)


def measure(
  shape: Shape, ops: Sequence[str], **sampling: Any
) -> list[Measured]:
  """Returns what is fastest for each product of a shape, having printed it."""
  start = time.perf_counter()
  data, routing = jax.jit(
    lambda: (
      layer_products.arrays(shape),
      layer_products.routing_of(shape, "random"),
    )
  )()
  wanted = [case for case in cases(shape) if case.op in ops]
  problems = [
    Problem(
      shape.num_rows,
      shape.num_experts,
      *case.widths,
      "bfloat16",
      current_device(),
    )
    for case in wanted
  ]
  jobs = {
    (i, config): Job(
      functools.partial(case.call, config=config), abstract((data, routing))
    )
    for i, (case, problem) in enumerate(zip(wanted, problems, strict=True))
    for config in pruned(case.op, problem)
  }
  made = compile_together(jobs)
  print(f"{shape.name}: compiled after {time.perf_counter() - start:.1f} s")
  results = []
  for i, (case, problem) in enumerate(zip(wanted, problems, strict=True)):
    futures = {config: made[j, config] for j, config in made if j == i}
    rule = tuning.heuristic(case.op, problem)
    times = _times(case, futures, rule, (data, routing), sampling)
    best = winner(times, rule)
    results.append(Measured(case.op, problem, best, rule))
    print(
      f"{shape.name:>16} {case.op:<26} {case.widths[0]:>5} -> "
      f"{case.widths[1]:<5} rule {times[rule]:.4f} ms, best "
      f"{times[best]:.4f} ms ({times[rule] / times[best]:.3f}) {best}",
      flush=True,
    )
  return results


def _times(
  case: Case,
  futures: Mapping[TileConfig, Future],
  rule: TileConfig,
  arguments,
  sampling: Mapping[str, Any],
) -> dict[TileConfig, float]:
  """Returns the milliseconds of each config that compiles and is right."""
  right = futures[rule].result()(*arguments)
  calls = {}
  for config, future in futures.items():
    if future.exception() is not None:
      print(f"{case.op} {config}: {future.exception()!r:.120}", flush=True)
      continue
    run = future.result()
    difference = float(_difference(run(*arguments), right))
    if difference > _AGREEMENT:
      print(f"{case.op} {config}: off by {difference:.1e}", flush=True)
      continue
    calls[config] = functools.partial(run, *arguments)
  del right
  taken = timing.time_interleaved(calls, **sampling)
  return {config: took.ms_median for config, took in taken.items()}


@jax.jit
def _difference(got, right) -> jax.Array:
  """Returns the largest difference as a fraction of the largest value."""

  def one(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))

  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True)
  return jnp.max(jnp.stack([one(a, b) for a, b in pairs]))


def main(arguments: Sequence[str] | None = None) -> list[Measured]:
  """Measures, prints and, with --write, writes the table after each shape."""
  parser = command.parser(__doc__, shapes=("L", "S"))
  parser.add_argument(
    "--ops", nargs="+", choices=tuning.OPS, default=tuning.OPS
  )
  options = parser.parse_args(arguments)
  capability = current_device().capability
  if capability is None:
    raise SystemExit("tune: there is no GPU here, and so nothing to measure.")
  path = table_path(capability)
  results: list[Measured] = []
  for name in options.shapes:
    results += measure(
      command.SHAPES[name], options.ops, **command.sampling(options)
    )
    if options.write:
      write_table(path, table_of(tuning.table(capability), results))
  return results


if __name__ == "__main__":
  main()
