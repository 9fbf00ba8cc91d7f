"""Blocks, warps and stages by shape and compute capability: pure functions."""

import dataclasses

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
  """

  block_m: int = 128
  block_n: int = 128
  block_k: int = 64
  num_stages: int = 3
  num_warps: int = 4
  split_k: int = 1


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
) -> TritonConfig:
  """Returns the blocks of `scatter2scatter` for a shape and a device."""
  mean = -(-num_rows // num_experts)
  block_m = min(max(_power_of_two(mean + mean // 2), 16), 128)
  if block_m == 128:
    config = TritonConfig(128, min(256, _power_of_two(d_out)), 64, 3, 8)
  else:
    config = TritonConfig(block_m, min(128, _power_of_two(d_out)), 64, 4, 4)
  config = dataclasses.replace(config, block_n=max(config.block_n, 16))
  tiles = min(num_rows, -(-num_rows // block_m) + num_experts - 1)
  programs = tiles * -(-d_out // config.block_n)
  split = 1
  while programs * split < 2 * num_cores and d_in >= 8 * 64 * split:
    split *= 2
  config = dataclasses.replace(config, split_k=split)
  return _fit(config, d_in, itemsize, capability)


def group_xty_config(
  d_in: int, d_out: int, itemsize: int, *, capability: tuple[int, int]
) -> TritonConfig:
  """Returns the blocks of `group_xty` for a shape and a device."""
  config = TritonConfig(
    max(16, min(128, _power_of_two(d_in))),
    max(16, min(128, _power_of_two(d_out))),
    64,
    3,
    4,
  )
  return _fit(config, 64, itemsize, capability)


def _fit(config, d_in, itemsize, capability):
  limit = shared_limit(capability)
  while shared_bytes(config, itemsize) > limit:
    if config.num_stages > 2:
      config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    elif config.block_k > 32:
      config = dataclasses.replace(config, block_k=config.block_k // 2)
    else:
      config = dataclasses.replace(config, block_n=config.block_n // 2)
  return config


def _power_of_two(n: int) -> int:
  """Returns the smallest power of two that is at least n."""
  return 1 << max(n - 1, 0).bit_length()
