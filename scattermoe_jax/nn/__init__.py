"""Flax linen modules: routers, experts and attention for people's models."""

from scattermoe_jax.nn.attention import MixtureOfAttention
from scattermoe_jax.nn.attention_core import (
  KVCache,
  attend,
  consecutive_positions,
)
from scattermoe_jax.nn.dense_mlp import DenseMLP
from scattermoe_jax.nn.losses import load_balancing_loss, router_z_loss
from scattermoe_jax.nn.metrics import SMoEMetrics, route_with_metrics
from scattermoe_jax.nn.parallel_linear import ParallelLinear
from scattermoe_jax.nn.rotary import RopeScaling, rotary_embedding
from scattermoe_jax.nn.router import (
  Router,
  RouterOutput,
  sigmoid_top_k,
  softmax_then_top_k,
  top_k_then_softmax,
  update_selection_bias,
)
from scattermoe_jax.nn.smoe import SMoEBlock, SMoEMLP
from scattermoe_jax.ops import ACTIVATIONS, Activation

__all__ = [
  "ACTIVATIONS",
  "Activation",
  "DenseMLP",
  "KVCache",
  "MixtureOfAttention",
  "ParallelLinear",
  "RopeScaling",
  "Router",
  "RouterOutput",
  "SMoEBlock",
  "SMoEMLP",
  "SMoEMetrics",
  "attend",
  "consecutive_positions",
  "load_balancing_loss",
  "rotary_embedding",
  "route_with_metrics",
  "router_z_loss",
  "sigmoid_top_k",
  "softmax_then_top_k",
  "top_k_then_softmax",
  "update_selection_bias",
]
