"""x w where x is bfloat16 and w float32, on the tensor cores, w not rounded.

A router's logits decide who is chosen, so w may not be rounded to what tensor
cores multiply (bfloat16 has 8 bits of w's 24, TF32 has 11), and the plain cores
take ten times as long. But three bfloat16 numbers hold a float32 one exactly,

  w = w_1 + w_2 + w_3,    x w = x w_1 + x w_2 + x w_3,

and products of bfloat16 numbers are exact in float32, so that one product of
three times the columns rounds nothing but its sums (those of a tensor core keep
a few bits less than float32's, see docs/kernels.md). The backward splits dy:

  dx = dy w^T = dy_1 w_1^T + dy_1 w_2^T + dy_2 w_1^T    (then bfloat16, as x is)
  dw = x^T dy = x^T dy_1 + x^T dy_2 + x^T dy_3

where dx is off by some 2^-16 of sum |dy| |w|, before it is rounded.

Source: Henry, Tang, Heinecke, Leveraging the bfloat16 Artificial Intelligence
Datatype For Higher-Precision Computations (2019), arXiv 1904.06376.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float32

from scattermoe_jax._compat import Device, vary_over, varying_axes
from scattermoe_jax.ops.derivatives import first_derivative_only


def multiplies_bfloat16(device: Device) -> bool:
  """Returns whether a device has tensor cores for bfloat16."""
  return device.has_capability(8, 0)


def split_dot(
  x: BFloat16[Array, "T d"], w: Float32[Array, "d E"]
) -> Float32[Array, "T E"]:
  """Returns x w in float32, with no operand rounded; differentiable once.

  In reverse mode alone: it has no `jvp`.

  Args:
    x: bfloat16.
    w: float32. What is below 2^-110 may be lost; what rounds to infinity in
      bfloat16, above 3.39e38, gives NaN, as do gradients of that size.
  """
  axes = varying_axes(x, w)
  return _split_dot(vary_over(x, axes), vary_over(w, axes))


@jax.custom_vjp
def _split_dot(x, w):
  return _sum_parts(_dot(x, _parts(w, 3), ((1,), (0,)), w.dtype))


def _forward(x, w):
  return _split_dot(x, w), (x, w)


def _backward(kept, dy):
  x, w, dy = first_derivative_only("split_dot", (*kept, dy))
  dy_parts, w_parts = _parts(dy, 3), _parts(w, 2)
  dx = _dot(
    jnp.concatenate([dy_parts[:, :1], dy_parts[:, :2]], axis=1),
    jnp.concatenate([w_parts, w_parts[:, :1]], axis=1),
    ((1, 2), (1, 2)),
    x.dtype,
  )
  return dx, _sum_parts(_dot(x, dy_parts, ((0,), (0,)), w.dtype))


_split_dot.defvjp(_forward, _backward)


def _parts(a, count: int):
  """Returns (rows, count, columns): bfloat16 numbers whose sum is a."""
  parts = []
  for _ in range(count):
    # Not a pair of casts, which XLA may take for nothing.
    part = lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(jnp.bfloat16))
    a -= part
  return jnp.stack(parts, axis=1)


def _dot(a, b, contracted, dtype):
  """Returns the product of bfloat16 numbers, summed in float32."""
  dimensions = (contracted, ((), ()))

  def on_tensor_cores(a, b):
    # Said, so that no setting for other products changes it.
    default = lax.Precision.DEFAULT
    return lax.dot_general(
      a, b, dimensions, precision=default, preferred_element_type=dtype
    )

  def anywhere(a, b):
    # XLA's CPU lacks some products of bfloat16.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    highest = lax.Precision.HIGHEST
    return lax.dot_general(a, b, dimensions, precision=highest).astype(dtype)

  return lax.platform_dependent(a, b, cuda=on_tensor_cores, default=anywhere)


def _sum_parts(products):
  """Returns the sum over parts, small ones first."""
  return products[:, 0] + (products[:, 1] + products[:, 2])
