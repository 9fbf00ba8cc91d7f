"""YaRN's rotary frequencies, against a loop over them in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import nn as smnn
from tests.accuracy import assert_accurate
from tests.conftest import enable_x64

# By what is hard about them: d_head, theta, what stretches the context.
CASES = {
  "gpt-oss": (64, 150000.0, smnn.RopeScaling(32.0, 4096, truncate=False)),
  "rounded": (64, 10000.0, smnn.RopeScaling(4.0, 4096)),
  "bounds": (32, 10000.0, smnn.RopeScaling(8.0, 2048, 16.0, 2.0)),
  "low-below-0": (16, 10000.0, smnn.RopeScaling(4.0, 64)),
  "high-above-half": (16, 100.0, smnn.RopeScaling(2.0, 1000)),
  "high-above-all": (8, 10.0, smnn.RopeScaling(2.0, 10000, 1000.0)),
  "no-ramp": (16, 10000.0, smnn.RopeScaling(4.0, 4)),
  "one-bound": (
    16,
    10000.0,
    smnn.RopeScaling(4.0, 512, 4.0, 4.0, truncate=False),
  ),
  "shrunk": (16, 10000.0, smnn.RopeScaling(0.5, 512)),
  "magnitude": (
    16,
    10000.0,
    smnn.RopeScaling(4.0, 512, attention_factor=0.75),
  ),
}


def slow_yarn(d_head, theta, scaling):
  """Returns the frequency of each pair, and the magnitude, as HF has them."""
  context, ends = scaling.original_max_positions, []
  for rotations in (scaling.beta_fast, scaling.beta_slow):
    # theta^(-2 i / d_head) context = 2 pi rotations, solved for i.
    ratio = np.float64(context) / (2 * np.pi * rotations)
    ends.append(d_head / 2 * np.log(ratio) / np.log(np.float64(theta)))
  first, last = ends
  if scaling.truncate:
    first, last = np.floor(first), np.ceil(last)
  first, last = max(first, 0.0), min(last, d_head - 1.0)
  if first == last:
    last += 0.001
  frequencies = []
  for i in range(d_head // 2):
    fast = np.float64(theta) ** (-2 * i / d_head)
    if i <= first:
      frequencies.append(fast)
    elif i >= last:
      frequencies.append(fast / scaling.factor)
    else:
      share = (i - first) / (last - first)
      frequencies.append((1 - share) * fast + share * fast / scaling.factor)
  magnitude = scaling.attention_factor
  if magnitude is None:
    stretched = scaling.factor > 1
    magnitude = 0.1 * np.log(scaling.factor) + 1 if stretched else 1.0
  return np.array(frequencies), magnitude


@pytest.mark.parametrize(
  ("d_head", "theta", "scaling"), CASES.values(), ids=CASES.keys()
)
def test_yarn_slows_the_slow_rotations(d_head, theta, scaling):
  positions = np.array([[0, 1, 2, 5, 77, 3000]])
  frequencies, magnitude = slow_yarn(d_head, theta, scaling)
  angles = positions[0][:, None] * frequencies
  expected = magnitude * np.concatenate([np.cos(angles), np.sin(angles)], 1)
  with enable_x64():
    # Each pair is (1, 0), which turns into (cos, sin).
    x = np.zeros((1, positions.size, 1, d_head))
    x[..., : d_head // 2] = 1
    got = smnn.rotary_embedding(
      jnp.asarray(x), jnp.asarray(positions), theta=theta, scaling=scaling
    )
    assert got.dtype == jnp.float64
    assert_accurate(got[0, :, 0], expected, None)


def test_yarn_keeps_fast_rotations_and_divides_slow_ones():
  d_head, theta, scaling = CASES["gpt-oss"]
  plain = theta ** (-np.arange(0, d_head, 2) / d_head)
  rotations = scaling.original_max_positions * plain / (2 * np.pi)
  with enable_x64():
    x = np.zeros((1, 1, 1, d_head))
    x[..., : d_head // 2] = 1
    one = jnp.ones((1, 1), jnp.int32)
    turned = smnn.rotary_embedding(
      jnp.asarray(x), one, theta=theta, scaling=scaling
    )
    cos, sin = np.split(np.asarray(turned)[0, 0, 0], 2)
  slowdown = plain / np.arctan2(sin, cos)
  fast, slow = rotations > 32, rotations < 1
  assert fast.any() and slow.any() and not (fast | slow).all()
  np.testing.assert_allclose(slowdown[fast], 1)
  np.testing.assert_allclose(slowdown[slow], 32)
  between = slowdown[~(fast | slow)]
  assert np.all((between > 1) & (between < 32))
