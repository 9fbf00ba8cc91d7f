"""The optimizer against its definition, and what a seed decides."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scattermoe_jax.models import ModelConfig, Transformer, training, weights
from scattermoe_jax.models.mesh import Placement
from scattermoe_jax.models.options import RunConfig
from scattermoe_jax.models.training import (
  StepMetrics,
  TrainConfig,
  init_state,
  make_optimizer,
  make_train_step,
  total_loss,
)
from scattermoe_jax.models.transformer import ModelMetrics
from tests.test_models import random_ids, random_variables

# No field has the value of its default.
TRAIN = TrainConfig(
  steps=11,
  warmup_steps=3,
  learning_rate=0.02,
  weight_decay=0.3,
  clip_norm=0.7,
  batch_size=2,
  sequence_length=5,
  seed=1,
)
SMALL = ModelConfig(
  vocab_size=19,
  d_model=8,
  num_layers=2,
  attention="moa",
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  attention_experts=3,
  attention_top_k=2,
  dense_layers=(1,),
  d_ff=4,
  num_experts=4,
  d_expert=4,
)
DECAYED = ("embedding", "kernel", "w_gate_up", "w_in", "w_out")
FREE = ("bias", "bias_in", "bias_out", "output_bias", "scale", "sinks", "a")


def rate(step, warmup):
  """From 0 to the peak in a line; to a tenth of it in half a cosine."""
  if step < warmup:
    return TRAIN.learning_rate * step / warmup
  share = (step - warmup) / (TRAIN.steps - warmup)
  end = TRAIN.learning_rate / 10
  return end + (TRAIN.learning_rate - end) * (1 + np.cos(np.pi * share)) / 2


def adamw(params, all_grads, warmup):
  """Yields the updates of each step: Loshchilov and Hutter's, of clipped g."""
  m = {name: np.zeros_like(w) for name, w in params.items()}
  v = {name: np.zeros_like(w) for name, w in params.items()}
  for step, grads in enumerate(all_grads):
    size = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    updates = {}
    for name, w in params.items():
      g = grads[name] * min(1.0, TRAIN.clip_norm / size)
      m[name] = 0.9 * m[name] + 0.1 * g
      v[name] = 0.98 * v[name] + 0.02 * g**2
      mean = m[name] / (1 - 0.9 ** (step + 1))
      square = v[name] / (1 - 0.98 ** (step + 1))
      change = mean / (np.sqrt(square) + 1e-8)
      if name in DECAYED:
        change = change + TRAIN.weight_decay * w
      updates[name] = -rate(step, warmup) * change
    yield updates


@pytest.mark.parametrize(("warmup_steps", "warmup"), [(3, 3), (30, 5)])
def test_updates_are_adamws(warmup_steps, warmup, x64):
  # A warmup longer than half of the run ends there.
  config = dataclasses.replace(TRAIN, warmup_steps=warmup_steps)
  random = np.random.default_rng(0)
  draw = lambda scale: {
    name: random.normal(size=(2, 3)) * scale for name in DECAYED + FREE
  }
  params = draw(1.0)
  # Norms on both sides of the bound, and not twice the same.
  all_grads = [draw(0.02 * 2.0 ** (i % 6)) for i in range(TRAIN.steps)]
  optimizer = make_optimizer(config)
  with jax.numpy_dtype_promotion("standard"):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    wanted = adamw(params, all_grads, warmup)
    for grads, want in zip(all_grads, wanted, strict=True):
      got, state = update(grads, state, params)
      for name, w in params.items():
        # The rate is computed in float32.
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)
        params[name] = w + want[name]


def test_seeds_and_steps_have_a_jitter_each(monkeypatch):
  # In the place of the loss, the first random number of the jitter's key.
  zero = jnp.float32(0)
  draw = lambda grad_fn, state, batch, key, parts: (
    {},
    StepMetrics(jax.random.uniform(key), *[zero] * 3, ModelMetrics(None, None)),
  )
  monkeypatch.setattr(training, "_accumulate", draw)
  optimizer, drawn = optax.sgd(0.0), set()
  for seed in range(3):
    config = dataclasses.replace(TRAIN, seed=seed)
    train_step = make_train_step(Transformer(SMALL), optimizer, config)
    state = training.start_state(optimizer, {}, {})
    for _ in range(3):
      state, metrics = train_step(state, random_ids(2, 6))
      drawn.add(float(metrics.loss))
  assert len(drawn) == 9


def test_the_seed_is_of_the_first_weights(monkeypatch):
  config = dataclasses.replace(SMALL, num_layers=1, dense_layers=())
  model = Transformer(dataclasses.replace(config, ffn="dense"))
  optimizer = optax.sgd(0.0)
  init = jax.jit(lambda key: init_state(model, optimizer, key))
  monkeypatch.setattr(Placement, "init", lambda self, model, _, key: init(key))

  def first(seed):
    seeded = dataclasses.replace(TRAIN, seed=seed)
    run = RunConfig(model=model.config, training=seeded)
    return weights.first_state(run, model, optimizer, Placement.of(None))

  params = first(1).params
  jax.tree.map(np.testing.assert_array_equal, params, first(1).params)
  other = first(2).params["embed"]["embedding"]
  assert (params["embed"]["embedding"] != other).all()


def test_router_losses_are_means_over_all_routed_layers():
  model = Transformer(SMALL)
  variables, batch = random_variables(model), random_ids(2, 6)
  _, metrics = jax.jit(
    lambda variables: total_loss(model, variables, batch, TRAIN)
  )(variables)
  # Two mixtures of attention, and one of the two feed-forwards.
  ffn, attention = metrics.routers
  for got, name in (
    (metrics.balance, "load_balancing_loss"),
    (metrics.z, "router_z_loss"),
  ):
    layers = np.concatenate([getattr(ffn, name), getattr(attention, name)])
    assert len(layers) == 3 and len(set(layers.tolist())) == 3
    np.testing.assert_allclose(got, layers.mean(dtype=float), rtol=1e-6)
  assert metrics.loss.dtype == jnp.float32
