"""Trains a mixture-of-experts language model, and its dense twin beside it.

  python -m scattermoe_jax.models.train                    the demo
  python -m scattermoe_jax.models.train --data notes.txt   on a file or a folder
  python -m scattermoe_jax.models.train --set num_experts=16 --steps 2000
  python -m scattermoe_jax.models.train --resume runs/NAME after a kill
  python -m scattermoe_jax.models.train --mesh data=2,expert=4    on 8 devices

The dense twin has as many active parameters (what one token meets), the same
batches and as many steps: the difference is what the experts bring.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from scattermoe_jax.models import data, plots
from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.models.mesh import Placement
from scattermoe_jax.models.options import (
  RunConfig,
  apply_flags,
  differences,
  make_parser,
)
from scattermoe_jax.models.progress import Reporter
from scattermoe_jax.models.run_folder import RunError, RunFolder, fingerprint
from scattermoe_jax.models.sampling import sample
from scattermoe_jax.models.training import (
  StepMetrics,
  TrainState,
  count_active_params,
  count_params,
  evaluate_batch,
  init_state,
  make_optimizer,
  make_train_step,
  nats_to_bits,
)
from scattermoe_jax.models.transformer import Transformer


def main(argv: list[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  flags = make_parser(__doc__).parse_args(argv)
  console = Console(highlight=False)
  try:
    with _begin(flags) as run, run.placement.context():
      _run(run, console)
  except (data.DataError, RunError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped; go on with --resume and the folder", file=sys.stderr)
    return 130
  return 0


@dataclasses.dataclass(frozen=True)
class Run:
  """A run that may begin: its settings are checked and its folder is locked."""

  config: RunConfig
  corpus: data.Corpus
  folder: RunFolder
  placement: Placement

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.folder.close()


def _begin(flags: argparse.Namespace) -> Run:
  """Checks all that can be wrong before anything is written."""
  resumed = getattr(flags, "resume", None)
  if resumed:
    stored = RunFolder.read_config(Path(resumed))
    before = RunConfig.from_dict(stored["settings"])
  else:
    before = RunConfig()
  config = apply_flags(before, flags)
  if config.model.vocab_size < data.VOCAB_SIZE:
    raise ValueError(
      f"vocab_size = {config.model.vocab_size}; tokens are bytes, so it must "
      f"be at least {data.VOCAB_SIZE}."
    )
  corpus = data.load_corpus(config.data)
  data.check_lengths(
    corpus,
    batch_size=config.training.batch_size,
    sequence_length=config.training.sequence_length,
  )
  placement = Placement.of(getattr(flags, "mesh", None))
  placement.check(config.training.batch_size, config.models().values())
  data_hash = fingerprint(corpus.train, corpus.validation)
  if not resumed:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = RunFolder.create(
      Path(getattr(flags, "out", f"runs/{now}")),
      {"settings": config.to_dict(), "data_hash": data_hash},
    )
    return Run(config, corpus, folder, placement)
  if changed := differences(before.to_dict(), config.to_dict()):
    raise RunError(
      f"--resume {resumed}: that run has {'; '.join(changed)}. A checkpoint "
      "of another config does not fit: start a new run with --out."
    )
  if stored["data_hash"] != data_hash:
    raise RunError(
      f"--resume {resumed}: {corpus.description} is not what it was when that "
      "run began. Bring the data back or start a new run with --out."
    )
  return Run(config, corpus, RunFolder(Path(resumed)), placement)


def _run(run: Run, console: Console) -> None:
  corpus, config = run.corpus, run.config
  console.print(
    f"{corpus.description}: {corpus.train.size:,} bytes to learn from, "
    f"{corpus.validation.size:,} held out",
    soft_wrap=True,
  )
  console.print(f"writing to {run.folder.path}", soft_wrap=True)
  reporter = Reporter(console)
  rows = []
  states = {}
  for name, model_config in config.models().items():
    model = Transformer(model_config, run.placement.axes)
    states[name] = state = fit(run, name, model_config, reporter)
    rows.append(_summarise(run, name, model, state))
  baselines = {
    "uniform": data.uniform_bits(),
    "unigram": data.unigram_bits(corpus),
  }
  _draw(run, rows, baselines)
  (run.folder.path / "summary.json").write_text(
    json.dumps({"baselines": baselines, "models": rows}, indent=2) + "\n"
  )
  console.print(_table(rows, baselines))
  name, model_config = next(iter(config.models().items()))
  model = Transformer(model_config, run.placement.axes)
  text = _sample(config, model, states[name])
  (run.folder.path / "sample.txt").write_text(text)
  console.rule(f"a sample of {name}")
  console.print(text, markup=False, soft_wrap=True)
  console.rule()
  pictures = ", ".join(str(p) for p in sorted(run.folder.path.glob("*.png")))
  console.print(f"pictures: {pictures}", soft_wrap=True)


def fit(
  run: Run, name: str, model_config: ModelConfig, reporter: Reporter
) -> TrainState:
  """Returns the state of a model trained to the end, from where it was."""
  config, folder, placement = run.config, run.folder, run.placement
  model = Transformer(model_config, placement.axes)
  optimizer = make_optimizer(config.training)
  state = placement.init(
    model,
    functools.partial(init_state, model, optimizer),
    jax.random.key(config.training.seed),
  )
  train_step = placement.jit_step(
    make_train_step(model, optimizer, config.training), state
  )
  evaluate = jax.jit(functools.partial(evaluate_batch, model))
  checkpoints = folder.checkpoints(name, model_config.to_dict())
  if checkpoints.latest_step is not None:
    stored = checkpoints.restore(placement.to_store(state))
    state = placement.from_store(stored, like=state)
  start, steps = int(state.step), config.training.steps
  folder.forget_after(name, start)

  with reporter.training(name, start, steps) as meter:
    began = time.perf_counter()
    for step in range(start + 1, steps + 1):
      state, metrics = train_step(state, _batch(run, step))
      bits = nats_to_bits(float(metrics.loss))
      now = time.perf_counter()
      tokens_per_second = config.training.batch_size * (
        config.training.sequence_length / (now - began)
      )
      began = now
      folder.log(
        model=name,
        step=step,
        bits=bits,
        balance=float(metrics.balance),
        z=float(metrics.z),
        grad_norm=float(metrics.grad_norm),
        tokens_per_second=round(tokens_per_second),
      )
      if step % config.evaluate_every == 0 or step == steps:
        held_out = _validate(run, evaluate, state)
        meter.validation(held_out)
        folder.log(
          model=name, step=step, validation_bits=held_out, load=_load(metrics)
        )
      meter.step(step, bits, tokens_per_second)
      if step % config.checkpoint_every == 0 or step == steps:
        checkpoints.save(placement.to_store(state))
  checkpoints.close()
  return state


def _batch(run: Run, step: int) -> jax.Array | np.ndarray:
  training = run.config.training
  batch = data.train_batch(
    run.corpus.train,
    seed=training.seed,
    step=step,
    batch_size=training.batch_size,
    sequence_length=training.sequence_length,
  )
  return run.placement.put(batch)


def _validate(run: Run, evaluate, state: TrainState) -> float:
  """Returns the bits per byte of held-out text."""
  batches = data.validation_batches(
    run.corpus.validation,
    num_batches=run.config.validation_batches,
    batch_size=run.config.training.batch_size,
    sequence_length=run.config.training.sequence_length,
  )
  losses = [
    evaluate(_variables(state), run.placement.put(batch)) for batch in batches
  ]
  return nats_to_bits(float(jnp.stack(losses).mean()))


def _variables(state: TrainState) -> dict[str, Any]:
  return {"params": state.params, "router_state": state.router_state}


def _load(metrics: StepMetrics) -> dict[str, list]:
  """Returns rows of each expert over its layer's mean, by kind of layer."""
  load = {}
  for kind, routers in metrics.routers._asdict().items():
    if routers is not None:
      rows = np.asarray(routers.tokens_per_expert, np.float64)
      load[kind] = (rows / rows.mean(axis=1, keepdims=True)).round(4).tolist()
  return load


def _summarise(run: Run, name: str, model, state) -> dict[str, Any]:
  lines = run.folder.metrics(name)
  return {
    "model": name,
    "params": count_params(state.params),
    "active_params": count_active_params(state.params, model),
    "validation_bits": next(
      m["validation_bits"] for m in reversed(lines) if "validation_bits" in m
    ),
    "tokens": run.config.training.steps
    * run.config.training.batch_size
    * run.config.training.sequence_length,
    # The first step compiles.
    "tokens_per_second": int(
      np.median([m["tokens_per_second"] for m in lines if "bits" in m])
    ),
  }


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
    title=f"Learning to predict the next byte of {run.corpus.description}",
  )


def _sample(config: RunConfig, model: Transformer, state) -> str:
  prompt = data.encode(config.prompt)[None]
  continuation = jax.jit(
    functools.partial(
      sample,
      model,
      num_tokens=config.sample_tokens,
      temperature=config.temperature,
    )
  )(_variables(state), prompt, key=jax.random.key(config.training.seed))
  return config.prompt + data.decode(np.asarray(continuation[0])) + "\n"


if __name__ == "__main__":
  sys.exit(main())
