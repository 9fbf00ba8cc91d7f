"""Tiles by table and by rule: plain values in, valid tiles out."""

import dataclasses
import itertools
import math

import pytest

from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import Problem, tuning
from scattermoe_jax.kernels.config import TileConfig

H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
PROBLEMS = [
  Problem(num_rows, num_experts, d_in, d_out, "bfloat16", H200)
  for num_rows, num_experts, d_in, d_out in (
    (262144, 128, 4096, 2048),
    (196608, 128, 256, 1536),
    (65536, 32, 2880, 5760),
    (8, 8, 8, 4096),
    (512, 512, 600, 40),
  )
]


@pytest.mark.parametrize("op", tuning.OPS)
def test_heuristic_and_candidates_are_valid(op):
  for problem in PROBLEMS:
    assert tuning.why_invalid(op, tuning.heuristic(op, problem)) is None
    candidates = tuning.candidates(op, problem)
    assert candidates
    for config in candidates:
      assert tuning.why_invalid(op, config) is None, config


def test_blocks_of_a_launch_come_from_the_device():
  small = PROBLEMS[0]._replace(device=H200._replace(num_cores=78))
  assert tuning.tuned_config(tuning.OPS[0], small).num_sms == 78


def test_a_device_of_unknown_size_has_the_blocks_of_an_h200():
  unknown = PROBLEMS[0]._replace(device=H200._replace(num_cores=None))
  for op in tuning.OPS:
    assert tuning.heuristic(op, unknown).num_sms == 132
    assert {c.num_sms for c in tuning.candidates(op, unknown)} == {132}


def test_lookup_takes_the_nearest_and_nothing_far():
  near, far = TileConfig(128, 128), TileConfig(128, 256)
  entries = [
    tuning.Entry("up_projection", 2048, 128, 4096, 2048, near),
    tuning.Entry("up_projection", 3000, 100, 2800, 1500, far),
    tuning.Entry("scatter2scatter_grouped", 2048, 128, 4096, 2048, far),
  ]
  problem = PROBLEMS[0]
  assert tuning.lookup("up_projection", problem, entries) == near
  tiny = problem._replace(d_in=64)
  assert tuning.lookup("up_projection", tiny, entries) is None


def test_lookup_reaches_twice_and_half_of_each_size_and_no_further():
  entry = tuning.Entry("up_projection", 256, 64, 1024, 4096, TileConfig())
  problem = Problem(256 * 64, 64, 1024, 4096, "bfloat16", H200)

  def is_near(**sizes):
    entries = [entry._replace(**sizes)]
    return tuning.lookup("up_projection", problem, entries) is not None

  sizes = ("rows_per_expert", "num_experts", "d_in", "d_out")
  for name in sizes:
    size = getattr(entry, name)
    assert is_near(**{name: 2 * size}) and is_near(**{name: size // 2}), name
    assert not is_near(**{name: 2 * size + 1}), name
    assert not is_near(**{name: size // 2 - 1}), name
  assert is_near(**{name: 2 * getattr(entry, name) for name in sizes})


def test_measured_tiles_go_before_the_rule_with_the_blocks_of_the_device(
  monkeypatch,
):
  op, problem = "up_projection", PROBLEMS[0]
  measured = TileConfig(128, 128, num_stages=3, band_n=4)
  assert tuning.heuristic(op, problem) != measured
  tables = {(9, 0): (tuning.Entry(op, 2048, 128, 4096, 2048, measured),)}
  monkeypatch.setattr(tuning, "table", lambda capability: tables[capability])
  for num_cores, num_sms in ((132, 132), (78, 78), (None, 132)):
    device = H200._replace(num_cores=num_cores)
    got = tuning.tuned_config(op, problem._replace(device=device))
    assert got == dataclasses.replace(measured, num_sms=num_sms)


@pytest.mark.parametrize("op", tuning.OPS)
def test_valid_tiles_and_their_stores_fit_in_shared_memory(op):
  sides, most = (64, 128, 256), 0
  for blocks in itertools.product(sides, sides):
    for num_stages in range(1, 17):
      config = TileConfig(*blocks, num_stages=num_stages)
      if tuning.why_invalid(op, config) is None:
        # Of 16 bits each: rows of 64, and two buffers of two warpgroups.
        elements = num_stages * sum(blocks) * 64 + 2 * 2 * 64 * 64
        most = max(most, 2 * elements)
  # A block on Hopper has 227 KiB; a kilobyte is for barriers.
  assert 0 < most <= 226 * 1024


def test_tiles_that_cannot_run_are_refused_in_words():
  op = "group_xty_gathered_x"
  assert "shared memory" in tuning.why_invalid(
    op, TileConfig(128, 256, num_stages=5)
  )
  assert "no tiles" in tuning.why_invalid(op, TileConfig(96, 256))
  one, two = (TileConfig(128, 128, num_stages=stages) for stages in (1, 2))
  assert "takes 2" in tuning.why_invalid(op, one)
  assert tuning.why_invalid(op, two) is None
  assert "takes 3" in tuning.why_invalid("up_projection", two)
  for block_k in (32, 128):
    reason = tuning.why_invalid(op, TileConfig(block_k=block_k))
    assert f"block_k = {block_k}" in reason
  none, negative = TileConfig(num_sms=0), TileConfig(band_n=-1)
  assert "num_sms = 0" in tuning.why_invalid(op, none)
  assert "band_n = -1" in tuning.why_invalid(op, negative)
  with pytest.raises(ValueError, match="op must be one of"):
    tuning.heuristic("sort", PROBLEMS[0])


def not_worth_shipping(entries, capability):
  """Returns what is invalid, and what no problem reaches: not even its own."""
  found = []
  for entry in entries:
    device = H200._replace(
      capability=capability, num_cores=entry.config.num_sms
    )
    problem = Problem(
      math.ceil(entry.rows_per_expert * entry.num_experts),
      entry.num_experts,
      entry.d_in,
      entry.d_out,
      "bfloat16",
      device,
    )
    invalid = tuning.why_invalid(entry.op, entry.config) is not None
    if invalid or tuning.lookup(entry.op, problem, entries) != entry.config:
      found.append(entry)
  return found


def test_every_shipped_entry_is_reachable_and_valid():
  for capability in ((9, 0), (8, 0)):
    assert not_worth_shipping(tuning.table(capability), capability) == []


def test_an_invalid_or_hidden_entry_would_be_found():
  good = tuning.Entry(
    "up_projection", 2048, 128, 4096, 2048, TileConfig(128, 256)
  )
  invalid = good._replace(d_in=600, config=TileConfig(96, 256))
  hidden = good._replace(config=TileConfig(128, 128))
  entries = [good, invalid, hidden]
  assert not_worth_shipping(entries, (9, 0)) == [invalid, hidden]
