"""The best that JAX's own kernels make: tokamax's products, Pallas's dW.

tokamax 0.0.17's weight gradient on Hopper is wrong on JAX 0.11.2, so that JAX's
`transposed_ragged_dot_mgpu` takes its place. Rows are gathered and combined by
plain JAX, forward and backward, as this library's public ops do.
"""

import jax
import jax.numpy as jnp

from benchmarks.layer_steps import jax_steps
from benchmarks.peers import Layer, Step
from scattermoe_jax.ops.combine import combine
from scattermoe_jax.ops.rows import repeat_tokens
from scattermoe_jax.routing import route

# The fastest of a sweep on an H200: 646 TFLOP/s of one product, default 281.
_TILES = {"block_m": 128, "block_n": 128, "block_k": 64}
_STAGES = 4
_BAND = 8
_NOTE = f"tiles {_TILES}, {_STAGES} stages, band {_BAND}; dW by JAX's Pallas"


def build(shape, data, direction: str) -> Step:
  """Returns the step, differentiated by JAX but for the products."""
  steps = jax_steps({"tokamax": layer(shape)}, data, [direction])
  return steps["tokamax", direction]._replace(note=_NOTE)


def layer(shape) -> Layer:
  """Returns the layer."""
  multiply = products()

  def forward(x, gates, w_in, w_out, expert_ids):
    routing = route(expert_ids, shape.num_experts)
    rows = repeat_tokens(x, routing)
    gate, up = jnp.split(multiply(rows, w_in, routing.group_sizes), 2, axis=-1)
    a = jax.nn.silu(gate) * up
    y = multiply(a, w_out, routing.group_sizes)
    return combine(y, gates, routing)

  return forward


def products():
  """Returns rows (S, d), w (E, d, n), group sizes -> (S, n), with gradients."""
  from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu
  from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu

  config = pallas_mosaic_gpu.Config(
    **_TILES,
    num_stages=_STAGES,
    split_k=1,
    persistent=True,
    grid_minor_dim=pallas_mosaic_gpu.common.MatmulDimension.N,
    grid_tile_width=_BAND,
  )
  ragged_dot = pallas_mosaic_gpu.PallasMosaicGpuRaggedDot(config=config)

  @jax.custom_vjp
  def multiply(rows, w, sizes):
    return ragged_dot(rows, w, group_sizes=sizes)

  def backward(residuals, dy):
    rows, w, sizes = residuals
    drows = ragged_dot(dy, jnp.swapaxes(w, 1, 2), group_sizes=sizes)
    dw = transposed_ragged_dot_mgpu.transposed_ragged_dot(
      rows,
      dy,
      group_sizes=sizes,
      **_TILES,
      max_concurrent_steps=_STAGES,
      grid_block_n=1,
    )
    return drows, dw, None

  multiply.defvjp(
    lambda rows, w, sizes: (multiply(rows, w, sizes), (rows, w, sizes)),
    backward,
  )
  return multiply
