"""Rotary position embedding, plain and stretched to longer contexts."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scattermoe_jax.nn import checks


class RopeScaling(NamedTuple):
  """YaRN: fast rotations stay, slow ones are slowed down by `factor`.

  Attributes:
    factor: how many times longer the context is than in pre-training.
    original_max_positions: the context of pre-training.
    beta_fast: rotations over that context above which a frequency stays.
    beta_slow: rotations below which it is divided by `factor`.
    truncate: whether the two bounds are rounded outwards to whole dimensions.
    attention_factor: multiplies cosine and sine; None for 0.1 ln(factor) + 1.

  Source: YaRN (Peng et al., 2023, arXiv 2309.00071), section 3.2.
  """

  factor: float
  original_max_positions: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None


def rotary_embedding(
  x: Float[Array, "B L h d_head"],
  positions: Int[Array, "B L"],
  *,
  theta: float = 10000.0,
  scaling: RopeScaling | None = None,
) -> Float[Array, "B L h d_head"]:
  """Returns x with its pairs (x[i], x[i + d_head / 2]) turned by p theta_i.

    theta_i = theta^(-2 i / d_head)        p = position

  Args:
    x: queries or keys.
    positions: of the tokens.
    theta: the base of the frequencies.
    scaling: for contexts beyond pre-training's.

  Returns:
    The dtype of x; the angles are float32, so exact up to 2^24 positions.

  Raises:
    ValueError: if shapes disagree, d_head is odd, theta is not above 0 (1 with
      a scaling), or a number of the scaling is not above 0.

  Source: RoFormer (Su et al., 2021, arXiv 2104.09864), in the half-split order
  of GPT-NeoX and Llama.
  """
  function = "rotary_embedding"
  checks.check_shape(function, "x", x, ("B", "L", "h", "d_head"))
  checks.check_array(function, "positions", positions)
  checks.check_ids(function, x.shape[:2], positions=positions)
  checks.check_positive(function, theta=theta)
  if scaling is not None:
    _check_scaling(function, theta, scaling)
  frequencies, magnitude = _frequencies(x.shape[-1], theta, scaling)
  wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
  angles = positions[:, :, None].astype(wide) * jnp.asarray(
    frequencies, wide
  ).reshape(1, 1, -1)
  cos = jnp.cos(angles)[:, :, None, :] * magnitude
  sin = jnp.sin(angles)[:, :, None, :] * magnitude
  first, second = jnp.split(x.astype(wide), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _check_scaling(function: str, theta: float, scaling: RopeScaling) -> None:
  """Raises unless there are logarithms of the numbers, and a quotient."""
  names = ("factor", "original_max_positions", "beta_fast", "beta_slow")
  numbers = {f"scaling.{name}": getattr(scaling, name) for name in names}
  checks.check_positive(function, **numbers)
  if theta <= 1:
    raise ValueError(
      f"{function}: theta must be above 1 with a scaling, got {theta}; no "
      "rotation is slower than another. Pass pre-training's theta, or "
      "scaling=None."
    )


def _frequencies(
  d_head: int, theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
  """Returns theta_i for i in [0, d_head / 2), and what multiplies cos, sin."""
  if d_head % 2:
    raise ValueError(
      f"rotary_embedding: d_head = {d_head} is odd; it turns pairs."
    )
  frequencies = theta ** (-np.arange(0, d_head, 2) / d_head)
  if scaling is None:
    return frequencies, 1.0
  # The dimension whose frequency turns `rotations` times over the context.
  bounds = [
    d_head
    * math.log(scaling.original_max_positions / (rotations * 2 * math.pi))
    / (2 * math.log(theta))
    for rotations in (scaling.beta_fast, scaling.beta_slow)
  ]
  if scaling.truncate:
    bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
  low, high = max(bounds[0], 0), min(bounds[1], d_head - 1)
  high = high if high != low else high + 0.001
  slowed = np.clip((np.arange(d_head // 2) - low) / (high - low), 0, 1)
  frequencies = frequencies * (1 - slowed + slowed / scaling.factor)
  magnitude = scaling.attention_factor
  if magnitude is None:
    magnitude = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
  return frequencies, magnitude
