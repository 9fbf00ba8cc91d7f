"""Activations of an expert, each with its derivative in the same few lines.

Written as (value, derivative) pairs of elementwise arithmetic, so that the same
lines run in XLA, in a kernel's epilogue and in the backward's. With a gate, the
pre-activation h = [g, u] holds the gate half first and a = f(g) * u.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scattermoe_jax.kernels import accumulator_dtype

# f(z) -> (f(z), df/dz)
ValueAndSlope = Callable[[Array], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Activation:
  """An elementwise function of the pre-activation, gated or not.

  Attributes:
    name: what users call it.
    value_and_slope: f and its derivative, as a pair.
    gated: whether h is [g, u] and a = f(g) * u; else a = f(h).
    limit: clamps g to at most this and u to at most this in magnitude; gated
      only. Gradients are zero where clamped.
    up_offset: added to u, after the clamp; gated only.
    is_exponential: whether `value_and_slope` is made of arithmetic, exp and
      sigmoid alone. A kernel then takes the device's own exp, which is off by
      2e-7 of its value, and by as much again for each 1 of its argument.

  Example:
    >>> square = Activation("square", lambda z: (z * z, 2 * z))
    >>> square.apply(jnp.array([[3.0]])).tolist()
    [[9.0]]
  """

  name: str
  value_and_slope: ValueAndSlope
  gated: bool = False
  limit: float | None = None
  up_offset: float = 0.0
  is_exponential: bool = False

  def __post_init__(self):
    """Raises ValueError where a field of gated ones is set without a gate."""
    if not self.gated and (self.limit is not None or self.up_offset):
      raise ValueError(
        f"Activation: limit = {self.limit} and up_offset = {self.up_offset} "
        "are for gated = True, got gated = False; clamp in value_and_slope."
      )

  def apply(self, h: Float[Array, "*rows m"]) -> Float[Array, "*rows n"]:
    """Returns a, computed in float32 or wider, in the dtype of h."""
    wide = h.astype(accumulator_dtype(h.dtype))
    if self.gated:
      return self.of_gate(*jnp.split(wide, 2, axis=-1)).astype(h.dtype)
    return self.value_and_slope(wide)[0].astype(h.dtype)

  def value_and_vjp(
    self, h: Float[Array, "*rows m"], da: Float[Array, "*rows n"]
  ) -> tuple[Float[Array, "*rows n"], Float[Array, "*rows m"]]:
    """Returns (a, dh) for the gradient da of a, in the dtype given."""
    if self.gated:
      g, u = jnp.split(h, 2, axis=-1)
      a, dg, du = self.of_gate_and_vjp(g, u, da)
      return a, jnp.concatenate([dg, du], axis=-1)
    a, slope = self.value_and_slope(h)
    return a, da * slope

  def of_gate(self, g: Array, u: Array) -> Array:
    """Returns a = f(g) * u, clamped and offset as the fields say."""
    g, up = self._clamp(g, u)
    return self.value_and_slope(g)[0] * up

  def of_gate_and_vjp(
    self, g: Array, u: Array, da: Array
  ) -> tuple[Array, Array, Array]:
    """Returns (a, dg, du): dg = da u f'(g), du = da f(g)."""
    clamped_g, up = self._clamp(g, u)
    value, slope = self.value_and_slope(clamped_g)
    dg, du = da * up * slope, da * value
    if self.limit is not None:
      dg = jnp.where(g <= self.limit, dg, jnp.zeros_like(dg))
      du = jnp.where(jnp.abs(u) <= self.limit, du, jnp.zeros_like(du))
    return value * up, dg, du

  def _clamp(self, g: Array, u: Array) -> tuple[Array, Array]:
    """Returns (g, u), clamped, and u offset."""
    if self.limit is not None:
      g = jnp.minimum(g, self.limit)
      u = jnp.maximum(jnp.minimum(u, self.limit), -self.limit)
    # Adding zero would be an addition: it turns -0 to 0.
    return g, (u + self.up_offset if self.up_offset else u)


