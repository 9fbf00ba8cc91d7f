"""Folders of weights, in the words of Hugging Face's families or in our own."""

from scattermoe_jax.checkpoints.errors import CheckpointError
from scattermoe_jax.checkpoints.families import FAMILIES
from scattermoe_jax.checkpoints.huggingface import (
  load,
  read_config,
  read_family,
  save,
)
from scattermoe_jax.checkpoints.peft import load_adapters, save_adapters

__all__ = [
  "FAMILIES",
  "CheckpointError",
  "load",
  "load_adapters",
  "read_config",
  "read_family",
  "save",
  "save_adapters",
]
