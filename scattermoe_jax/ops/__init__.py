"""Differentiable ops over routed rows. `custom_vjp` lives only here."""

from scattermoe_jax.ops.activations import (
  ACTIVATIONS,
  Activation,
  clamped_swiglu,
)
from scattermoe_jax.ops.combine import combine
from scattermoe_jax.ops.linear_combine import linear_combine
from scattermoe_jax.ops.parallel_linear import parallel_linear
from scattermoe_jax.ops.remat import remat_policy
from scattermoe_jax.ops.smoe_mlp import smoe_mlp

__all__ = [
  "ACTIVATIONS",
  "Activation",
  "clamped_swiglu",
  "combine",
  "linear_combine",
  "parallel_linear",
  "remat_policy",
  "smoe_mlp",
]
