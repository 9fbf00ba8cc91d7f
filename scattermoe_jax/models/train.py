"""Trains a mixture-of-experts language model, and its dense twin beside it.

  python -m scattermoe_jax.models.train                    the demo
  python -m scattermoe_jax.models.train --data notes.txt   on a file or a folder
  python -m scattermoe_jax.models.train --set num_experts=16 --steps 2000
  python -m scattermoe_jax.models.train --resume runs/NAME after a kill
  python -m scattermoe_jax.models.train --mesh data=2,expert=4    on 8 devices

It needs more than the library: pip install 'scattermoe-jax[train]'.

The dense twin has as many active parameters (what one token meets), the same
batches and as many steps: the difference is what the experts bring.

  python -m scattermoe_jax.models.train --init-from DIR --data notes.txt
  python -m scattermoe_jax.models.train --init-from DIR --lora-rank 8

go on with the weights of a folder (Hugging Face's, or export/ of a run), all of
them or adapters alone; without a twin, and with a learning rate of 5e-5, or
5e-4 of adapters, by default. The folder's tokenizer makes the tokens; without
one they are bytes. Losses are in bits per byte of text whatever the tokens.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from scattermoe_jax.models import data, weights
from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.models.options import make_parser
from scattermoe_jax.models.progress import Reporter
from scattermoe_jax.models.report import report
from scattermoe_jax.models.setup import Run, begin
from scattermoe_jax.models.training import (
  StepMetrics,
  TrainState,
  evaluate_batch,
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
    with begin(flags) as run, run.placement.context():
      _run(run, console)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped; go on with --resume and the folder", file=sys.stderr)
    return 130
  return 0


def _run(run: Run, console: Console) -> None:
  corpus, config = run.corpus, run.config
  console.print(
    f"{corpus.description}: {corpus.train.size:,} {corpus.unit}s to learn "
    f"from, {corpus.validation.size:,} held out",
    soft_wrap=True,
  )
  console.print(f"writing to {run.folder.path}", soft_wrap=True)
  reporter = Reporter(console)
  states = {
    name: fit(run, name, model_config, reporter)
    for name, model_config in config.models().items()
  }
  report(run, states, console)
  name, model_config = next(iter(config.models().items()))
  stored = run.placement.to_store(states[name])
  directory = weights.export(run.folder.path, config, model_config, stored)
  flags = f"--checkpoint {directory}"
  if config.lora_rank:
    flags = f"--checkpoint {config.init_from} --adapters {directory}"
  console.print(
    f"more of it: python -m scattermoe_jax.models.generate {flags}",
    soft_wrap=True,
  )


def fit(
  run: Run, name: str, model_config: ModelConfig, reporter: Reporter
) -> TrainState:
  """Returns the state of a model trained to the end, from where it was."""
  config, folder, placement = run.config, run.folder, run.placement
  model = Transformer(model_config, placement.axes)
  optimizer = make_optimizer(config.training)
  state = weights.first_state(
    config, model, optimizer, placement, reporter.loading
  )
  train_step = placement.jit_step(
    make_train_step(model, optimizer, config.training, weights.whole_params),
    state,
  )
  evaluate = jax.jit(functools.partial(evaluate_batch, model))
  checkpoints = folder.checkpoints(name, model_config.to_dict())
  if checkpoints.latest_step is not None:
    # Frozen weights are not stored again.
    trained = state._replace(frozen=None)
    stored = checkpoints.restore(placement.to_store(trained))
    stored = placement.from_store(stored, like=trained)
    state = stored._replace(frozen=state.frozen)
  start, steps = int(state.step), config.training.steps
  folder.forget_after(name, start)
  if start == 0 and config.init_from is not None:
    bits = _validate(run, evaluate, state)
    folder.log(model=name, step=0, bits_before=bits)

  bytes_per_token = run.corpus.train_bytes_per_token
  with reporter.training(name, start, steps) as meter:
    began = time.perf_counter()
    for step in range(start + 1, steps + 1):
      state, metrics = train_step(state, _batch(run, step))
      bits = nats_to_bits(float(metrics.loss)) / bytes_per_token
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
        trained = state._replace(frozen=None)
        checkpoints.save(placement.to_store(trained))
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
  variables = weights.variables_of(state)
  losses = [evaluate(variables, run.placement.put(batch)) for batch in batches]
  bits = nats_to_bits(float(jnp.stack(losses).mean()))
  return bits / run.corpus.validation_bytes_per_token


def _load(metrics: StepMetrics) -> dict[str, list]:
  """Returns rows of each expert over its layer's mean, by kind of layer."""
  load = {}
  for kind, routers in metrics.routers._asdict().items():
    if routers is not None:
      rows = np.asarray(routers.tokens_per_expert, np.float64)
      load[kind] = (rows / rows.mean(axis=1, keepdims=True)).round(4).tolist()
  return load


if __name__ == "__main__":
  sys.exit(main())
