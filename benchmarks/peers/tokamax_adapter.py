"""tokamax's grouped products, with gathers and a sum in plain JAX."""

import jax
import jax.numpy as jnp

from benchmarks.peers import Step
from scattermoe_jax.routing import input_rows, route


def build(shape, data, direction: str) -> Step:
  """Returns the step, differentiated by JAX."""
  import tokamax

  from benchmarks.bench_mlp import jax_step

  def layer(x, gates, w_in, w_out, expert_ids):
    routing = route(expert_ids, shape.num_experts)
    sizes = routing.group_sizes
    rows = x[input_rows(routing, x.shape[0], grouped=False)]
    gate, up = jnp.split(tokamax.ragged_dot(rows, w_in, sizes), 2, axis=-1)
    y = tokamax.ragged_dot(jax.nn.silu(gate) * up, w_out, sizes)
    choices = y[routing.grouped_ids].astype(gates.dtype)
    return jnp.sum(gates[:, :, None] * choices, axis=1).astype(x.dtype)

  return jax_step(layer, data, direction)
