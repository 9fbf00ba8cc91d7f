"""Sparse Mixture-of-Experts for JAX: no padding, no grouped copies."""

from scattermoe_jax import nn as nn
from scattermoe_jax._version import __version__ as __version__
from scattermoe_jax.kernels import report as report
from scattermoe_jax.ops import ACTIVATIONS as ACTIVATIONS
from scattermoe_jax.ops import Activation as Activation
from scattermoe_jax.ops import clamped_swiglu as clamped_swiglu
from scattermoe_jax.ops import combine as combine
from scattermoe_jax.ops import parallel_linear as parallel_linear
from scattermoe_jax.ops import remat_policy as remat_policy
from scattermoe_jax.ops import smoe_mlp as smoe_mlp
from scattermoe_jax.routing import Routing as Routing
from scattermoe_jax.routing import route as route
