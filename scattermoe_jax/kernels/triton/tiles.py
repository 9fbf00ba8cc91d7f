"""Blocks, warps and stages by shape and compute capability: pure functions."""

import dataclasses

from scattermoe_jax.kernels.schedule import max_tiles

# Shared memory that one program can have, in KiB, by compute capability.
# Source: CUDA C programming guide, technical specifications.
_SHARED_KIB = {
  (8, 0): 163,
  (8, 7): 163,
  (9, 0): 227,
  (10, 0): 227,
  (10, 3): 227,
  (11, 0): 227,
}
_SHARED_KIB_ELSE = 99
# What three steps of a tile of 256 columns take, and some more.
_WIDE_BYTES = 150 * 1024

# A part of the contraction below this is all prologue.
_LEAST_CONTRACTION = 256

# From so many tiles a core, programs walk from tile to tile.
_TILES_TO_WALK = 4


@dataclasses.dataclass(frozen=True)
class TritonConfig:
  """The blocks of one launch, and what Triton wants to know besides.

  Attributes:
    block_m: rows of one tile of the output.
    block_n: columns of one tile of the output.
    block_k: contraction of one pipeline step.
    num_stages: pipeline steps in flight.
    num_warps: warps of one program.
    split_k: parts of the contraction, each a program of its own;
      `scatter2scatter` only.
    num_programs: programs that walk over all tiles; None for a program each.
      `scatter2scatter` only.
  """

  block_m: int = 128
  block_n: int = 128
  block_k: int = 64
  num_stages: int = 3
  num_warps: int = 4
  split_k: int = 1
  num_programs: int | None = None


def shared_bytes(config: TritonConfig, itemsize: int) -> int:
  """Returns the shared memory of the pipeline's operand tiles."""
  tile = (config.block_m + config.block_n) * config.block_k * itemsize
  return tile * config.num_stages


def shared_limit(capability: tuple[int, int]) -> int:
  """Returns the bytes of shared memory that one program can have."""
  return 1024 * _SHARED_KIB.get(capability, _SHARED_KIB_ELSE)


def scatter2scatter_config(
  num_rows: int,
  num_experts: int,
  d_in: int,
  d_out: int,
  itemsize: int,
  *,
  capability: tuple[int, int],
  num_cores: int,
  grouped_in: bool = False,
) -> TritonConfig:
  """Returns the blocks of `scatter2scatter` for a shape and a device.

  block_m is such that most groups are one tile if they are short: then every
  weight is read once. Below 128 rows that reading is all that counts, and what
  speeds it up is loads in flight: many short steps, or parts of the contraction
  where there are too few tiles for the device. Many large tiles are walked over
  by a program per core. Measured on an H200; elsewhere made to fit.
  """
  mean = -(-num_rows // num_experts)
  block_m = min(max(_power_of_two(mean + mean // 2), 16), 128)
  if block_m < 64:
    config = TritonConfig(block_m, 128, 32, num_stages=8, num_warps=4)
  elif block_m < 128:
    config = _middling(d_out, itemsize, grouped_in)
  else:
    config = _large(itemsize, capability)
  block_n = min(config.block_n, max(_power_of_two(d_out), 16))
  config = dataclasses.replace(config, block_n=block_n)
  tiles = max_tiles(num_rows, num_experts, block_m)
  programs = tiles * -(-d_out // block_n)
  split_k = 1
  # A program a core streams at full speed; parts cost a pass over their sums.
  while (
    4 * programs * split_k < 3 * num_cores
    and d_in >= 2 * split_k * _LEAST_CONTRACTION
  ):
    split_k *= 2
  config = dataclasses.replace(config, split_k=split_k)
  config = _fit(config, itemsize, capability)
  # Walking gives up what a core gains from two programs at a time, so it is
  # for tiles of which a core holds one. One more stage is then worth its room.
  one_a_core = 2 * shared_bytes(config, itemsize) > shared_limit(capability)
  if block_m == 128 and one_a_core and programs >= _TILES_TO_WALK * num_cores:
    walks = dataclasses.replace(
      config, num_stages=config.num_stages + 1, num_programs=num_cores
    )
    return _fit(walks, itemsize, capability)
  return config


def group_xty_config(
  d_in: int,
  d_out: int,
  itemsize: int,
  *,
  capability: tuple[int, int],
  is_gathered: bool = False,
) -> TritonConfig:
  """Returns the blocks of `group_xty` for a shape and a device.

  Where rows are gathered, Triton loads ids in the first half of the stages and
  the rows that they name in the second: 2 s stages hold s steps of rows.
  """
  is_wide = itemsize == 2 and shared_limit(capability) >= _WIDE_BYTES
  block_n = min(256 if is_wide else 128, max(_power_of_two(d_out), 16))
  config = TritonConfig(
    block_m=min(128, max(_power_of_two(d_in), 16)),
    block_n=block_n,
    block_k=64 if itemsize == 2 else 32,
    num_stages=3,
    num_warps=8 if itemsize > 2 or block_n > 128 else 4,
  )
  config = _fit(config, itemsize, capability)
  stages = config.num_stages
  return dataclasses.replace(
    config, num_stages=2 * stages if is_gathered else stages
  )


def _middling(d_out: int, itemsize: int, grouped_in: bool) -> TritonConfig:
  """Returns the blocks for about 32 rows per expert."""
  if itemsize == 2 and d_out >= 2048 and not grouped_in:
    # A wide tile gathers each row half as often.
    return TritonConfig(64, 256, 64, num_stages=2, num_warps=4)
  return TritonConfig(64, 128, 64, num_stages=4, num_warps=4)


def _large(itemsize: int, capability: tuple[int, int]) -> TritonConfig:
  """Returns the blocks for many rows per expert."""
  if itemsize > 2:
    return TritonConfig(128, 128, 32, num_stages=3, num_warps=8)
  if shared_limit(capability) < _WIDE_BYTES:
    return TritonConfig(128, 128, 32, num_stages=4, num_warps=4)
  return TritonConfig(128, 256, 64, num_stages=3, num_warps=8)


def _fit(
  config: TritonConfig, itemsize: int, capability: tuple[int, int]
) -> TritonConfig:
  """Returns the config with as many stages as shared memory holds."""
  stage = shared_bytes(dataclasses.replace(config, num_stages=1), itemsize)
  num_stages = min(config.num_stages, shared_limit(capability) // stage)
  return dataclasses.replace(config, num_stages=num_stages)


def _power_of_two(n: int) -> int:
  """Returns the smallest power of two that is at least n."""
  return 1 << max(n - 1, 0).bit_length()
