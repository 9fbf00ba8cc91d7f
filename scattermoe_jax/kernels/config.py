"""How a kernel cuts its problem: values, not device queries."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TileConfig:
  """The blocks of one kernel launch.

  Attributes:
    block_m: routed rows of one tile (of the output; for `group_xty`, columns
      of x).
    block_n: output columns of one tile.
    block_k: contraction of one pipeline step.
    num_stages: pipeline steps in flight.
  """

  block_m: int = 128
  block_n: int = 128
  block_k: int = 64
  num_stages: int = 4
