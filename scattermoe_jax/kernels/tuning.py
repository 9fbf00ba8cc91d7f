"""Tiles for a problem: from a table of measurements, else by a rule.

  tuned_config = nearest entry of the table for this compute capability,
                 else the heuristic.

Tables are package data, `tables/sm<major><minor>.json`: each entry is one
problem as it was measured and the tiles that were fastest. None ships yet. All
of this is plain Python on plain values.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.kernels.contract import Problem

# What one grouped product on Hopper is, as far as tiles go: where its rows come
# from, and what its epilogue holds. Problem.d_in and d_out are the widths of w
# for the first four, of x and of y for group_xty.
OPS = (
  "scatter2scatter_gathered",
  "scatter2scatter_grouped",
  "up_projection",
  "down_projection_grad",
  "group_xty_gathered_x",
  "group_xty_gathered_y",
)
# Those that may announce each step before the next is loaded.
_WAITING_FOR_NOTHING = (
  "scatter2scatter_grouped",
  "group_xty_gathered_x",
  "group_xty_gathered_y",
)
# Those whose activation may have a gate. A tile of 64 columns of w would be 32
# of gate and 32 of up, where stores want 64; and up of h, 128 rows of 64
# columns, is loaded in place of a step of w, which would have 64 rows.
_GATED = ("up_projection", "down_projection_grad")
_H200_SMS = 132
# Shared memory of a block on Hopper, less a kilobyte for barriers.
_SHARED_BYTES = 226 * 1024
_BYTES = 2  # of bfloat16 and float16, all that the tensor core takes here
# Two warpgroups store 64 rows by 64 columns at a time, from two buffers each.
_STORE_BYTES = 2 * 2 * 64 * 64 * _BYTES
# Tiles of a weight gradient side by side: 132 blocks make about a square.
_XTY_BAND = 8
# Tiles of columns side by side before the next rows, where all of them together
# are so many that the rows would leave the cache before the last.
_BAND, _MANY_TILES = 12, 24
# A table entry speaks for problems of up to twice or half its sizes.
_REACH = 1.0


class Entry(NamedTuple):
  """One measurement: a problem and the tiles that were fastest."""

  op: str
  rows_per_expert: int
  num_experts: int
  d_in: int
  d_out: int
  config: TileConfig


def tuned_config(op: str, problem: Problem) -> TileConfig:
  """Returns the tiles for `problem`: the table's, else the heuristic's.

  Args:
    op: a name in `OPS`.
    problem: the product; its device says which table, and how many blocks.

  Raises:
    ValueError: if `op` is not a name in `OPS`.
  """
  return lookup(op, problem) or heuristic(op, problem)


def chosen_config(
  op: str, problem: Problem, config: TileConfig | None
) -> TileConfig:
  """Returns the tiles that were asked for, or `tuned_config` if None were.

  Raises:
    ValueError: if `op` cannot run with them.
  """
  if config is None:
    return tuned_config(op, problem)
  if reason := why_invalid(op, config):
    raise ValueError(f"config: {reason}.")
  return config


def heuristic(op: str, problem: Problem) -> TileConfig:
  """Returns tiles by rule, for problems that nobody has measured.

  The widest tile that the columns fill, since the widest reads least; stages
  as many as shared memory holds.
  """
  _check_op(op)
  num_sms = problem.device.num_cores or _H200_SMS
  if op.startswith("group_xty"):
    blocks, band_n = _xty_blocks(op, problem), _XTY_BAND
  else:
    blocks = (128, 256 if problem.d_out > 128 else 128)
    band_n = _BAND if problem.d_out > _MANY_TILES * blocks[1] else 0
  if band_n >= _tiles_of_a_row(op, problem, blocks):
    band_n = 0
  config = TileConfig(*blocks, num_sms=num_sms, band_n=band_n)
  stages = max(s for s in range(2, 9) if _fits(config, num_stages=s))
  return dataclasses.replace(config, num_stages=stages)


def lookup(
  op: str, problem: Problem, entries: Sequence[Entry] | None = None
) -> TileConfig | None:
  """Returns the tiles measured for the nearest problem, None if none is near.

  Near means no size off by more than a factor of two; nearest, the least sum of
  the logarithms of those factors.

  Args:
    op: a name in `OPS`.
    problem: the product.
    entries: a table; that of the problem's device if None.
  """
  _check_op(op)
  if entries is None:
    entries = table(problem.device.capability)
  near = [
    (sum(distances), entry.config)
    for entry in entries
    if entry.op == op and max(distances := _distances(entry, problem)) <= _REACH
  ]
  if not near:
    return None
  config = min(near, key=lambda pair: pair[0])[1]
  return dataclasses.replace(
    config, num_sms=problem.device.num_cores or _H200_SMS
  )


@functools.cache
def table(capability: tuple[int, int] | None) -> tuple[Entry, ...]:
  """Returns the entries shipped for a compute capability; none if None is."""
  if capability is None:
    return ()
  path = importlib.resources.files(__package__) / "tables"
  path = path / table_name(capability)
  if not path.is_file():
    return ()
  return tuple(entry_from_json(e) for e in json.loads(path.read_text()))


def table_name(capability: tuple[int, int]) -> str:
  """Returns the file name of a table.

  Example:
    >>> table_name((9, 0))
    'sm90.json'
  """
  return "sm{}{}.json".format(*capability)


def entry_from_json(record: dict[str, Any]) -> Entry:
  """Returns the entry that a table holds as `record`."""
  return Entry(
    record["op"],
    record["rows_per_expert"],
    record["num_experts"],
    record["d_in"],
    record["d_out"],
    TileConfig(**record["config"]),
  )


def candidates(op: str, problem: Problem) -> list[TileConfig]:
  """Returns the tiles worth measuring for `problem`, all of them valid."""
  _check_op(op)
  num_sms = problem.device.num_cores or _H200_SMS
  found = []
  for blocks in _blocks(op):
    # A band of all tiles is none.
    tiles = _tiles_of_a_row(op, problem, blocks)
    for band_n in (band for band in (0, 4, 8, 16) if band < tiles):
      config = TileConfig(*blocks, band_n=band_n, num_sms=num_sms)
      stages = [s for s in range(2, 9) if _fits(config, num_stages=s)]
      for num_stages in stages[-2:]:
        found.append(dataclasses.replace(config, num_stages=num_stages))
  return found


def why_invalid(op: str, config: TileConfig) -> str | None:
  """Returns why `op` cannot run with these tiles, in words; None if it can."""
  _check_op(op)
  blocks = (config.block_m, config.block_n)
  if blocks not in _blocks(op):
    return f"{op} has no tiles of {blocks}; it has {_blocks(op)}"
  if config.block_k != 64:
    return f"block_k = {config.block_k}; a step is 64, one swizzled row"
  # A gathered step is announced after the next is under way, and that waits for
  # the release of an older one.
  least = 2 if op in _WAITING_FOR_NOTHING else 3
  if config.num_stages < least:
    return f"num_stages = {config.num_stages}; loading ahead takes {least}"
  if config.num_sms < 1:
    return f"num_sms = {config.num_sms}; a launch has a block or more"
  if config.band_n < 0:
    return f"band_n = {config.band_n}; 0 is a band of all tiles"
  if not _fits(config):
    return f"{config} takes more shared memory than a block has"
  return None


def _check_op(op: str) -> None:
  if op not in OPS:
    raise ValueError(f"op must be one of {OPS}, got {op!r}.")


def _blocks(op: str) -> list[tuple[int, int]]:
  if op == "group_xty_gathered_y":
    # The gathered operand on the side of 128 columns.
    return [(256, 128), (128, 128), (64, 128), (128, 256)]
  if op == "group_xty_gathered_x":
    return [(128, 256), (128, 128), (128, 64), (64, 128), (256, 128)]
  if op in _GATED:
    return [(128, 256), (128, 128)]
  return [(128, 256), (128, 128), (128, 64)]


def xty_is_transposed(blocks: tuple[int, int], gathers_y_alone: bool) -> bool:
  """Returns whether a tile of x^T y is made as one of y^T x.

  Multiplied from the left is the side of 128 columns; if both are, the one that
  is gathered.

  Args:
    blocks: columns of x and of y.
    gathers_y_alone: whether y is gathered and x is not.
  """
  block_m, block_n = blocks
  return gathers_y_alone if block_m == block_n else block_n == 128


def _tiles_of_a_row(op: str, problem: Problem, blocks: tuple[int, int]) -> int:
  """Returns how many tiles lie side by side: what a band is cut from."""
  block_m, block_n = blocks
  is_xty, gathers_y = op.startswith("group_xty"), op.endswith("_y")
  if is_xty and xty_is_transposed(blocks, gathers_y):
    return -(-problem.d_in // block_m)
  return -(-problem.d_out // block_n)


def _xty_blocks(op: str, problem: Problem) -> tuple[int, int]:
  if op == "group_xty_gathered_y":
    wide = _wide_side(problem.d_in)
    return wide, 128
  if problem.d_in <= 64 < problem.d_out:
    return 64, 128
  return 128, _wide_side(problem.d_out)


def _wide_side(width: int) -> int:
  return next((block for block in (64, 128) if width <= block), 256)


def _fits(config: TileConfig, num_stages: int | None = None) -> bool:
  stages = num_stages or config.num_stages
  step = (config.block_m + config.block_n) * config.block_k * _BYTES
  return stages * step + _STORE_BYTES <= _SHARED_BYTES


def _distances(entry: Entry, problem: Problem) -> tuple[float, ...]:
  pairs = (
    (entry.rows_per_expert, problem.num_rows / problem.num_experts),
    (entry.num_experts, problem.num_experts),
    (entry.d_in, problem.d_in),
    (entry.d_out, problem.d_out),
  )
  return tuple(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)
