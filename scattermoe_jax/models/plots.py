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
  figure, (whole, end) = plt.subplots(
    1, 2, figsize=(10, 4.4), width_ratios=(3, 2), layout="constrained"
  )
  last_step = max(max(c["steps"], default=1) for c in curves.values())
  for colour, (name, curve) in zip(_COLOURS, curves.items(), strict=False):
    whole.plot(curve["steps"], curve["bits"], color=colour, lw=0.6, alpha=0.35)
    for axes in (whole, end):
      axes.plot(
        curve["validation_steps"],
        curve["validation_bits"],
        color=colour,
        lw=2,
        marker="o",
        markersize=3.5,
        label=f"{name}: {curve['validation_bits'][-1]:.3f}",
      )
  for name, bits in baselines.items():
    whole.axhline(bits, color=_INK, lw=0.9, ls=(0, (4, 3)))
    whole.annotate(
      f"{name}: {bits:.2f}",
      (last_step, bits),
      xytext=(0, 3),
      textcoords="offset points",
      ha="right",
      color=_INK,
      fontsize=9,
    )
  whole.set_ylim(0, max(*baselines.values(), 1) * 1.08)
  whole.set_xlim(0, last_step)
  whole.set_ylabel("bits per byte (lower is better)")
  whole.set_xlabel(
    "training step\nthick: held-out text · thin: training batches · "
    "dashed: to compare with"
  )
  # The second half, where the models differ.
  late = [
    bits
    for curve in curves.values()
    for step, bits in zip(
      curve["validation_steps"], curve["validation_bits"], strict=True
    )
    if step >= last_step / 2
  ]
  margin = 0.1 * (max(late) - min(late)) + 0.01
  end.set_xlim(last_step / 2, last_step * 1.02)
  end.set_ylim(min(late) - margin, max(late) + margin)
  end.set_xlabel("training step")
  end.set_title("the second half, held-out text", fontsize=10)
  end.legend(frameon=False)
  end.spines[["top", "right"]].set_visible(False)
  figure.suptitle(title, x=0.01, ha="left", fontsize=11)
  _finish(figure, whole, path)


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
        f"{value:.1f}",
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


def _finish(figure, axes, path):
  axes.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)
  plt.close(figure)
