"""What a run says at its end: a table, pictures, a sample, files of them."""

import functools
import json
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from scattermoe_jax.models import plots
from scattermoe_jax.models.sampling import sample
from scattermoe_jax.models.setup import Run
from scattermoe_jax.models.training import (
  TrainState,
  count_active_params,
  count_params,
)
from scattermoe_jax.models.transformer import Transformer
from scattermoe_jax.models.weights import variables_of


def report(run: Run, states: dict[str, TrainState], console: Console) -> None:
  """Prints what the models have learned, and writes it to the run's folder.

  Args:
    run: the run.
    states: the last of each model, by name, the mixture first.
    console: where to print.
  """
  models = {
    name: Transformer(model_config, run.placement.axes)
    for name, model_config in run.config.models().items()
  }
  rows = [_summarise(run, n, models[n], state) for n, state in states.items()]
  baselines = dict(run.baselines)
  for row in rows:
    if "bits_before" in row:
      baselines["as loaded"] = row["bits_before"]
  _draw(run, rows, baselines)
  (run.folder.path / "summary.json").write_text(
    json.dumps({"baselines": baselines, "models": rows}, indent=2) + "\n"
  )
  console.print(_table(rows, baselines))
  name = next(iter(models))
  text = _sample(run, models[name], states[name])
  (run.folder.path / "sample.txt").write_text(text)
  console.rule(f"a sample of {name}")
  console.print(text, markup=False, soft_wrap=True)
  console.rule()
  pictures = ", ".join(str(p) for p in sorted(run.folder.path.glob("*.png")))
  console.print(f"pictures: {pictures}", soft_wrap=True)


def _summarise(
  run: Run, name: str, model: Transformer, state: TrainState
) -> dict[str, Any]:
  lines = run.folder.metrics(name)
  params = variables_of(state)["params"]
  row = {
    "model": name,
    "params": count_params(params),
    "active_params": count_active_params(params, model),
    "trained_params": count_params(state.params),
    "validation_bits": _last(lines, "validation_bits"),
    "tokens": run.config.training.steps
    * run.config.training.batch_size
    * run.config.training.sequence_length,
    # The first step compiles.
    "tokens_per_second": int(
      np.median([m["tokens_per_second"] for m in lines if "bits" in m])
    ),
  }
  if run.config.init_from is not None:
    row["bits_before"] = _last(lines, "bits_before")
  return row


def _last(lines: list[dict[str, Any]], key: str) -> Any:
  return next(m[key] for m in reversed(lines) if key in m)


def _table(rows: list[dict], baselines: dict[str, float]) -> Table:
  table = Table(title="held-out text")
  table.add_column("model")
  for column in ("active params", "all params", "tokens/s", "bits per byte"):
    table.add_column(column, justify="right")
  for name, bits in baselines.items():
    table.add_row(name, "", "", "", f"{bits:.3f}")
  for row in reversed(rows):
    table.add_row(
      row["model"],
      f"{row['active_params']:,}",
      f"{row['params']:,}",
      f"{row['tokens_per_second']:,}",
      f"{row['validation_bits']:.3f}",
    )
  return table


def _draw(run: Run, rows: list[dict], baselines: dict[str, float]) -> None:
  """Writes loss.png, and experts.png of what is routed."""
  curves = {}
  for row in rows:
    lines = run.folder.metrics(row["model"])
    batches = [m for m in lines if "bits" in m]
    looks = [m for m in lines if "validation_bits" in m]
    curves[row["model"]] = {
      "steps": [m["step"] for m in batches],
      "bits": [m["bits"] for m in batches],
      "validation_steps": [m["step"] for m in looks],
      "validation_bits": [m["validation_bits"] for m in looks],
    }
    for kind in looks[-1]["load"]:
      loads = np.array([m["load"][kind] for m in looks])
      plots.plot_expert_load(
        run.folder.path / ("experts.png" if kind == "ffn" else f"{kind}.png"),
        loads[-1],
        curves[row["model"]]["validation_steps"],
        loads.max(axis=2),
        title="Who carries the tokens: "
        + ("experts of the MLPs" if kind == "ffn" else "experts of attention"),
      )
  plots.plot_losses(
    run.folder.path / "loss.png",
    curves,
    baselines,
    title=f"Learning to predict the next {run.corpus.unit} of "
    f"{run.corpus.description}",
  )


def _sample(run: Run, model: Transformer, state: TrainState) -> str:
  config = run.config
  prompt_ids = run.vocabulary.encode(config.prompt)
  continuation = jax.jit(
    functools.partial(
      sample,
      model,
      num_tokens=config.sample_tokens,
      temperature=config.temperature,
    )
  )(
    variables_of(state),
    np.asarray([prompt_ids], np.int32),
    key=jax.random.key(config.training.seed),
  )
  return run.vocabulary.decode(prompt_ids + continuation[0].tolist()) + "\n"
