"""Tables from records: what was measured, and the command that measured it.

  python -m benchmarks.report [--readme]

Prints the tables of `docs/speed.md`; with --readme writes that page, the few of
them that stand between the README's speed markers, and the pictures, that of
`bench_mlp` only beside a peer. Every number is a record's. Benchmarks write
records; those whose note is `tables.COPIED` were copied from what a command had
printed, and the tables that they are in say so.
"""

import argparse
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from benchmarks import figures, tables, train_attention
from benchmarks.peers import PEERS
from benchmarks.shapes import GRANULARITY
from benchmarks.tables import Record
from benchmarks.timing import RESULTS

_ROOT = pathlib.Path(__file__).parent.parent
_IMAGES = pathlib.Path("docs/images")
_PICTURES = {
  "bench_mlp": "Speed and memory of the layer, beside its peers'",
  "bench_memory": "What chunks save of memory, and what they cost in time",
  "bench_granularity": "Speed where experts are many and narrow",
  "bench_sparsity": "Speed where a token meets more and more experts",
  "train_attention": "Loss of mixtures of attention and of dense attention",
}
_BEGIN, _END = "<!-- begin speed -->", "<!-- end speed -->"
_TITLE = """# How fast

Written by `python -m benchmarks.report --readme` from the records in
`benchmarks/results`, each with the command that made it; commands that differ
in their shapes alone are written as one. How many times faster one is than
another was read within one run; times beside it may be of another, on another
card of that name. Under a table stands the widest spread of its times: how far
apart the 20th and the 80th percentile of a time's samples are, as a part of
their median. Columns "of ..." are fractions of what they name, of its speed,
its bytes or its time; "times faster" are factors, which above 1 speak for this
library. What is empty was not measured, or not in the same run. Pictures say of
which card they are: of two, the one where more peers ran.
[kernels.md](kernels.md) says which records are of kernels that have changed
since, and how peers were run.

"Regrouping" is the mixture of attention built the usual way: rows copied into
expert order and back, in passes of their own or fused by XLA. "Held" is what
stays from the forward to the backward beside x, gates, weights and ids; chunks
are `num_chunks`, and "keep" names a `remat_policy`. The bytes bound is the time
of what must be moved once: of a router the tokens, twice, and their gradient;
of a layer's forward the weights of the experts that tokens met. Up, down, dx
and dw are the six products of a layer, forward and backward.
"""


def load(device: str, bench: str) -> list[Record]:
  """Returns the records of a benchmark on a device; none if it never ran.

  `bench_granularity` measures layers as `bench_mlp` does: until it ran, it has
  the records of those.
  """
  path = RESULTS / device / f"{bench}.json"
  if path.is_file():
    return json.loads(path.read_text())
  if bench == "bench_granularity":
    layers = load(device, "bench_mlp")
    return [r for r in layers if r["shape"] in GRANULARITY]
  return []


class Section(NamedTuple):
  """A table of a benchmark's records.

  Attributes:
    bench: the benchmark.
    table: makes the table.
    device: where the records were made.
    only: by field, the values of records that it is of.
    in_readme: whether the README shows it, or of which shapes.
  """

  bench: str
  table: Callable[[Sequence[Record]], str]
  device: str = "h200"
  only: Mapping[str, Sequence[str]] = MappingProxyType({})
  in_readme: Sequence[str] | bool = False

  def text(self, shapes: Sequence[str] | None = None) -> str:
    """Returns the table of these shapes, or all, and how it was made."""
    records = [
      r
      for r in load(self.device, self.bench)
      if shapes is None or r.get("shape") in shapes
      if r.get("routing", "random") == "random"
      if all(r[field] in values for field, values in self.only.items())
    ]
    made = self.table(records) if records else ""
    return f"{made}\n\n{_made_by(records)}" if made else ""


def _layers(direction: str) -> Section:
  table = functools.partial(tables.layers, direction=direction)
  return Section("bench_mlp", table, only={"direction": (direction,)})


