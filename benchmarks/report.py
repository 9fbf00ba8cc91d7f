"""Tables from records: what was measured, and the command that measured it.

  python -m benchmarks.report [--readme]

Prints the tables of `docs/speed.md`; with --readme writes that page, the few of
them that stand between the README's speed markers, and the pictures, that of
`bench_mlp` only beside a peer. No number is typed by hand.
"""

import argparse
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks import figures
from benchmarks.peers import PEERS
from benchmarks.shapes import GRANULARITY, SHAPES, Shape, in_order
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
`benchmarks/results`, each with the command that made it. How many times faster
one is than another was read within one run; times beside it may be of another.
"""
# Of the columns of times.
_IN_TURN = ("scattermoe_jax", "dense", *PEERS)
Record = dict[str, Any]


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


def ops_table(records: Sequence[Record]) -> str:
  """Returns the products of each shape as fractions of a dense product."""
  records = [r for r in records if r["routing"] == "random"]
  ops = list(dict.fromkeys(r["op"] for r in records))
  cells = {(r["shape"], r["op"]): f"{r['of_dense']:.2f}" for r in records}
  shapes = in_order(r["shape"] for r in records)
  rows = [
    [_described(shape), *(cells.get((shape, op), "") for op in ops)]
    for shape in shapes
  ]
  return _table(["of a dense `jnp.dot`", *ops], rows)


def triton_table(records: Sequence[Record]) -> str:
  """Returns the Triton backend's products beside ScatterMoE's own kernels."""
  records = [r for r in records if r["routing"] == "random"]
  theirs = {
    (r["shape"], r["op"]): r["ms_median"]
    for r in records
    if r["implementation"] == "scattermoe"
  }
  rows = []
  for r in records:
    if r["implementation"] == "triton":
      peer = theirs.get((r["shape"], r["op"]))
      faster = f"{peer / r['ms_median']:.2f}" if peer else ""
      cells = [f"{r['ms_median']:.2f} ms", f"{r['of_dense']:.2f}", faster]
      rows.append([f"{r['op']}, {_described(r['shape'])}", *cells])
  header = ["the Triton backend", "time", "of a dense `jnp.dot`"]
  return _table([*header, "times faster than scattermoe"], rows)


def layers_table(
  records: Sequence[Record], direction: str = "forward+backward"
) -> str:
  """Returns a step of each layer, beside dense products and peers."""
  steps = {
    (r["shape"], r["implementation"]): r
    for r in records
    if r["direction"] == direction and r["routing"] == "random"
  }
  there = dict.fromkeys(name for _, name in steps)
  others = [name for name in PEERS if name in there]
  rows = []
  for shape in in_order(shape for shape, _ in steps):
    if (shape, "scattermoe_jax") not in steps:
      continue
    mine = steps[shape, "scattermoe_jax"]
    row = [_described(shape), f"{mine['ms_median']:.2f} ms"]
    row.append(f"{mine['of_dense']:.2f}" if "of_dense" in mine else "")
    for name in others:
      theirs = steps.get((shape, name), {})
      faster = theirs.get("times_ours")
      row.append(f"{faster:.2f}" if faster else "")
    for name in ("scattermoe_jax", *others):
      step = steps.get((shape, name))
      row.append(f"{step['peak_mib']:.0f} MiB" if step else "")
    rows.append(row)
  header = [direction.replace("+", " and "), "time", "of dense products"]
  header += [f"times faster than {name}" for name in others]
  header += ["peak", *(f"peak of {name}" for name in others)]
  return _table(header, rows)


def by_k_table(records: Sequence[Record], title: str) -> str:
  """Returns the times of layers that differ in k, by implementation."""
  records = [r for r in records if r["routing"] == "random"]
  cells = {
    (r["shape"], r["direction"], r["implementation"]): f"{r['ms_median']:.2f}"
    for r in records
  }
  there = {(direction, name) for _, direction, name in cells}
  columns = [
    (direction, name)
    for direction in ("forward", "forward+backward")
    for name in _IN_TURN
    if (direction, name) in there
  ]
  shapes = {r["shape"] for r in records}
  rows = [
    [_described(shape), *(cells.get((shape, *c), "") for c in columns)]
    for shape in sorted(shapes, key=lambda shape: SHAPES[shape].top_k)
  ]
  header = [f"{direction}, {name}" for direction, name in columns]
  return _table([f"{title}, ms", *header], rows)


def attention_table(records: Sequence[Record]) -> str:
  """Returns how much faster a mixture of attention is than its rivals."""
  rows = [
    [
      f"k={r['top_k']}, {r['direction']}",
      f"{r['ms_median']:.2f} ms",
      f"{r['speed_over_dense']:.2f}",
      f"{r['speed_over_regroup']:.2f}",
      f"{fused:.2f}" if (fused := r.get("speed_over_regroup_fused")) else "",
    ]
    for r in records
    if r["implementation"] == "moa"
  ]
  header = ["mixture of attention, 32 active heads", "time"]
  header += ["times faster than dense heads", "than regrouping"]
  header += ["than regrouping by a fused gather"]
  return _table(header, rows)


def learning_line(records: Sequence[Record]) -> str:
  """Returns what language models learn that differ in their attention."""
  learnt = "; ".join(
    f"{r['label']} {r['validation_bits']:.3f}" for r in records
  )
  return (
    "Bits per byte of the demo's held-out text, by attention of equally many "
    f"active parameters: {learnt}."
  )


def memory_table(records: Sequence[Record]) -> str:
  """Returns what each way to save memory costs in time."""
  rows = [
    [
      _described(shape),
      figures.variant_label(r["implementation"]),
      f"{r['held_mib']:.0f} MiB",
      f"{r['peak_mib']:.0f} MiB",
      f"{r['ms_median']:.2f} ms",
      f"{r['of_peak']:.2f}",
      f"{r['of_time']:.2f}",
    ]
    for shape in in_order(r["shape"] for r in records)
    for r in records
    if r["shape"] == shape
  ]
  header = ["forward and backward", "variant", "held", "peak", "time"]
  return _table([*header, "of the peak", "of the time"], rows)


def train_table(records: Sequence[Record]) -> str:
  """Returns a language model's training step, by what its layers are."""
  dense = {
    r["model"]: r["tokens_per_s"] for r in records if r["variant"] == "dense"
  }
  rows = []
  for r in records:
    of_dense = r["tokens_per_s"] / dense.get(r["model"], float("inf"))
    rows.append(
      [
        f"{_trained(r['variant'])}, {r['model']}",
        f"{r['params'] / 1e9:.2f} B",
        f"{r['ms_median']:.0f} ms",
        f"{r['tokens_per_s']:.0f}",
        f"{of_dense:.2f}" if of_dense else "",
        f"{r['mfu']:.2f}",
        f"{r['peak_mib'] / 1024:.1f} GiB",
      ]
    )
  header = ["training a model", "parameters", "step", "tokens/s"]
  header += ["of the dense model's", "model FLOPs of the dense rate", "peak"]
  return _table(header, rows)


