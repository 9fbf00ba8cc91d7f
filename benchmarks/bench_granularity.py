"""What do many narrow experts cost beside few wide ones?

  python -m benchmarks.bench_granularity [--implementations ...] [--write]

T = 16384 tokens, d = 4096, k of E = 8 k experts for each, k = 1, 2, 4, 8, 16,
so narrow that a token always meets a width of 8192: the same work throughout.
Implementations, checks and flags are those of `benchmarks.bench_mlp`.
Source: ScatterMoE (Tan et al., 2024), its study of granularity.
"""

import functools

from benchmarks import bench_mlp
from benchmarks.shapes import GRANULARITY

main = functools.partial(
  bench_mlp.main,
  doc=__doc__,
  bench="bench_granularity",
  shapes=GRANULARITY,
  # Peers if named; what chunks cost is the question of `bench_memory`.
  implementations=("scattermoe_jax", "dense"),
)

if __name__ == "__main__":
  main()