_STEPS, _FORWARD = _layers("forward+backward"), _layers("forward")
_PRODUCTS = Section(
  "bench_ops", tables.ops, only={"implementation": ("mosaic",)}
)
_MEMORY = Section("bench_memory", tables.memory)
_TRAINING = Section("bench_train", tables.training)
SECTIONS = (
  _STEPS,
  _FORWARD,
  _STEPS._replace(device="h100", in_readme=("C1", "C2", "C3")),
  _FORWARD._replace(device="h100"),
  _PRODUCTS,
  _PRODUCTS._replace(device="h100"),
  Section("bench_attention", tables.attention, in_readme=("k8",)),
  Section("train_attention", tables.learning, device="cpu"),
  _MEMORY,
  _MEMORY._replace(device="h100"),
  Section(
    "bench_granularity",
    functools.partial(tables.by_k, title="narrower experts, the same work"),
  ),
  Section(
    "bench_sparsity",
    functools.partial(tables.by_k, title="more of 64 experts"),
  ),
  _TRAINING._replace(in_readme=True),
  _TRAINING._replace(device="h100"),
  Section("bench_router", tables.router),
  Section("bench_decode", tables.decoding),
  Section(
    "bench_ops",
    tables.triton,
    only={"implementation": ("triton", "scattermoe")},
  ),
  Section("bench_xla", tables.plain),
  Section("bench_cpu", tables.cpu, device="cpu"),
)


def speed_section(*, readme: bool = False) -> str:
  """Returns the tables that there are records for, each with its commands."""
  texts = []
  for section in SECTIONS:
    if not readme or section.in_readme is True:
      texts.append(section.text())
    elif section.in_readme:
      texts.append(section.text(section.in_readme))
  return "\n\n".join(filter(None, texts)) or "No record yet."


def pictures() -> str:
  """Returns the links to the pictures that there are."""
  return "".join(
    f"\n![{title}](images/{bench}.png)\n"
    for bench, title in _PICTURES.items()
    if (_ROOT / _IMAGES / f"{bench}.png").is_file()
  )


def _made_by(records: Sequence[Record]) -> str:
  # Commands that differ in their shapes alone are said once.
  shapes: dict[str, dict[str, None]] = {}
  for command in dict.fromkeys(r["command"] for r in records):
    found = re.search(r" --shapes((?: (?!-)\S+)+)", command)
    names = found[1].split() if found else ()
    rest = command.replace(found[0], " --shapes {}") if found else command
    shapes.setdefault(rest, {}).update(dict.fromkeys(names))
  commands = (rest.format(" ".join(names)) for rest, names in shapes.items())
  made = " and ".join(f"`{command}`" for command in commands)
  dates = sorted({r["date"] for r in records})
  when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
  text = f"{figures.made_on(records)}, {when}: {made}."
  if spread := tables.widest_spread(records):
    text += f" Spread of a time: at most {spread:.0%} of its median."
  if copied := sum(r.get("note") == tables.COPIED for r in records):
    text += f" Copied from what the command printed: {copied} of "
    text += f"{len(records)} records."
  return text


def write_readme(path: pathlib.Path = _ROOT / "README.md") -> None:
  """Writes the section between the README's markers."""
  text = path.read_text()
  before, rest = text.split(_BEGIN)
  _, after = rest.split(_END)
  section = speed_section(readme=True)
  path.write_text(f"{before}{_BEGIN}\n{section}\n{_END}{after}")


def pictured(bench: str) -> list[Record]:
  """Returns the records that a picture is of: the H200's, or of more peers.

  None of `bench_mlp` unless a peer is among them.
  """

  def num_peers(records: Sequence[Record]) -> int:
    return sum(r["implementation"] in PEERS for r in records)

  records = max((load(card, bench) for card in ("h200", "h100")), key=num_peers)
  return records if bench != "bench_mlp" or num_peers(records) else []


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the tables, or writes them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--readme", action="store_true")
  if parser.parse_args(arguments).readme:
    figures.draw_all(pictured, _ROOT / _IMAGES)
    if runs := load("cpu", "train_attention"):
      train_attention.draw(runs)
    page = f"{_TITLE}\n{speed_section()}\n{pictures()}"
    (_ROOT / "docs" / "speed.md").write_text(page)
    write_readme()
  else:
    print(speed_section())


if __name__ == "__main__":
  main()