def _trained(variant: str) -> str:
  return "a dense MLP" if variant == "dense" else f"a mixture by {variant}"


def decode_table(records: Sequence[Record]) -> str:
  """Returns small batches as fractions of reading the touched weights once."""
  rows = [
    [_decoded(r), f"{r['ms_median']:.3f} ms", f"{r['of_bytes_bound']:.2f}"]
    for r in records
  ]
  return _table(["forward of a layer", "time", "of the bytes bound"], rows)


def cpu_table(records: Sequence[Record]) -> str:
  """Returns the plain backend beside `jax.lax.ragged_dot`."""
  rows = [
    [
      f"{r['direction']}, {r['groups']} groups",
      f"{r['times_faster']:.1f}",
      f"1/{1 / r['temp_ratio']:.0f}",
    ]
    for r in records
  ]
  return _table(
    ["a CPU, against `ragged_dot`", "times faster", "of its memory"], rows
  )


def router_table(records: Sequence[Record]) -> str:
  """Returns what a router takes, and what it would with float32 products."""
  rows = [
    [
      _described(r["shape"]),
      f"{r['ms_median']:.2f} ms",
      f"{r['of_bytes_bound']:.2f}",
      f"{r['times_faster']:.1f}",
    ]
    for r in records
    if r["implementation"] == "split"
  ]
  header = ["a router, forward and backward", "time", "of the bytes bound"]
  return _table([*header, "times faster than in float32"], rows)


