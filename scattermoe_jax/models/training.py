"""The loss, the optimizer and the train step, as pure functions.

loss = cross entropy + balance_coef * balance + z_coef * z
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from scattermoe_jax.models.transformer import ModelMetrics, Transformer
from scattermoe_jax.nn import update_selection_bias
from scattermoe_jax.nn.checks import check_not_negative, check_positive

# A tree of arrays.
Tree = Any

# Weight decay shrinks matrices; biases and norms' scales stay free.
_MATRICES = {"embedding", "kernel", "w_gate_up", "w_in", "w_out"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How to train; the defaults are the demo's.

  Attributes:
    steps: updates of the weights.
    batch_size: sequences of one update.
    sequence_length: tokens of one sequence.
    accumulate: parts that a batch is computed in, one after another, to save
      memory; divides batch_size.
    learning_rate: its peak, reached after warmup_steps; a cosine leads from
      there to a tenth of it.
    warmup_steps: see learning_rate.
    weight_decay: of matrices, not of biases, norms and adapters.
    clip_norm: bound on the norm of the gradient.
    balance_coef: of the load-balancing losses, averaged over layers.
    z_coef: of the router z-losses, averaged over layers.
    selection_bias_rate: of the bias that balances sigmoid routers.
    seed: of the initial weights and of the batches.
  """

  steps: int = 400
  batch_size: int = 16
  sequence_length: int = 128
  accumulate: int = 1
  learning_rate: float = 4e-3
  warmup_steps: int = 30
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  balance_coef: float = 0.01
  z_coef: float = 1e-4
  selection_bias_rate: float = 1e-3
  seed: int = 0

  def __post_init__(self):
    for name in ("steps", "batch_size", "sequence_length", "accumulate"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"TrainConfig: {name} must be at least 1, got {getattr(self, name)}."
        )
    check_positive(
      "TrainConfig", learning_rate=self.learning_rate, clip_norm=self.clip_norm
    )
    check_not_negative(
      "TrainConfig",
      warmup_steps=self.warmup_steps,
      weight_decay=self.weight_decay,
      balance_coef=self.balance_coef,
      z_coef=self.z_coef,
      selection_bias_rate=self.selection_bias_rate,
    )
    if self.batch_size % self.accumulate:
      raise ValueError(
        f"TrainConfig: accumulate = {self.accumulate} must divide batch_size = "
        f"{self.batch_size}."
      )


class TrainState(NamedTuple):
  """All that a step reads and, but for what is frozen, changes.

  Attributes:
    step: updates so far.
    params: what is trained.
    router_state: the selection biases of sigmoid routers, which stay under
      adapters as frozen weights do; else empty.
    opt_state: the optimizer's.
    frozen: weights that stay, under adapters; else empty.
  """

  step: Int[Array, ""]
  params: Tree
  router_state: Tree
  opt_state: Tree
  frozen: Tree


class StepMetrics(NamedTuple):
  """What one update reports, from before it.

  Attributes:
    loss: mean cross entropy of a token, in nats.
    balance: mean load-balancing loss of the routed layers; k if balanced.
    z: their mean z-loss.
    grad_norm: of the whole gradient, unclipped.
    routers: metrics of the routers, see `ModelMetrics`.
  """

  loss: Float[Array, ""]
  balance: Float[Array, ""]
  z: Float[Array, ""]
  grad_norm: Float[Array, ""]
  routers: ModelMetrics


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """Returns AdamW with clipping, warmup and a cosine to a tenth."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=min(config.warmup_steps, config.steps // 2),
    decay_steps=config.steps,
    end_value=config.learning_rate / 10,
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule, b2=0.98, weight_decay=config.weight_decay, mask=_is_matrix
    ),
  )


def init_state(
  model: Transformer, optimizer: optax.GradientTransformation, key: Array
) -> TrainState:
  """Returns the state before the first step; can be jitted."""
  variables = nn.unbox(model.init(key, jnp.zeros((1, 8), jnp.int32)))
  return start_state(
    optimizer, variables["params"], variables.get("router_state", {})
  )


def start_state(
  optimizer: optax.GradientTransformation,
  params: Tree,
  router_state: Tree,
  frozen: Tree = None,
) -> TrainState:
  """Returns the state that trains the given parameters from step 0."""
  return TrainState(
    step=jnp.int32(0),
    params=params,
    router_state=router_state,
    opt_state=optimizer.init(params),
    frozen=frozen,
  )


def make_train_step(
  model: Transformer,
  optimizer: optax.GradientTransformation,
  config: TrainConfig,
  params_of: Callable[[Tree, Tree], Tree] = lambda trained, frozen: trained,
) -> Callable[[TrainState, Array], tuple[TrainState, StepMetrics]]:
  """Returns the pure function (state, batch) -> (state, metrics).

  Args:
    model: the model.
    optimizer: from `make_optimizer`.
    config: how to train.
    params_of: makes the model's parameters of the trained and the frozen ones,
      for adapters.
  """

  def loss_fn(trained, frozen, router_state, batch, key):
    params = params_of(trained, frozen)
    variables = {"params": params, "router_state": router_state}
    return total_loss(model, variables, batch, config, key)

  def train_step(state: TrainState, batch: Int[Array, "B window"]):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grads, metrics = _accumulate(
      jax.grad(loss_fn, has_aux=True), state, batch, key, config.accumulate
    )
    # optax multiplies its integer count with floats.
    with jax.numpy_dtype_promotion("standard"):
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
    router_state = state.router_state
    # Of adapters nothing else is stored: on their base's biases they must fit.
    if state.frozen is None:
      router_state = _balance(router_state, metrics.routers, config)
    state = state._replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      router_state=router_state,
      opt_state=opt_state,
    )
    return state, metrics._replace(grad_norm=_norm(grads))

  return train_step


def total_loss(
  model: Transformer,
  variables: Tree,
  batch: Int[Array, "B window"],
  config: TrainConfig,
  key: Array | None = None,
) -> tuple[Float[Array, ""], StepMetrics]:
  """Returns what is minimised, and the metrics (grad_norm 0).

  Args:
    model: the model.
    variables: its variables.
    batch: tokens; each but the first is predicted from those before it.
    config: for the coefficients.
    key: for the routers' jitter; None for none.
  """
  output = model.apply(
    variables,
    batch[:, :-1],
    deterministic=key is None,
    rngs=None if key is None else {"router": key},
  )
  loss = cross_entropy(output.logits, batch[:, 1:])
  routers = [m for m in output.metrics if m is not None]
  balance = _mean([m.load_balancing_loss for m in routers])
  z = _mean([m.router_z_loss for m in routers])
  metrics = StepMetrics(loss, balance, z, jnp.float32(0), output.metrics)
  total = loss + config.balance_coef * balance + config.z_coef * z
  return total, metrics


def cross_entropy(
  logits: Float[Array, "B L V"], targets: Int[Array, "B L"]
) -> Float[Array, ""]:
  """Returns the mean of -log softmax(logits)[target], in nats."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return losses.mean()