def clamped_swiglu(alpha: float = 1.702, limit: float = 7.0) -> Activation:
  """Returns gpt-oss's a = (u + 1) g sigmoid(alpha g), with g and u clamped.

  Source: transformers, GptOssExperts (alpha and limit as released).
  """
  return Activation(
    name="clamped_swiglu",
    value_and_slope=_swish(alpha),
    gated=True,
    limit=limit,
    up_offset=1.0,
    is_exponential=True,
  )


def get_activation(
  activation: str | Activation,
  *,
  gated: bool,
  function: str = "get_activation",
) -> Activation:
  """Returns the activation of that name, gated or not.

  Args:
    activation: a name in `ACTIVATIONS`, or an `Activation`.
    gated: whether the weights have a gate half.
    function: who asks, for the message.

  Raises:
    ValueError: if the name is unknown, or the activation needs a gate that the
      weights lack, or the other way round.
    TypeError: if an activation's function returns no pair.
  """
  if isinstance(activation, Activation):
    _check_pair(activation, function)
  else:
    if activation not in ACTIVATIONS:
      raise ValueError(
        f"{function}: activation must be one of {ACTIVATIONS} or an "
        f"Activation, got {activation!r}; SwiGLU is 'silu' with a gate."
      )
    if activation == "clamped_swiglu":
      activation = clamped_swiglu()
    else:
      activation = _NAMED[activation, gated]
  if activation.gated != gated:
    needs = "w_in of width 2n" if activation.gated else "w_in of width n"
    raise ValueError(
      f"{function}: activation {activation.name!r} needs {needs}: w_in has the "
      f"width of a {'gated' if gated else 'plain'} one; `gated` of "
      "the activation and of the layer must agree."
    )
  return activation


def _check_pair(activation: Activation, function: str) -> None:
  # Of an array, the first row would be taken for f.
  z = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  made = jax.eval_shape(activation.value_and_slope, z)
  is_pair = isinstance(made, tuple) and len(made) == 2
  if not is_pair or made[0].shape != z.shape:
    raise TypeError(
      f"{function}: value_and_slope of activation {activation.name!r} must "
      f"return the pair (f(z), df/dz), f(z) of z's shape; for {z} it returned "
      f"{made}. Of a function f alone: "
      "lambda z: jax.jvp(f, (z,), (jnp.ones_like(z),))."
    )


# Cached, so that activations of equal values are equal: they are static
# arguments, and two unequal ones would trace twice.
@functools.cache
def _swish(beta: float) -> ValueAndSlope:
  def value_and_slope(z):
    sigmoid = jax.nn.sigmoid(z * beta)
    value = z * sigmoid
    return value, sigmoid + value * beta * (1 - sigmoid)

  return value_and_slope


def _gelu_tanh(z):
  # z (1 + tanh(c (z + b z^3))) / 2, and (1 + tanh x) / 2 is sigmoid(2 x).
  c, b = math.sqrt(2 / math.pi), 0.044715
  square = z * z
  sigmoid = jax.nn.sigmoid(2 * c * z * (1 + b * square))
  value = z * sigmoid
  slope = sigmoid + value * (1 - sigmoid) * (2 * c) * (1 + 3 * b * square)
  return value, slope


def _gelu(z):
  # z Phi(z), Phi the normal distribution function
  phi = 0.5 * (1 + jax.lax.erf(z * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
  return z * phi, phi + z * density


def _relu(z):
  return jnp.maximum(z, 0), jnp.where(z > 0, jnp.ones_like(z), 0)


def _relu2(z):
  positive = jnp.maximum(z, 0)
  return positive * positive, 2 * positive


def _identity(z):
  return z, jnp.ones_like(z)


_FUNCTIONS = {
  "silu": _swish(1.0),
  "gelu": _gelu,
  "gelu_tanh": _gelu_tanh,
  "relu": _relu,
  "relu2": _relu2,
  "identity": _identity,
}
_EXPONENTIAL = ("silu", "gelu_tanh")
_NAMED = {
  (name, gated): Activation(
    name, function, gated, is_exponential=name in _EXPONENTIAL
  )
  for name, function in _FUNCTIONS.items()
  for gated in (False, True)
}

ACTIVATIONS = (*_FUNCTIONS, "clamped_swiglu")
