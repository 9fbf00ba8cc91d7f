"""Tiles by table and by rule: plain values in, valid tiles out."""

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
