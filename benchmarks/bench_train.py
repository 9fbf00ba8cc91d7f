"""How fast does a language model train, and how much of the card does it use?

  python -m benchmarks.bench_train [--variants mosaic xla dense] [--steps 10]
      [--tiny] [--write]

A whole step of `scattermoe_jax.models`: embedding, 16 layers of attention and
a mixture (d = 1024, 2 of 8 experts of width 3584), loss, gradients, AdamW; 1.5
billion parameters, 8 texts of 2048 tokens, bfloat16 with weights in float32.

  mosaic, triton, xla   the model with that backend
  dense                 a dense MLP of the same active width in its place

`mfu` is the FLOPs that the model asks for (nothing recomputed counts, half of
the attention scores) over what the card does in that time at the rate of a
dense product measured before, 8192 cubed. Losses and gradient norms of the
first step must agree among the mixtures of a run before a time is printed.

The rate of learning is near zero, so that the routing stays what random weights
make it; `busiest_expert` is the load of the fullest expert of any layer over
the mean.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command, timing
from benchmarks.compiling import Job, abstract, compile_together
from benchmarks.shapes import normal
from scattermoe_jax.models import training
from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.models.transformer import Transformer

VARIANTS = ("mosaic", "xla", "dense")  # and "triton", if it is named
_MODEL = ModelConfig(
  vocab_size=32768,
  d_model=1024,
  num_layers=16,
  num_heads=16,
  num_kv_heads=16,
  head_dim=64,
  num_experts=8,
  top_k=2,
  d_expert=3584,
  dtype="bfloat16",
)
_TINY = dataclasses.replace(
  _MODEL, vocab_size=64, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2,
  head_dim=16, d_expert=64,
)  # fmt: skip
_BATCH, _LENGTH = 8, 2048
_LEARNING_RATE = 1e-7
# Relative, of one model by two backends. A first loss is near that of guessing,
# whatever a layer does; the norm of the gradient is not.
_AGREEMENT = {"first_loss": 0.001, "first_grad_norm": 0.02}


def model_of(variant: str, config: ModelConfig) -> ModelConfig:
  """Returns the model that a name stands for."""
  if variant == "dense":
    return config.dense_twin()
  return dataclasses.replace(config, implementation=variant)


def model_flops(config: ModelConfig, batch: int, length: int) -> int:
  """Returns the FLOPs of a step: forward, and twice that for the backward."""
  heads = config.num_heads * config.head_dim
  kv_heads = config.num_kv_heads * config.head_dim
  attention = 2 * config.d_model * (heads + kv_heads) + length * heads
  if config.ffn == "dense":
    ffn = 3 * config.d_model * config.d_ff
  else:
    ffn = 3 * config.d_model * config.top_k * config.d_expert
    ffn += config.d_model * config.num_experts
  weights = config.num_layers * (attention + ffn)
  weights += config.d_model * config.vocab_size
  return 6 * batch * length * weights


def dense_rate(size: int) -> float:
  """Returns FLOP/s of a bfloat16 product of two square matrices."""
  a, b = normal(1, size, size), normal(2, size, size)
  product = jax.jit(jnp.dot)
  taken = timing.time_interleaved({"dense": lambda: product(a, b)})
  return 2 * size**3 / (taken["dense"].ms_median / 1e3)


def run(
  config: ModelConfig,
  *,
  variants: Sequence[str],
  batch: int,
  length: int,
  steps: int,
  rate: float,
) -> Iterator[dict[str, Any]]:
  """Yields a record of each variant, having printed it.

  Args:
    config: the model with a mixture.
    variants: names of backends, or "dense".
    batch: texts of a step.
    length: tokens of a text.
    steps: how many are timed.
    rate: FLOP/s of a dense product.
  """
  train = training.TrainConfig(
    batch_size=batch, sequence_length=length, learning_rate=_LEARNING_RATE
  )
  optimizer = training.make_optimizer(train)
  tokens = jnp.asarray(
    np.random.default_rng(0).integers(
      config.vocab_size, size=(batch, length + 1), dtype=np.int32
    )
  )
  models = {name: Transformer(model_of(name, config)) for name in variants}
  states = {name: _state_of(model, optimizer) for name, model in models.items()}
  jobs = {
    name: Job(
      training.make_train_step(model, optimizer, train),
      (states[name], abstract(tokens)),
    )
    for name, model in models.items()
  }
  start = time.perf_counter()
  compiled = compile_together(jobs, donate=(0,))
  records: list[dict[str, Any]] = []
  for name, future in compiled.items():
    step = future.result()
    print(
      f"{name}: compiled by {time.perf_counter() - start:.1f} s", flush=True
    )
    metrics, times = _train(step, _filled(states[name]), tokens, steps)
    memory = step.memory_analysis()
    took = timing.summary(times)
    flops = model_flops(models[name].config, batch, length)
    arguments = memory.argument_size_in_bytes
    records.append(
      {
        "model": _described(config, batch, length),
        "variant": name,
        "params": training.count_params(states[name].params),
        **took._asdict(),
        "tokens_per_s": batch * length / took.ms_median * 1e3,
        "model_tflops": flops / took.ms_median / 1e9,
        "mfu": flops / (took.ms_median / 1e3) / rate,
        "dense_tflops": rate / 1e12,
        "peak_mib": (arguments + memory.temp_size_in_bytes) / 2**20,
        "state_mib": arguments / 2**20,
        "first_loss": float(metrics.loss),
        "first_grad_norm": float(metrics.grad_norm),
        "busiest_expert": _busiest(metrics),
      }
    )
    _check(records)
    print(_line(records[-1]), flush=True)
    yield records[-1]


def _described(config: ModelConfig, batch: int, length: int) -> str:
  """Returns what a record is of; all that is not as usual, in words."""
  text = f"d={config.d_model} layers={config.num_layers}"
  if (batch, length) != (_BATCH, _LENGTH):
    text += f" texts={batch} x {length}"
  return f"{text} remat" if config.remat else text


def _state_of(model: Transformer, optimizer) -> training.TrainState:
  """Returns the shapes of a state; they do not depend on the backend."""
  # That of the CPU runs everywhere.
  config = dataclasses.replace(model.config, implementation="xla")
  return jax.eval_shape(
    lambda: training.init_state(
      Transformer(config), optimizer, jax.random.key(0)
    )
  )


def _filled(state: training.TrainState) -> training.TrainState:
  """Returns arrays of these shapes: normal weights, unit scales, else zeros.

  An array at a time: XLA took a minute on 2 cores for `init_state` of 16 layers
  as one program, and arrays of one shape share theirs.
  """
  seeds = itertools.count()

  def weight(path, a):
    if len(a.shape) > 1:
      return _normal(next(seeds), a.shape, a.dtype)
    return jnp.full(a.shape, path[-1].key == "scale", a.dtype)

  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
  params = jax.tree_util.tree_map_with_path(weight, state.params)
  return zeros._replace(params=params)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed, shape, dtype):
  values = jax.random.normal(jax.random.key(seed), shape, dtype)
  return values * jnp.asarray(shape[-2] ** -0.5, dtype)


def _train(step, state, tokens, steps: int):
  """Returns what the first step reports, and ms of each step after it."""
  state, first = jax.block_until_ready(step(state, tokens))
  times = []
  for _ in range(steps):
    start = time.perf_counter()
    state, metrics = step(state, tokens)
    jax.block_until_ready(metrics)
    times.append((time.perf_counter() - start) * 1e3)
  return first, times


def _busiest(metrics: training.StepMetrics) -> float | None:
  """Returns the largest load of an expert over the mean; None without any."""
  ffn = metrics.routers.ffn
  if ffn is None:
    return None
  loads = np.asarray(ffn.tokens_per_expert)
  return float(loads.max() / loads.mean())


def _check(records: Sequence[dict[str, Any]]) -> None:
  """Raises AssertionError unless the mixtures compute the same."""
  for field, allowed in _AGREEMENT.items():
    assert np.all(np.isfinite([r[field] for r in records])), field
    found = [r[field] for r in records if r["variant"] != "dense"]
    if found:
      same = np.ptp(found) <= allowed * found[0]
      assert same, f"{field} differs: {found}"


def _line(r: dict[str, Any]) -> str:
  return (
    f"{r['variant']:<7} {r['params'] / 1e9:.3f} B parameters "
    f"{r['ms_median']:8.1f} ms [{r['ms_p20']:.1f}, {r['ms_p80']:.1f}] "
    f"{r['tokens_per_s']:9.0f} tokens/s  {r['model_tflops']:6.1f} TFLOP/s  "
    f"{r['mfu']:.3f} of dense  peak {r['peak_mib']:.0f} MiB  "
    f"loss {r['first_loss']:.4f}  busiest expert {r['busiest_expert'] or 1:.2f}"
  )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Measures, prints and, with --write, stores."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--variants", nargs="+", choices=(*VARIANTS, "triton"), default=VARIANTS
  )
  parser.add_argument("--steps", type=int, default=20, help="that are timed")
  parser.add_argument("--batch", type=int, default=_BATCH, help="texts")
  parser.add_argument("--length", type=int, default=_LENGTH, help="tokens each")
  parser.add_argument("--layers", type=int, default=None)
  parser.add_argument(
    "--remat", action="store_true", help="compute layers again in the backward"
  )
  parser.add_argument("--tiny", action="store_true", help="runs on a CPU")
  parser.add_argument("--write", action="store_true", help="keep the records")
  options = parser.parse_args(arguments)
  config = _TINY if options.tiny else _MODEL
  config = dataclasses.replace(
    config,
    num_layers=options.layers or config.num_layers,
    remat=options.remat,
  )
  made = run(
    config,
    variants=options.variants,
    batch=options.batch,
    length=options.length,
    steps=options.steps,
    rate=dense_rate(64 if options.tiny else 8192),
  )
  records = []
  for record in made:
    records += command.store(
      [record], options, bench="bench_train", key=("model", "variant")
    )
  return records


if __name__ == "__main__":
  main()
