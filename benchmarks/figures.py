"""Pictures of records: every implementation that was measured is in them."""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.shapes import SHAPES, in_order

Record = dict[str, Any]

# A colour for each implementation, the same in every picture.
COLOURS = {
  "scattermoe_jax": "#30638e",
  "scattermoe_jax_chunked": "#7fb3d5",
  "sonicmoe": "#d1495b",
  "scattermoe": "#edae49",
  "tokamax": "#00798c",
  "composed": "#8d6a9f",
}
LABELS = {
  "scattermoe_jax": "scattermoe_jax",
  "scattermoe_jax_chunked": "the same in chunks",
  "sonicmoe": "SonicMoE (torch)",
  "scattermoe": "ScatterMoE (torch)",
  "tokamax": "tokamax + Pallas dW (JAX)",
  "composed": "jax.lax.ragged_dot",
  "dense": "dense matmuls alone",
}
_LOWER = 0.95  # of a peak: less is no saving worth a picture
_DIRECTIONS = ("forward", "forward+backward")


def draw_all(
  load: Callable[[str], Sequence[Record]], folder: pathlib.Path
) -> list[pathlib.Path]:
  """Returns the pictures drawn; none of a benchmark that never ran.

  Args:
    load: returns the records of a benchmark by its name.
    folder: where the PNGs go.
  """
  drawn = []
  for bench, draw in (
    ("bench_mlp", draw_layers),
    ("bench_memory", draw_memory),
    ("bench_granularity", draw_granularity),
    ("bench_sparsity", draw_sparsity),
  ):
    records = load(bench)
    if records:
      folder.mkdir(parents=True, exist_ok=True)
      drawn.append(folder / f"{bench}.png")
      draw(records, drawn[-1])
  return drawn


def made_on(records: Sequence[Record]) -> str:
  """Returns on what devices, and by what JAX, records were made."""
  return " and ".join(
    dict.fromkeys(f"{r['device']}, JAX {r['jax']}" for r in records)
  )


def draw_layers(records: Sequence[Record], path: pathlib.Path) -> None:
  """Draws speed, forward and training, and the peak of memory, by shape."""
  shapes = in_order(r["shape"] for r in records)
  figure, panels = _figure(3, height=2.6)
  for panel, (direction, field, title) in zip(
    panels,
    (
      ("forward", "tflops", "forward, TFLOP/s"),
      ("forward+backward", "tflops", "forward and backward, TFLOP/s"),
      ("forward+backward", "peak_mib", "peak of a step, MiB"),
    ),
    strict=True,
  ):
    mine = [r for r in records if r["direction"] == direction]
    _bars(panel, mine, shapes, field)
    panel.set_title(title, loc="left", fontsize=10)
  _legend(figure)
  _save(figure, path, records)


def draw_memory(records: Sequence[Record], path: pathlib.Path) -> None:
  """Draws the time of a step against its peak, for chunks.

  Of shapes whose peak they lower. What `jax.checkpoint` keeps changes no peak
  of a single layer; the table has both.
  """
  by_shape: dict[str, list[Record]] = {}
  for r in records:
    if r["implementation"].startswith("chunks_"):
      by_shape.setdefault(r["shape"], []).append(r)
  peaks = {
    shape: [r["peak_mib"] for r in mine] for shape, mine in by_shape.items()
  }
  shapes = [s for s, of in peaks.items() if min(of) < _LOWER * max(of)]
  figure, panels = _figure(1, columns=max(len(shapes), 1), height=3.0)
  for panel, shape in zip(panels, shapes, strict=False):
    mine = by_shape[shape]
    for r in mine:
      panel.plot(r["peak_mib"], r["of_time"], "o", color="#30638e")
      panel.annotate(
        variant_label(r["implementation"]),
        (r["peak_mib"], r["of_time"]),
        xytext=(6, 6),
        textcoords="offset points",
        fontsize=8,
      )
    panel.set_title(shape, loc="left", fontsize=10)
    panel.set_xlabel("peak of a step, MiB")
    panel.set_xlim(0, 1.5 * max(peaks[shape]))
    panel.set_ylim(0.98, 1.06)
  panels[0].set_ylabel("time, of the layer as it is")
  _save(figure, path, records)