def evaluate_batch(
  model: Transformer, variables: Tree, batch: Int[Array, "B window"]
) -> Float[Array, ""]:
  """Returns the mean cross entropy of a batch, in nats."""
  output = model.apply(variables, batch[:, :-1])
  return cross_entropy(output.logits, batch[:, 1:])


def nats_to_bits(nats: float) -> float:
  """Returns nats in bits; with bytes as tokens, bits per byte."""
  return nats / math.log(2)


def count_params(params: Tree) -> int:
  """Returns how many numbers the parameters are."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_active_params(params: Tree, model: Transformer) -> int:
  """Returns the parameters that one token meets: of E experts, k.

  Routers count, the embedding counts once.
  """
  config = model.config

  def active(path, leaf):
    names = [entry.key for entry in path]
    if "experts" in names:
      return leaf.size * config.top_k // config.num_experts
    if config.attention == "moa" and {"query", "output"} & set(names):
      return leaf.size * config.attention_top_k // config.attention_experts
    return leaf.size

  counts = jax.tree_util.tree_map_with_path(active, params)
  return sum(jax.tree.leaves(counts))


def _accumulate(grad_fn, state, batch, key, parts):
  """Returns the mean of gradients and metrics over equal parts of a batch."""
  given = (state.params, state.frozen, state.router_state)
  if parts == 1:
    return grad_fn(*given, batch, key)
  batches = batch.reshape(parts, batch.shape[0] // parts, batch.shape[1])
  keys = jax.random.split(key, parts)

  def add(total, part):
    new = grad_fn(*given, *part)
    return jax.tree.map(jnp.add, total, new), None

  first = grad_fn(*given, batches[0], keys[0])
  total, _ = lax.scan(add, first, (batches[1:], keys[1:]))

  # Counts of tokens add up; everything else is a mean.
  def mean(leaf):
    integer = jnp.issubdtype(leaf.dtype, jnp.integer)
    return leaf if integer else leaf / parts

  return jax.tree.map(mean, total)


def _balance(router_state, routers: ModelMetrics, config: TrainConfig):
  """Moves the selection biases, layer by layer, against the load."""
  if not router_state:
    return router_state
  load = routers.ffn.tokens_per_expert
  layers = sorted(router_state, key=lambda name: int(name.split("_")[1]))
  rate = config.selection_bias_rate
  return {
    name: jax.tree.map(
      lambda bias, i=i: update_selection_bias(bias, load[i], rate=rate),
      router_state[name],
    )
    for i, name in enumerate(layers)
  }


def _is_matrix(params):
  def is_matrix(path, leaf):
    del leaf
    return path[-1].key in _MATRICES

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def _norm(tree):
  squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
  return jnp.sqrt(sum(square.astype(jnp.float32) for square in squares))


def _mean(losses):
  if not losses:
    return jnp.float32(0)
  return jnp.concatenate(losses).astype(jnp.float32).mean()
