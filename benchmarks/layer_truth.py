"""Whether the steps of an SMoE MLP are right: their results beside float32's.

Samples of them: y and the gradients of x and gates for some tokens, and rows of
the weight gradients of one expert.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.compiling import Job
from benchmarks.layer_steps import Inputs, compiled_step, inputs, step_jobs
from benchmarks.peers import Layer, Step
from benchmarks.shapes import Shape
from tests.accuracy import assert_accurate

_CHECKED_TOKENS = 8
_CHECKED_ROWS = 64


class Truth(NamedTuple):
  """Samples of y and all gradients: in float32, and in the inputs' dtype.

  Attributes:
    expert: whose weight gradients they are; its group is a middling one.
    truth: y, dx and dgates of some tokens, some rows of dw_in and dw_out.
    baseline: the same by plain XLA.
  """

  expert: jax.Array
  truth: tuple[jax.Array, ...]
  baseline: tuple[jax.Array, ...]


def checked_jobs(
  shape: Shape, layers: Mapping[str, Layer], directions, routing: str
) -> dict[Any, Job]:
  """Returns the steps of layers, their inputs, and what they must return."""
  make = functools.partial(inputs, shape, routing)
  data = jax.eval_shape(make)
  jobs: dict[Any, Job] = step_jobs(layers, data, directions)
  jobs["inputs"] = Job(make, ())
  jobs["truth"] = Job(_truth_of, (data,))
  return jobs


def checked_steps(
  compiled: Mapping[Any, jax.stages.Compiled],
  layers: Mapping[str, Layer],
  directions: Sequence[str],
) -> tuple[Inputs, Truth, dict[tuple[str, str], Step]]:
  """Returns inputs, truth, and the steps of layers, each found right."""
  data = compiled["inputs"]()
  truth = compiled["truth"](data)
  steps = {
    key: compiled_step(compiled[key], layers[key[0]], data, key[1])
    for key in step_jobs(layers, data, directions)
  }
  for step in steps.values():
    check(data, truth, step.call())
  return data, truth, steps


def check(data: Inputs, truth: Truth, results: Sequence[jax.Array]) -> None:
  """Raises AssertionError unless samples of all results are right."""
  sampled = _sampled(data, truth.expert, list(results))
  names = ("y", "dx", "dgates", "dw_in", "dw_out")
  for name, got, right, low in zip(
    names, sampled, truth.truth, truth.baseline, strict=False
  ):
    assert_accurate(got, right, low, err_msg=name)


def _truth_of(data: Inputs) -> Truth:
  experts = data.w_in.shape[0]
  sizes = jnp.zeros((experts,), jnp.int32).at[data.expert_ids].add(1)
  expert = jnp.argsort(sizes)[experts // 2]

  def samples(dtype):
    dtype = jnp.dtype(dtype)
    token = functools.partial(_token_step, data, dtype)
    dw_in, dw_out = _expert_step(data, dtype, expert)
    return (
      *lax.map(token, _tokens(data)),
      dw_in[_rows(dw_in)],
      dw_out[_rows(dw_out)],
    )

  return Truth(expert, samples(jnp.float32), samples(data.x.dtype))


def _token_step(data: Inputs, dtype, token):
  """Returns y, dx and dgates of one token."""
  ids = data.expert_ids[token]
  given = (data.x[token], data.gates[token], data.w_in[ids], data.w_out[ids])

  def layer(x, gates, w_in, w_out):
    dots = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    gate, up = jnp.split(dots("d,kdm->km", x, w_in), 2, axis=-1)
    y = dots("kn,knd->kd", jax.nn.silu(gate) * up, w_out)
    return dots("k,kd->d", gates.astype(y.dtype), y)

  y, backward = jax.vjp(layer, *(a.astype(dtype) for a in given))
  return y, *backward(data.dy[token].astype(dtype))[:2]


def _expert_step(data: Inputs, dtype, expert):
  """Returns dw_in and dw_out of one expert; who is not its, has gate 0."""
  mine = data.expert_ids == expert
  gates = jnp.sum(jnp.where(mine, data.gates, 0.0), axis=1)
  x, gates, dy = (a.astype(dtype) for a in (data.x, gates, data.dy))

  def layer(w_in, w_out):
    dots = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)
    gate, up = jnp.split(dots(x, w_in), 2, axis=-1)
    return gates[:, None] * dots(jax.nn.silu(gate) * up, w_out)

  weights = (data.w_in[expert], data.w_out[expert])
  return jax.vjp(layer, *(w.astype(dtype) for w in weights))[1](dy)


def _tokens(data: Inputs) -> jax.Array:
  return jnp.arange(_CHECKED_TOKENS) * (data.x.shape[0] // _CHECKED_TOKENS)


def _rows(dw: jax.Array) -> np.ndarray:
  return np.linspace(0, dw.shape[0] - 1, _CHECKED_ROWS).astype(np.int32)


@jax.jit
def _sampled(data: Inputs, expert: jax.Array, results):
  """Returns of a step's results what `Truth` has of them."""
  of_tokens = [a[_tokens(data)].astype(data.x.dtype) for a in results[:3]]
  return of_tokens + [a[expert][_rows(a[0])] for a in results[3:]]
