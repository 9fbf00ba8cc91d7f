"""A small mixture-of-experts language model and the program that trains it."""

from scattermoe_jax.models.config import ModelConfig as ModelConfig
from scattermoe_jax.models.transformer import ModelOutput as ModelOutput
from scattermoe_jax.models.transformer import Transformer as Transformer
from scattermoe_jax.models.transformer import init_cache as init_cache