def variant_label(name: str) -> str:
  """Returns what a variant of `bench_memory` is called.

  Example:
    >>> variant_label("keep_h_chunks_3")
    'keep h, 3 chunks'
  """
  if name == "chunks_1":
    return "as it is"
  counted = re.sub(r"chunks_(\d+)", r"\1 chunks", name)
  return counted.replace("keep_", "keep ").replace("_", ", ")


def draw_granularity(records: Sequence[Record], path: pathlib.Path) -> None:
  """Draws speed by k, of equal work in ever more and narrower experts."""
  _draw_by_k(records, path, "k, of 8·k experts; active width 8192")


def draw_sparsity(records: Sequence[Record], path: pathlib.Path) -> None:
  """Draws speed by k, of 64 experts."""
  _draw_by_k(records, path, "k, of 64 experts of width 1024")


def _draw_by_k(records, path, label: str) -> None:
  figure, panels = _figure(1, columns=2, height=3.4)
  for panel, direction in zip(panels, _DIRECTIONS, strict=True):
    mine = [r for r in records if r["direction"] == direction]
    for name in _implementations(mine) + ["dense"]:
      points = sorted(
        (_top_k(r["shape"]), r["tflops"])
        for r in mine
        if r["implementation"] == name
      )
      if points:
        dashes = "--" if name == "dense" else "-"
        panel.plot(
          *zip(*points, strict=True),
          dashes,
          color=COLOURS.get(name, "#888888"),
          marker="o",
          label=LABELS.get(name, name),
        )
    panel.set_title(f"{direction}, TFLOP/s", loc="left", fontsize=10)
    panel.set_xlabel(label)
    panel.set_xscale("log", base=2)
    ticks = sorted({_top_k(r["shape"]) for r in mine})
    panel.set_xticks(ticks, [str(k) for k in ticks])
    panel.margins(y=0.1)
    panel.set_ylim(bottom=0)
  _legend(figure)
  _save(figure, path, records)


def _bars(panel, records, shapes: Sequence[str], field: str) -> None:
  names = [
    name
    for name in _implementations(records)
    if any(r["implementation"] == name and r.get(field) for r in records)
  ]
  width = 0.8 / max(1, len(names))
  for i, name in enumerate(names):
    of = {r["shape"]: r[field] for r in records if r["implementation"] == name}
    there = [j for j, shape in enumerate(shapes) if of.get(shape)]
    panel.bar(
      [j + (i - (len(names) - 1) / 2) * width for j in there],
      [of[shapes[j]] for j in there],
      width,
      color=COLOURS.get(name, "#888888"),
      label=LABELS.get(name, name),
    )
  dense = {
    r["shape"]: r[field]
    for r in records
    if r["implementation"] == "dense" and r.get(field)
  }
  for j, shape in enumerate(shapes):
    if shape in dense:
      label = LABELS["dense"] if shape == next(iter(dense)) else None
      panel.hlines(dense[shape], j - 0.45, j + 0.45, "#444444", label=label)
  panel.set_xticks(range(len(shapes)), shapes)


def _implementations(records: Sequence[Record]) -> list[str]:
  """Returns all but the bound, those with a colour first."""
  found = dict.fromkeys(r["implementation"] for r in records)
  found.pop("dense", None)
  return sorted(
    found, key=lambda name: (name not in COLOURS, [*COLOURS, name].index(name))
  )


def _top_k(shape: str) -> int:
  return SHAPES[shape].top_k


def _figure(rows: int, *, columns: int = 1, height: float):
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, panels = plt.subplots(
    rows,
    columns,
    figsize=(9, height * rows),
    layout="constrained",
    squeeze=False,
  )
  return figure, list(panels.flat)


def _legend(figure) -> None:
  """Says below all panels what the marks in any of them mean."""
  found = {}
  for panel in figure.axes:
    for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  figure.legend(
    found.values(),
    found,
    loc="outside lower center",
    ncols=5,
    frameon=False,
    fontsize=8,
  )


def _save(figure, path: pathlib.Path, records: Sequence[Record]) -> None:
  """Writes a picture that says where its records were made."""
  import matplotlib.pyplot as plt

  figure.suptitle(made_on(records), x=0.99, ha="right", fontsize=8)
  for panel in figure.axes:
    panel.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=130)
  plt.close(figure)
