"""The weights that a run begins with, and those that it leaves.

begins with    new ones; or those of a folder, all trained; or those of a
               folder, frozen under low-rank adapters that are trained
leaves         export/     config.json + safetensors, in the folder's family
               adapters/   in the layout of the PEFT library
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from scattermoe_jax import checkpoints
from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.models.mesh import Placement
from scattermoe_jax.models.options import RunConfig
from scattermoe_jax.models.training import TrainState, init_state, start_state
from scattermoe_jax.models.transformer import Transformer
from scattermoe_jax.nn.lora import init_adapters, with_adapters

Tree = Any

EXPORT = "export"
ADAPTERS = "adapters"


def read_model(init_from: str) -> ModelConfig:
  """Returns the model of a folder, as its config.json describes it.

  Raises:
    ValueError: if it describes none.
  """
  try:
    return checkpoints.read_config(init_from)
  except checkpoints.CheckpointError as error:
    raise ValueError(f"--init-from {init_from}: {error}") from None


def first_state(
  config: RunConfig,
  model: Transformer,
  optimizer: optax.GradientTransformation,
  placement: Placement,
  on_progress: Callable[[int, int], None] | None = None,
) -> TrainState:
  """Returns the state before the first step.

  Args:
    config: says what to begin with.
    model: the model to train.
    optimizer: from `make_optimizer`.
    placement: on which devices.
    on_progress: called with the bytes loaded and in all, again and again.

  Raises:
    ValueError: if the folder of weights is not whole.
  """
  key = jax.random.key(config.training.seed)
  init = functools.partial(init_state, model, optimizer)
  if config.init_from is None:
    return placement.init(model, init, key)
  _, variables = checkpoints.load(
    config.init_from,
    dtype=config.model.param_dtype,
    on_progress=on_progress,
  )
  params = variables["params"]
  router_state = variables.get("router_state", {})
  if config.lora_rank:
    adapters = _float32(init_adapters(key, params, rank=config.lora_rank))
    return start_state(optimizer, adapters, router_state, frozen=params)
  state = start_state(optimizer, params, router_state)
  if placement.mesh is None:
    return state
  return placement.from_store(state, like=placement.init(model, init, key))


def whole_params(trained: Tree, frozen: Tree) -> Tree:
  """Returns the model's parameters of what is trained and what is not."""
  return trained if frozen is None else with_adapters(frozen, trained)


def variables_of(state: TrainState) -> dict[str, Any]:
  """Returns what `Transformer.apply` takes."""
  return {
    "params": whole_params(state.params, state.frozen),
    "router_state": state.router_state,
  }


def export(
  folder: Path, config: RunConfig, model_config: ModelConfig, state: TrainState
) -> Path:
  """Writes what was trained; returns the folder that `generate` takes.

  A model is written in the dtype that it computes in, adapters in float32.

  Args:
    folder: of the run. What is in it already was written by the same run.
    config: the run's settings.
    model_config: the model.
    state: the last, in the shapes of one device.
  """
  directory = folder / (ADAPTERS if config.lora_rank else EXPORT)
  if directory.exists():
    return directory
  if config.lora_rank:
    assert config.init_from is not None
    checkpoints.save_adapters(
      directory,
      state.params,
      family=checkpoints.read_family(config.init_from),
      base=config.init_from,
    )
    return directory
  dtype = model_config.dtype
  variables = {"params": jax.tree.map(lambda w: w.astype(dtype), state.params)}
  if state.router_state:
    variables["router_state"] = state.router_state
  checkpoints.save(
    directory,
    dataclasses.replace(model_config, param_dtype=dtype),
    variables,
    like=config.init_from,
  )
  return directory


def _float32(tree: Tree) -> Tree:
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
