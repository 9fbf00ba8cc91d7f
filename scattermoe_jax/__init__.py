"""Sparse Mixture-of-Experts for JAX: no padding, no grouped copies."""

from scattermoe_jax import nn
from scattermoe_jax._version import __version__
from scattermoe_jax.kernels import report
from scattermoe_jax.ops import (
  ACTIVATIONS,
  Activation,
  clamped_swiglu,
  combine,
  parallel_linear,
  remat_policy,
  smoe_mlp,
)
from scattermoe_jax.routing import Routing, route

__all__ = [
  "ACTIVATIONS",
  "Activation",
  "Routing",
  "__version__",
  "clamped_swiglu",
  "combine",
  "nn",
  "parallel_linear",
  "remat_policy",
  "report",
  "route",
  "smoe_mlp",
]
