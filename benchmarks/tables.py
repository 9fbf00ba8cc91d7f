"""The tables of the report: each a function of a benchmark's records."""

from collections.abc import Sequence
from typing import Any

from benchmarks import figures
from benchmarks.peers import PEERS
from benchmarks.shapes import SHAPES, Shape, in_order

Record = dict[str, Any]
# The note of a record that no benchmark wrote: rounded as it was printed.
COPIED = "figures as printed by the command"
# Of the columns of times.
_IN_TURN = ("scattermoe_jax", "dense", *PEERS)


def ops(records: Sequence[Record]) -> str:
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


def triton(records: Sequence[Record]) -> str:
  """Returns the Triton backend's products beside ScatterMoE's own kernels.

  Compared with those of the same run alone.
  """
  records = [r for r in records if r["routing"] == "random"]
  product_of = lambda r: (r["shape"], r["op"], r["command"])
  theirs = {
    product_of(r): r["ms_median"]
    for r in records
    if r["implementation"] == "scattermoe"
  }
  rows = []
  for r in records:
    if r["implementation"] == "triton":
      peer = theirs.get(product_of(r))
      faster = f"{peer / r['ms_median']:.2f}" if peer else ""
      cells = [f"{r['ms_median']:.2f} ms", f"{r['of_dense']:.2f}", faster]
      rows.append([f"{r['op']}, {_described(r['shape'])}", *cells])
  header = ["the Triton backend", "time", "of a dense `jnp.dot`"]
  return _table([*header, "times faster than scattermoe"], rows)


def layers(
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


def by_k(records: Sequence[Record], title: str) -> str:
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


def attention(records: Sequence[Record]) -> str:
  """Returns how much faster a mixture of attention is than its rivals."""
  rivals = ("dense", "regroup", "regroup_fused")
  rows = [
    [
      f"k={r['top_k']}, {r['direction']}",
      f"{r['ms_median']:.2f} ms",
      *(
        f"{faster:.2f}" if (faster := r.get(f"speed_over_{rival}")) else ""
        for rival in rivals
      ),
    ]
    for r in records
    if r["implementation"] == "moa"
  ]
  header = [
    "mixture of attention, 32 active heads",
    "time",
    "times faster than dense heads (k times the keys)",
    "than regrouping",
    "than regrouping by a fused gather",
  ]
  return _table(header, rows)


def learning(records: Sequence[Record]) -> str:
  """Returns what language models learn that differ in their attention."""
  learnt = "; ".join(
    f"{r['label']} {r['validation_bits']:.3f}" for r in records
  )
  return (
    "Bits per byte of the demo's held-out text, by attention of equally many "
    f"active parameters: {learnt}."
  )


def memory(records: Sequence[Record]) -> str:
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


def training(records: Sequence[Record]) -> str:
  """Returns a language model's training step, by what its layers are.

  Compared with the dense model of the same run alone.
  """
  run_of = lambda r: (r["model"], r["command"])
  dense = {
    run_of(r): r["tokens_per_s"] for r in records if r["variant"] == "dense"
  }
  rows = []
  for r in records:
    of_dense = r["tokens_per_s"] / dense.get(run_of(r), float("inf"))
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


def decoding(records: Sequence[Record]) -> str:
  """Returns small batches as fractions of reading the touched weights once."""
  rows = [
    [_decoded(r), f"{r['ms_median']:.3f} ms", f"{r['of_bytes_bound']:.2f}"]
    for r in records
  ]
  return _table(["forward of a layer", "time", "of the bytes bound"], rows)


def cpu(records: Sequence[Record]) -> str:
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


def router(records: Sequence[Record]) -> str:
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


def plain(records: Sequence[Record]) -> str:
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


def widest_spread(records: Sequence[Record]) -> float:
  """Returns the most that 60 % of a time's samples span, over its median.

  0 where no record has a time.
  """
  times = [
    time
    for r in records
    for time in (r, *(v for v in r.values() if isinstance(v, dict)))
    if "ms_p20" in time
  ]
  spreads = [(t["ms_p80"] - t["ms_p20"]) / t["ms_median"] for t in times]
  return max(spreads, default=0.0)


def _described(name: str) -> str:
  return f"{name}: {_sizes(SHAPES[name])}"


def _sizes(s: Shape) -> str:
  sizes = f"T={s.num_tokens} d={s.d_model} n={s.d_expert}"
  return f"{sizes} E={s.num_experts} k={s.top_k}"


def _decoded(r: Record) -> str:
  fields = ("num_tokens", "d", "n", "num_experts", "top_k")
  return _sizes(Shape("decode", *(r[field] for field in fields)))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown; nothing if it has no rows."""
  if not rows:
    return ""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
