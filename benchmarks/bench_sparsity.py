"""Does the cost of a layer follow the experts that a token meets, not E?

  python -m benchmarks.bench_sparsity [--implementations ...] [--write]

T = 16384 tokens, d = 4096, n = 1024, E = 64, k = 1, 2, 4, 8, 16, 30.
Implementations, checks and flags are those of `benchmarks.bench_mlp`.
Source: ScatterMoE (Tan et al., 2024), its study of sparsity.
"""

import functools

from benchmarks import bench_mlp
from benchmarks.shapes import SPARSITY

main = functools.partial(
  bench_mlp.main,
  doc=__doc__,
  bench="bench_sparsity",
  shapes=SPARSITY,
  # Peers if named; what chunks cost is the question of `bench_memory`.
  implementations=("scattermoe_jax", "dense"),
)

if __name__ == "__main__":
  main()
