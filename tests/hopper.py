"""What tests of the Hopper kernels share: a device to lower for, and ids."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from scattermoe_jax.routing import route


def h200():
  """Returns a context in which the device is an H200."""
  device = AbstractDevice("NVIDIA H200", 132, "cuda")
  return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lowered(function, *args):
  """Returns the text of a function lowered for an H200."""
  with h200():
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def kernel_calls(text):
  """Returns the lines of a lowered program that call a Mosaic kernel."""
  return [line for line in text.splitlines() if "call @mosaic_gpu" in line]


def distinct_ids(rng, num_tokens, k, num_experts, skew=0.0):
  weight = -skew * np.log1p(np.arange(num_experts))
  noise = rng.gumbel(size=(num_tokens, num_experts)) + weight
  return np.argsort(-noise, axis=1)[:, :k].astype(np.int32)


def distinct_or_nowhere(num_tokens, k, num_experts, skew, not_here):
  """Returns ids of which a part is 'not here', and their routing."""
  rng = np.random.default_rng(0)
  ids = distinct_ids(rng, num_tokens, k, num_experts, skew)
  ids = np.where(rng.random(ids.shape) < not_here, num_experts, ids)
  return ids, route(jnp.asarray(ids), num_experts)
