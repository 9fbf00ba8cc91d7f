"""The pictures of a run: its loss curves and the load of its experts."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

# Colours that stay apart for colour-blind eyes and in print.
_COLOURS = ("#d1495b", "#30638e", "#edae49", "#00798c")
_INK = "#333333"


def plot_losses(
  path: Path,
  curves: dict[str, dict[str, list]],
  baselines: dict[str, float],
  *,
  title: str,
) -> None:
  """Writes the loss curves of some models beside constant baselines.

  Args:
    path: of the PNG.
    curves: by the model's name: "steps" and "bits" of each batch,
      "validation_steps" and "validation_bits" on held-out text.
    baselines: bits per byte by name.
    title: says what is to be seen.
  """
  figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
  last_step = max(max(c["steps"], default=1) for c in curves.values())
  ends = []
  for colour, (name, curve) in zip(_COLOURS, curves.items(), strict=False):
    axes.plot(curve["steps"], curve["bits"], color=colour, lw=0.6, alpha=0.35)
    axes.plot(
      curve["validation_steps"],
      curve["validation_bits"],
      color=colour,
      lw=2,
      marker="o",
      markersize=3.5,
    )
    if curve["validation_bits"]:
      bits = curve["validation_bits"][-1]
      ends.append((bits, f"{name}: {bits:.3f}", colour))
  for name, bits in baselines.items():
    axes.axhline(bits, color=_INK, lw=0.9, ls=(0, (4, 3)))
    axes.annotate(
      f"{name}: {bits:.2f}",
      (last_step, bits),
      xytext=(0, 3),
      textcoords="offset points",
      ha="right",
      color=_INK,
      fontsize=9,
    )
  axes.set_ylim(0, max(*baselines.values(), 1) * 1.08)
  axes.set_xlim(0, last_step)
  _label_ends(axes, ends, last_step)
  axes.set_xlabel("training step")
  axes.set_ylabel("bits per byte (lower is better)")
  axes.set_title(title, loc="left", fontsize=11)
  axes.text(
    0.0,
    -0.17,
    "thick: held-out text · thin: training batches · dashed: models that see"
    " no context",
    transform=axes.transAxes,
    fontsize=8,
    color="#777777",
  )
  _finish(figure, axes, path)


def plot_expert_load(
  path: Path,
  load: np.ndarray,
  steps: list[int],
  history: np.ndarray,
  *,
  title: str,
) -> None:
  """Writes who carries the tokens: each layer's experts, and the busiest.

  Args:
    path: of the PNG.
    load: (layers, E), rows of each expert over the mean of its layer.
    steps: when the history was taken.
    history: (steps, layers), the largest load of each layer then.
    title: says what is to be seen.
  """
  layers, experts = load.shape
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.4 + 0.12 * layers), layout="constrained"
  )
  image = left.imshow(load, cmap="PuOr_r", vmin=0, vmax=2, aspect="auto")
  if experts <= 16:
    for (layer, expert), value in np.ndenumerate(load):
      left.text(
        expert,
        layer,
        f"{value:.2f}",
        ha="center",
        va="center",
        fontsize=8,
        color="white" if abs(value - 1) > 0.7 else _INK,
      )
  left.set_xlabel("expert")
  left.set_ylabel("layer")
  left.set_yticks(range(layers))
  if experts <= 32:
    left.set_xticks(range(experts))
  left.set_title("tokens of each expert, 1 = its fair share", fontsize=10)
  figure.colorbar(image, ax=left, extend="max")

  colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, layers))
  for layer in range(layers):
    right.plot(
      steps, history[:, layer], color=colours[layer], label=f"layer {layer}"
    )
  right.axhline(1, color=_INK, lw=0.9, ls=(0, (4, 3)))
  right.set_ylim(bottom=0.9)
  right.set_xlabel("training step")
  right.set_title(
    "the busiest expert of each layer, in fair shares", fontsize=10
  )
  if layers <= 12:
    right.legend(frameon=False, fontsize=8, ncols=2)
  figure.suptitle(title, x=0.01, ha="left", fontsize=11)
  _finish(figure, right, path)


def _label_ends(axes, ends, last_step):
  """Writes each curve's name at its end, apart where curves meet."""
  lowest = None
  for bits, text, colour in sorted(ends, reverse=True):
    y = bits if lowest is None else min(bits, lowest - 0.45)
    lowest = y
    axes.annotate(
      text,
      (last_step, bits),
      xytext=(last_step * 1.015, y),
      textcoords="data",
      va="center",
      color=colour,
      fontsize=9,
      fontweight="bold",
      annotation_clip=False,
    )


def _finish(figure, axes, path):
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)
  plt.close(figure)
