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
    band_n: column tiles that are multiplied side by side before the next
      rows; 0 for all of them. Blocks at work at one time then share rows and
      weights in the L2.
    num_sms: blocks of a persistent launch.
  """

  block_m: int = 128
  block_n: int = 128
  block_k: int = 64
  num_stages: int = 4
  band_n: int = 0
  num_sms: int = 132
