"""The problems that benchmarks name, and who goes where in them."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class Shape(NamedTuple):
  """An SMoE MLP with a gate: T tokens, k of E experts, widths d and n."""

  name: str
  num_tokens: int
  d_model: int
  d_expert: int
  num_experts: int
  top_k: int

  @property
  def num_rows(self) -> int:
    """S = T * k."""
    return self.num_tokens * self.top_k

  @property
  def flops(self) -> int:
    """Of the forward: 6 S d n; the backward takes twice as many."""
    return 6 * self.num_rows * self.d_model * self.d_expert


_SHAPES = (
  # Small enough for a CPU; not a measurement of anything.
  Shape("tiny", 48, 64, 32, 4, 2),
  # The two of the kernels' goals: coarse and fine experts.
  Shape("L", 32768, 4096, 1024, 128, 8),
  Shape("S", 24576, 1536, 256, 128, 8),
  # SonicMoE's own figures (Guo et al., 2025): 7B, 30B and 120B models.
  Shape("C1", 24576, 1536, 256, 128, 8),
  Shape("C2", 32768, 4096, 256, 256, 16),
  Shape("C3", 32768, 4096, 1024, 128, 8),
  # ScatterMoE's (Tan et al., 2024): its unit test, then its study of
  # granularity at an active width of 8192.
  Shape("A", 16384, 4096, 2048, 32, 4),
  Shape("B_8_1", 16384, 4096, 8192, 8, 1),
  Shape("B_16_2", 16384, 4096, 4096, 16, 2),
  Shape("B_64_8", 16384, 4096, 1024, 64, 8),
  Shape("B_128_16", 16384, 4096, 512, 128, 16),
  # Layers of models that people run.
  Shape("mixtral-8x7b", 16384, 4096, 14336, 8, 2),
  Shape("olmoe-1b-7b", 16384, 2048, 1024, 64, 8),
  Shape("granite-3b-a800m", 16384, 1536, 512, 40, 8),
  Shape("qwen3-30b-a3b", 16384, 2048, 768, 128, 8),
  Shape("gpt-oss-20b", 16384, 2880, 2880, 32, 4),
)
# Sparsity: more and more of 64 experts for each token (Tan et al., 2024).
_SPARSITY = tuple(
  Shape(f"E64_k{k}", 16384, 4096, 1024, 64, k) for k in (1, 2, 4, 8, 16, 30)
)
SHAPES = {shape.name: shape for shape in _SHAPES + _SPARSITY}


def in_order(names: Iterable[str]) -> list[str]:
  """Returns the names of shapes, each once, in the order of `SHAPES`."""
  return sorted(set(names), key=list(SHAPES).index)


LAYERS = ("C1", "C2", "C3", "A", "B_8_1", "B_16_2", "B_64_8", "B_128_16")
# Active width 8192, in more and more experts of less and less width.
GRANULARITY = ("B_8_1", "B_16_2", "A", "B_64_8", "B_128_16")
SPARSITY = tuple(shape.name for shape in _SPARSITY)
ROUTINGS = ("random", "zipf", "even")


def expert_ids(
  shape: Shape, routing: str = "random", seed: int = 0
) -> Int[Array, "T k"]:
  """Returns the experts of each token, all different.

  Args:
    shape: the problem.
    routing: "random", the top k of normal logits; "zipf", drawn without
      replacement with odds 1/rank; "even", every expert the same.
    seed: of the draw.
  """
  rows = (shape.num_tokens, shape.num_experts)
  if routing == "even":
    first = jnp.arange(shape.num_tokens, dtype=jnp.int32) * shape.top_k
    ids = first[:, None] + jnp.arange(shape.top_k, dtype=jnp.int32)[None, :]
    return ids % jnp.int32(shape.num_experts)
  key, order = jax.random.split(jax.random.key(seed))
  if routing == "random":
    scores = jax.random.normal(key, rows)
  elif routing == "zipf":
    # Gumbel noise on log-odds: the top k are draws without replacement.
    rank = jax.random.permutation(order, shape.num_experts)
    odds = -jnp.log1p(rank.astype(jnp.float32))
    scores = jax.random.gumbel(key, rows) + odds[None, :]
  else:
    raise ValueError(f"routing must be one of {ROUTINGS}, got {routing!r}.")
  return lax.top_k(scores, shape.top_k)[1].astype(jnp.int32)


def normal(seed: int, *dims: int, dtype=jnp.bfloat16) -> Array:
  """Returns normal data made on the device, without a float32 copy."""
  return jax.jit(lambda: normal_array(seed, *dims, dtype=dtype))()


def normal_array(seed: int, *dims: int, dtype=jnp.bfloat16) -> Array:
  """Returns the same to a program that makes several arrays at once."""
  return jax.random.normal(jax.random.key(seed), dims, dtype)
