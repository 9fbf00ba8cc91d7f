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
    ping_pong: whether the two warpgroups that multiply take turns, each with
      its own tile and its own stages, so that one stores while the other
      multiplies; else they share each tile, half of its rows each.
    band_m: row tiles that are multiplied side by side before the next columns,
      so that blocks at work at one time share rows and weights in the L2.
    num_sms: blocks of a persistent launch.
  """

  block_m: int = 128
  block_n: int = 128
  block_k: int = 64
  num_stages: int = 4
  ping_pong: bool = False
  band_m: int = 1
  num_sms: int = 132
