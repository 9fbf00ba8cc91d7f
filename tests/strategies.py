"""Routings worth having: the hard ones by name, the rest by hypothesis.

Shapes come from a small set, so that few programs compile; what varies freely
is who goes where.
"""

from collections.abc import Callable
from typing import NamedTuple

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np


class Case(NamedTuple):
  """The shape of a problem; every letter as in the library."""

  num_tokens: int
  top_k: int
  num_experts: int
  d: int
  n: int
  block_m: int = 8

  @property
  def num_rows(self) -> int:
    return self.num_tokens * self.top_k


# S below one block, nothing a multiple of anything; k = E with one token;
# one of everything; and several blocks to an expert.
CASES = (
  Case(3, 2, 5, 12, 10),
  Case(1, 4, 4, 8, 6),
  Case(1, 1, 1, 4, 4),
  Case(24, 3, 6, 20, 9),
)


def even(rng, case):
  """Every expert the same, choices of a token distinct."""
  order = rng.permutation(case.num_experts)
  first = np.arange(case.num_tokens)[:, None] + np.arange(case.top_k)
  return order[first % case.num_experts]


def skewed(rng, case):
  """A few experts get most; some get none."""
  weights = 0.5 ** np.arange(case.num_experts)
  return rng.choice(
    case.num_experts,
    size=(case.num_tokens, case.top_k),
    p=weights / weights.sum(),
  )


def one_expert(rng, case):
  """All rows to one expert; all others are empty."""
  expert = rng.integers(case.num_experts)
  return np.full((case.num_tokens, case.top_k), expert)


def first_and_last(rng, case):
  """Every expert between the first and the last is empty."""
  return (case.num_experts - 1) * rng.integers(
    0, 2, (case.num_tokens, case.top_k)
  )


def ends_on_block_edges(rng, case):
  """Group ends fall on multiples of the block, as far as S allows."""
  return _groups_of(rng, case, case.block_m)


def ends_off_block_edges(rng, case):
  """Each group is one row longer than a block."""
  return _groups_of(rng, case, case.block_m + 1)


def some_not_here(rng, case):
  """A third of the choices are sentinels, of every kind."""
  ids = rng.integers(0, case.num_experts, (case.num_tokens, case.top_k))
  sentinels = np.array([-1, case.num_experts, 2**31 - 1, -(2**31)])
  return np.where(rng.random(ids.shape) < 1 / 3, rng.choice(sentinels), ids)


def none_here(rng, case):
  """Nobody is routed."""
  del rng
  return np.full((case.num_tokens, case.top_k), case.num_experts)


PATTERNS: dict[str, Callable] = {
  f.__name__: f
  for f in (
    even,
    skewed,
    one_expert,
    first_and_last,
    ends_on_block_edges,
    ends_off_block_edges,
    some_not_here,
    none_here,
  )
}


def expert_ids(case: Case, pattern: str, seed: int = 0) -> np.ndarray:
  """Returns (T, k) int32 ids of that pattern."""
  return PATTERNS[pattern](np.random.default_rng(seed), case).astype(np.int32)


@st.composite
def routings(draw, cases=CASES):
  """Draws (case, expert_ids): a named pattern, or any ids at all."""
  case = draw(st.sampled_from(cases))
  named = st.builds(
    lambda pattern, seed: expert_ids(case, pattern, seed),
    st.sampled_from(sorted(PATTERNS)),
    st.integers(0, 99),
  )
  any_ids = hnp.arrays(
    np.int32,
    (case.num_tokens, case.top_k),
    elements=st.integers(-1, case.num_experts),
  )
  return case, draw(st.one_of(named, any_ids))


def _groups_of(rng, case, size):
  groups = np.arange(case.num_rows) // size
  ids = np.minimum(groups, case.num_experts - 1)
  return rng.permutation(ids).reshape(case.num_tokens, case.top_k)