def xla_table(records: Sequence[Record]) -> str:
  """Returns the plain backend on a GPU beside `jax.lax.ragged_dot`."""
  rows = [
    [
      f"{r['direction']}, {_sizes(Shape(*(r[f] for f in Shape._fields)))}",
      f"{r['ours_ms']['ms_median']:.2f} ms",
      f"{r['times_faster']:.1f}",
      f"1/{r['ragged_dot_temp_bytes'] / r['ours_temp_bytes']:.0f}",
    ]
    for r in records
  ]
  header = ["the plain backend on a GPU, against `ragged_dot`", "time"]
  return _table([*header, "times faster", "of its memory"], rows)


def _described(name: str) -> str:
  return f"{name}: {_sizes(SHAPES[name])}"


def _sizes(s: Shape) -> str:
  sizes = f"T={s.num_tokens} d={s.d_model} n={s.d_expert}"
  return f"{sizes} E={s.num_experts} k={s.top_k}"


def _decoded(r: Record) -> str:
  fields = ("num_tokens", "d", "n", "num_experts", "top_k")
  return _sizes(Shape("decode", *(r[field] for field in fields)))


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
      if all(r[field] in values for field, values in self.only.items())
    ]
    made = self.table(records) if records else ""
    return f"{made}\n\n{_made_by(records)}" if made else ""


SECTIONS = (
  Section(
    "bench_mlp",
    layers_table,
    only={"direction": ("forward+backward",)},
    in_readme=("C1", "C2", "C3"),
  ),
  Section(
    "bench_mlp",
    functools.partial(layers_table, direction="forward"),
    only={"direction": ("forward",)},
  ),
  Section(
    "bench_ops",
    ops_table,
    only={"implementation": ("mosaic",)},
  ),
  Section("bench_attention", attention_table, in_readme=("k8",)),
  Section("train_attention", learning_line, device="cpu"),
  Section("bench_memory", memory_table),
  Section(
    "bench_granularity",
    functools.partial(by_k_table, title="narrower experts, the same work"),
  ),
  Section(
    "bench_sparsity",
    functools.partial(by_k_table, title="more of 64 experts"),
  ),
  Section("bench_train", train_table, in_readme=True),
  Section("bench_router", router_table),
  Section("bench_decode", decode_table),
  Section(
    "bench_ops",
    triton_table,
    only={"implementation": ("triton", "scattermoe")},
  ),
  Section("bench_xla", xla_table),
  Section("bench_cpu", cpu_table, device="cpu"),
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
  first = records[0]
  # Commands that differ in their shapes alone are said once.
  shapes: dict[str, dict[str, None]] = {}
  for command in dict.fromkeys(r["command"] for r in records):
    found = re.search(r" --shapes((?: (?!-)\S+)+)", command)
    names = found[1].split() if found else ()
    rest = command.replace(found[0], " --shapes {}") if found else command
    shapes.setdefault(rest, {}).update(dict.fromkeys(names))
  commands = (rest.format(" ".join(names)) for rest, names in shapes.items())
  made = " and ".join(f"`{command}`" for command in commands)
  return f"{first['device']}, JAX {first['jax']}, {first['date']}: {made}."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown; nothing if it has no rows."""
  if not rows:
    return ""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_readme(path: pathlib.Path = _ROOT / "README.md") -> None:
  """Writes the section between the README's markers."""
  text = path.read_text()
  before, rest = text.split(_BEGIN)
  _, after = rest.split(_END)
  section = speed_section(readme=True)
  path.write_text(f"{before}{_BEGIN}\n{section}\n{_END}{after}")


def pictured(bench: str) -> list[Record]:
  """Returns the records that a picture is of.

  None of `bench_mlp` unless a peer is among them.
  """
  records = load("h200", bench)
  there = {r["implementation"] for r in records}
  return records if bench != "bench_mlp" or there & {*PEERS} else []


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the tables, or writes them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--readme", action="store_true")
  if parser.parse_args(arguments).readme:
    figures.draw_all(pictured, _ROOT / _IMAGES)
    page = f"{_TITLE}\n{speed_section()}\n{pictures()}"
    (_ROOT / "docs" / "speed.md").write_text(page)
    write_readme()
  else:
    print(speed_section())


if __name__ == "__main__":
  main()
