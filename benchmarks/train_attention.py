"""Does a mixture of attention learn better than dense attention?

Language models that differ in their attention alone, with equally many active
parameters in it, on the demo's data. The runs first, each a few minutes:

  size="--no-twin --set num_layers=4 --steps 500 --warmup-steps 50"
  python -m scattermoe_jax.models.train --out runs/mha $size
  python -m scattermoe_jax.models.train --out runs/moa $size --attention moa
  python -m scattermoe_jax.models.train --out runs/gqa $size \
    --set num_heads=6 --set num_kv_heads=2
  python -m benchmarks.train_attention runs/mha runs/moa runs/gqa

One seed each, and differences of 0.01 mean nothing: two versions of this
library that hardly differ but in the order of sums ended 0.012 apart (moa,
2.127 and 2.115). At one version, 2.115 became 2.104 when the output projections
began with k / fan-in as variance instead of 1 / fan-in.

Writes benchmarks/results/cpu/train_attention.json and
docs/images/train_attention.png, the picture from the record. A folder's name
says which of the runs it is.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Sequence

from benchmarks import timing
from benchmarks.figures import made_on

ROOT = pathlib.Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/cpu/train_attention.json"
PICTURE = ROOT / "docs/images/train_attention.png"
SIZE = "--no-twin --set num_layers=4 --steps 500 --warmup-steps 50"
FLAGS = {
  "mha": SIZE,
  "moa": f"{SIZE} --attention moa",
  "gqa": f"{SIZE} --set num_heads=6 --set num_kv_heads=2",
}
LABELS = {
  "mha": "dense, 4 heads (mha)",
  "moa": "mixture, 3 of 12 experts of 2 heads (moa)",
  "gqa": "dense, 6 heads sharing 2 of keys (gqa)",
}


def read_run(folder: pathlib.Path) -> dict:
  """Returns the record of one run."""
  config = json.loads((folder / "config.json").read_text())
  summary = json.loads((folder / "summary.json").read_text())
  model = next(m for m in summary["models"] if m["model"] == "moe")
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  looks = [
    m
    for m in map(json.loads, lines)
    if m["model"] == "moe" and "validation_bits" in m
  ]
  name = folder.name
  return {
    "attention": name,
    "label": LABELS[name],
    "command": f"python -m scattermoe_jax.models.train {FLAGS[name]}",
    "active_params": model["active_params"],
    "params": model["params"],
    "validation_bits": model["validation_bits"],
    "validation_steps": [m["step"] for m in looks],
    "validation_curve": [m["validation_bits"] for m in looks],
    "seed": config["settings"]["training"]["seed"],
  }


def draw(records: list[dict]) -> None:
  """Writes the picture of the runs."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
  for run, colour in zip(
    records, ("#30638e", "#d1495b", "#00798c"), strict=False
  ):
    axes.plot(
      run["validation_steps"],
      run["validation_curve"],
      color=colour,
      lw=2,
      marker="o",
      markersize=3.5,
      label=f"{run['label']}: {run['validation_bits']:.3f}",
    )
  axes.set_ylim(top=3)
  axes.set_xlabel("training step")
  axes.set_ylabel("bits per byte of held-out text")
  axes.set_title(
    "Attention of equally many active parameters, in one language model\n"
    + made_on(records),
    loc="left",
    fontsize=11,
  )
  axes.legend(frameon=False)
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(PICTURE, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
  """Writes the record and its picture."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "folders", nargs="+", type=pathlib.Path, help="runs, named as above"
  )
  folders = parser.parse_args(arguments).folders
  if unknown := sorted({folder.name for folder in folders} - FLAGS.keys()):
    parser.error(f"folders are called {', '.join(FLAGS)}; got {unknown}")
  here = timing.environment()
  made = {
    "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
    **{name: importlib.metadata.version(name) for name in ("jax", "flax")},
    **{name: here[name] for name in ("commit", "date")},
  }
  records = [read_run(folder) | made for folder in folders]
  RECORD.parent.mkdir(parents=True, exist_ok=True)
  PICTURE.parent.mkdir(parents=True, exist_ok=True)
  RECORD.write_text(json.dumps(records, indent=2) + "\n")
  draw(records)
  for run in records:
    print(
      f"{run['attention']:4} {run['active_params']:,} active parameters, "
      f"{run['params']:,} in all: {run['validation_bits']:.3f} bits per byte"
    )


if __name__ == "__main__":
  main()
