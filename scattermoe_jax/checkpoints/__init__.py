"""Folders of weights, in the words of Hugging Face's families or in our own."""

from scattermoe_jax.checkpoints.errors import CheckpointError
from scattermoe_jax.checkpoints.families import FAMILIES
from scattermoe_jax.checkpoints.huggingface import load, read_config, save

__all__ = ["FAMILIES", "CheckpointError", "load", "read_config", "save"]
