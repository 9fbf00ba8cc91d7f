"""The layers that benchmarks of the SMoE MLP measure, and their steps.

A step takes `Inputs` and returns y, or y and the gradients of x, gates and both
weights; `benchmarks.layer_truth` says whether they are right.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

from benchmarks import baselines
from benchmarks.compiling import Job, abstract, compile_together
from benchmarks.peers import Layer, Step
from benchmarks.shapes import Shape, expert_ids, normal_array
from scattermoe_jax.ops import smoe_mlp
from scattermoe_jax.routing import route

_CHUNKS = 4
# The widest tile of the kernels: a narrower slice is multiplied as wide.
_TILE_COLUMNS = 256


class Inputs(NamedTuple):
  """What a step is given; `dy` is the gradient of y."""

  x: jax.Array
  gates: jax.Array
  w_in: jax.Array
  w_out: jax.Array
  expert_ids: jax.Array
  dy: jax.Array


def inputs(shape: Shape, routing: str) -> Inputs:
  """Returns normal data in bfloat16, gates in float32, and who goes where."""
  rows = (shape.num_tokens, shape.d_model)
  experts, d, n = shape.num_experts, shape.d_model, shape.d_expert
  gates = normal_array(1, rows[0], shape.top_k, dtype=jnp.float32)
  return Inputs(
    normal_array(0, *rows),
    jax.nn.softmax(gates),
    normal_array(2, experts, d, 2 * n) * jnp.bfloat16(d**-0.5),
    normal_array(3, experts, n, d) * jnp.bfloat16(n**-0.5),
    expert_ids(shape, routing),
    normal_array(4, *rows),
  )


def step_of(layer: Layer, direction: str):
  """Returns a step of `layer(x, gates, w_in, w_out, expert_ids)`."""

  def step(x, gates, w_in, w_out, ids, dy):
    forward = functools.partial(layer, expert_ids=ids)
    if direction == "forward":
      return (forward(x, gates, w_in, w_out),)
    y, backward = jax.vjp(forward, x, gates, w_in, w_out)
    # As where dy is made from y: no part of the forward waits for the backward.
    y, dy = lax.optimization_barrier((y, dy))
    return y, *backward(dy)

  return step


def jax_steps(
  layers: Mapping[str, Layer], data: Inputs, directions: Sequence[str]
) -> dict[tuple[str, str], Step]:
  """Returns the steps of layers by name and direction, compiled together."""
  made = compile_together(step_jobs(layers, abstract(data), directions))
  return {
    key: compiled_step(future.result(), layers[key[0]], data, key[1])
    for key, future in made.items()
  }


def step_jobs(
  layers: Mapping[str, Layer], shapes: Inputs, directions: Sequence[str]
) -> dict[tuple[str, str], Job]:
  """Returns what to compile, by name and direction."""
  return {
    (name, direction): Job(step_of(layer, direction), tuple(shapes))
    for name, layer in layers.items()
    for direction in directions
  }


def compiled_step(
  compiled: jax.stages.Compiled, layer: Layer, data: Inputs, direction: str
) -> Step:
  """Returns a compiled step of a layer, and what it says of its memory."""
  memory = compiled.memory_analysis()
  return Step(
    functools.partial(compiled, *data),
    memory.temp_size_in_bytes + memory.output_size_in_bytes,
    held_bytes(layer, abstract(data)) if direction != "forward" else None,
  )


def held_bytes(layer: Layer, data: Inputs) -> int:
  """Returns the bytes that `jax.vjp` of the layer keeps beside its inputs."""

  def residuals(x, gates, w_in, w_out, ids):
    forward = functools.partial(layer, expert_ids=ids)
    return jax.vjp(forward, x, gates, w_in, w_out)[1]

  traced = jax.make_jaxpr(residuals)(*data[:5]).jaxpr
  # Each array once, and only what is none of the inputs.
  kept = {v for v in traced.outvars if isinstance(v, jax.extend.core.Var)}
  kept -= set(traced.invars)
  return sum(int(v.aval.size) * v.aval.dtype.itemsize for v in kept)


def ours(num_experts: int, backend: str | None, num_chunks: int = 1) -> Layer:
  """Returns the library's layer."""

  def layer(x, gates, w_in, w_out, expert_ids):
    routing = route(expert_ids, num_experts)
    return smoe_mlp(
      x,
      gates,
      routing,
      w_in,
      w_out,
      num_chunks=num_chunks,
      implementation=backend,
    )

  return layer


def chunks_of(width: int) -> int:
  """Returns the most chunks, at most four, of whole tiles; four if none are.

  Example:
    >>> chunks_of(4096), chunks_of(1536)
    (4, 3)
  """
  few = [count for count in whole_chunks(width) if count <= _CHUNKS]
  return max(few, default=_CHUNKS)


def whole_chunks(width: int) -> list[int]:
  """Returns in how many chunks of whole tiles a width can be cut, from two.

  Example:
    >>> whole_chunks(1536)
    [2, 3, 6]
  """
  tiles = width // _TILE_COLUMNS
  counts = range(2, tiles + 1) if tiles * _TILE_COLUMNS == width else ()
  return [count for count in counts if tiles % count == 0]


def composed(num_experts: int) -> Layer:
  """Returns the layer of `baselines.composed_mlp`."""

  def layer(x, gates, w_in, w_out, expert_ids):
    routing = route(expert_ids, num_experts)
    return baselines.composed_mlp(x, gates, routing, w_in, w_out)

  return layer


def own_layers(
  shape: Shape, implementations: Sequence[str], backend: str | None
) -> dict[str, Layer]:
  """Returns the layers in JAX that need no installing, by name."""
  known = {
    "scattermoe_jax": ours(shape.num_experts, backend),
    "scattermoe_jax_chunked": ours(
      shape.num_experts, backend, chunks_of(shape.d_model)
    ),
    "composed": composed(shape.num_experts),
  }
  return {name: known[name] for name in implementations if name in known}
