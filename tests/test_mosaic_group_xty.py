"""The Hopper weight gradient: interpreted here, lowered here, run on a GPU.

What the interpreter's stand-in for cp.async hides (`tests.interpreted_xty`) is
checked by the tests marked gpu.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from scattermoe_jax._compat import Device, current_device
from scattermoe_jax.kernels import Problem, mosaic, tuning, xla
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.routing import route
from tests import oracle
from tests.accuracy import assert_accurate
from tests.hopper import (
  distinct_ids,
  distinct_or_nowhere,
  kernel_calls,
  lowered,
)

if reason := mosaic.missing_feature():
  pytest.skip(reason, allow_module_level=True)

from scattermoe_jax.kernels.mosaic import xty_plan, xty_tiles
from scattermoe_jax.kernels.mosaic.grouped_xty import group_xty
from scattermoe_jax.kernels.mosaic.tickets import RING
from scattermoe_jax.kernels.mosaic.xty_plan import make_plan
from scattermoe_jax.kernels.mosaic.xty_tiles import (
  part_at,
  parts_of_groups,
  tile_at,
)
from tests.interpreted_xty import (
  EXPERTS,
  IDS,
  ROWS,
  cut_to_steps,
  interpreted,
  operands,
)

# A warpgroup that has read its last ticket does not wait for later ones.
ends_before_a_barrier = pytest.mark.skipif(
  jax.__version_info__ < (0, 12),
  reason="this interpreter wants every phase of a barrier seen: use JAX 0.12",
)


def assert_interpreted_equals_oracle(
  x, y, ids, num_experts, config, *, races=False, **layout
):
  """Asserts the interpreted kernel's results; returns them."""
  routing = route(jnp.asarray(ids), num_experts)
  got = interpreted(x, y, routing, config=config, races=races, **layout)
  truth = oracle.group_xty(x, y, ids, num_experts, **layout)
  assert_accurate(got, truth, xla.group_xty(x, y, routing, **layout))
  return got


def test_group_xty_gathering_x_equals_oracle():
  # 64 of 128 columns: the rest of the tile lies past the width.
  x, y = operands(False, True, 64, 64)
  config = TileConfig(128, 64, num_stages=3, num_sms=2)
  got = assert_interpreted_equals_oracle(
    x, y, IDS, EXPERTS, config, y_grouped=True
  )
  assert not np.any(np.asarray(got[2], np.float32)), "an expert of no rows"


@pytest.mark.parametrize("x_grouped", [False, True])
def test_blocks_of_a_cluster_load_right_together(x_grouped):
  layout = dict(x_grouped=x_grouped, y_grouped=not x_grouped)
  x, y = operands(*layout.values(), *((64, 256) if x_grouped else (256, 64)))
  routing = route(jnp.asarray(IDS), EXPERTS)
  blocks = (64, 128) if x_grouped else (128, 64)
  config = TileConfig(*blocks, num_stages=3, num_sms=2)
  assert make_plan(x, y, routing, *layout.values(), config).cluster == 2
  assert_interpreted_equals_oracle(
    x, y, IDS, EXPERTS, config, races=True, **layout
  )


@pytest.mark.parametrize(
  "d, n, y_grouped, num_sms, cluster",
  [
    (512, 320, True, 132, 2),
    (512, 320, True, 131, 1),
    (384, 320, True, 132, 1),  # Three tiles along left.
    (512, 320, False, 132, 1),  # Right is gathered.
    (512, 40, True, 132, 1),  # Right comes by cp.async.
  ],
)
def test_blocks_draw_together_what_they_can_share(
  monkeypatch, d, n, y_grouped, num_sms, cluster
):
  cut_to_steps(monkeypatch)
  x, y = operands(False, y_grouped, d, n)
  routing = route(jnp.asarray(IDS), EXPERTS)
  config = TileConfig(128, 64, num_stages=3, band_n=2, num_sms=num_sms)
  plan = make_plan(x, y, routing, False, y_grouped, config)
  assert plan.cluster == cluster
  parts = parts_of_groups(plan, routing)
  numbers = jnp.arange(plan.num_tiles)
  tiles = jax.vmap(lambda i: tile_at(plan, parts, i))(numbers)
  tiles = jax.tree.map(np.asarray, tiles)
  here = tiles.number < plan.num_tiles
  assert not np.any(here[1:] & ~here[:-1]), "one after the last"
  places = tiles.left_col, tiles.right_col, tiles.expert, tiles.first
  distinct = np.unique(np.stack(places)[:, here], axis=1)
  assert distinct.shape[1] == sum(here)
  assert sum(here) % plan.per_part == 0 and sum(here) > 4 * plan.per_part
  if cluster == 2:
    first, second = (
      jax.tree.map(lambda a, nth=nth: a[nth::2], tiles) for nth in range(2)
    )
    same = ("expert", "right_col", "first", "end", "start", "num_steps")
    for name in same:
      np.testing.assert_array_equal(
        getattr(first, name), getattr(second, name), err_msg=name
      )
    np.testing.assert_array_equal(second.left_col, first.left_col + 128)
    np.testing.assert_array_equal(here[::2], here[1::2])


@pytest.mark.parametrize("num_stages, lag", [(2, 0), (3, 1), (4, 1)])
def test_a_step_is_announced_before_its_stage_is_waited_for(num_stages, lag):
  config = TileConfig(128, 64, num_stages=num_stages)
  routing = route(jnp.asarray(IDS), EXPERTS)
  for y_grouped in (False, True):
    x, y = operands(False, y_grouped, 64, 64)
    plan = make_plan(x, y, routing, False, y_grouped, config)
    assert plan.lag == lag


def test_steps_that_begin_before_a_group_reach_its_end():
  # The second group is of one step's rows, and is read from row 0 on.
  ids = np.repeat(np.arange(3, dtype=np.int32), (3, 62, 15))[:, None]
  x, y = operands(False, True, 64, 64, ids)
  routing = route(jnp.asarray(ids), 3)
  plan = make_plan(x, y, routing, False, True, TileConfig(128, 64))
  parts, found = parts_of_groups(plan, routing), {}
  for i in range(plan.num_tiles):
    t = tile_at(plan, parts, jnp.int32(i))
    found[int(t.expert)] = int(t.start), int(t.num_steps)
  assert found == {0: (0, 1), 1: (0, 2), 2: (64, 1)}


@pytest.mark.parametrize("num_tokens, by_tma", [(4, True), (6, False)])
def test_rows_come_by_tma_where_they_fill_its_tiles(num_tokens, by_tma):
  ids = IDS[:num_tokens]
  x, y = operands(False, True, 64, 64, ids)
  routing = route(jnp.asarray(ids), EXPERTS)
  plan = make_plan(x, y, routing, False, True, TileConfig(128, 64))
  assert (plan.right.by_tma, plan.aligned) == (by_tma, 8 if by_tma else 1)
  assert not plan.left.by_tma


def test_group_xty_refuses_tiles_that_would_wait_for_themselves():
  x, y = operands(False, True, 64, 64)
  routing = route(jnp.asarray(IDS), EXPERTS)
  config = TileConfig(128, 64, num_stages=1)
  with pytest.raises(ValueError, match="config: num_stages = 1; .* takes 2"):
    group_xty(x, y, routing, y_grouped=True, config=config)


@ends_before_a_barrier
@pytest.mark.parametrize("x_grouped", [False, True])
def test_group_xty_adds_up_the_parts_of_a_long_group(monkeypatch, x_grouped):
  cut_to_steps(monkeypatch)
  layout = dict(x_grouped=x_grouped, y_grouped=not x_grouped)
  x, y = operands(*layout.values(), 64, 192)
  routing = route(jnp.asarray(IDS), EXPERTS)
  blocks = (64, 128) if x_grouped else (128, 64)
  config = TileConfig(*blocks, num_stages=3, num_sms=1)
  assert make_plan(x, y, routing, *layout.values(), config).most_cuts == 2
  assert_interpreted_equals_oracle(
    x, y, IDS, EXPERTS, config, races=True, **layout
  )


def test_parts_that_are_not_stored_leave_a_tile_on_its_way_out(monkeypatch):
  # A tile is stored in pieces by way of two buffers, after that a part is not,
  # whose sums wait for those of the next.
  cut_to_steps(monkeypatch)
  ids = np.array([[0]] * 130 + [[1]] * 134, np.int32)
  x, y = operands(False, True, 64, 128, ids)
  routing = route(jnp.asarray(ids), 2)
  config = TileConfig(128, 128, num_stages=3, num_sms=1)
  plan = make_plan(x, y, routing, False, True, config)
  assert parts_of_groups(plan, routing).count.tolist()[:4] == [2] * 4
  assert_interpreted_equals_oracle(
    x, y, ids, 2, config, races=True, y_grouped=True
  )


@pytest.mark.parametrize("gathered", ["x", "y"])
@pytest.mark.parametrize("d, n", [(512, 4096), (4096, 512), (64, 2048)])
def test_a_band_is_fewer_tiles_than_all(gathered, d, n):
  op = f"group_xty_gathered_{gathered}"
  device = Device("gpu", "NVIDIA H200", (9, 0), 132)
  problem = Problem(IDS.size, EXPERTS, d, n, "bfloat16", device)
  rule, tried = tuning.heuristic(op, problem), tuning.candidates(op, problem)
  assert rule in tried
  grouped = gathered != "x", gathered != "y"
  x, y = operands(*grouped, d, n)
  routing = route(jnp.asarray(IDS), EXPERTS)
  bands = set()
  for config in tried:
    plan = make_plan(x, y, routing, *grouped, config)
    assert config.band_n < plan.tiles_right
    bands.add(config.band_n)
  assert len(bands) > 1


@pytest.mark.parametrize("y_by_tma", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_parts_cover_each_group_once_longest_first(seed, y_by_tma):
  rng = np.random.default_rng(seed)
  num_experts = int(rng.integers(1, 30))
  odds = rng.dirichlet(np.full(num_experts + 1, 0.1))
  # Some choices are not here.
  ids = rng.choice(num_experts + 1, (int(rng.integers(1, 60)) * 128, 1), p=odds)
  routing = route(jnp.asarray(ids, jnp.int32), num_experts)
  x, y = operands(False, True, 128, 64 if y_by_tma else 56, ids)
  config = TileConfig(128, 64, num_stages=3, num_sms=int(rng.integers(1, 9)))
  plan = make_plan(x, y, routing, False, True, config)
  assert plan.aligned == (8 if y_by_tma else 1)
  numbers = jnp.arange(plan.num_parts)
  parts = part_at(plan, parts_of_groups(plan, routing), numbers)
  sizes, found, slots = np.asarray(routing.group_sizes), {}, []
  starts = np.cumsum(sizes) - sizes
  for i, expert in enumerate(np.asarray(parts.expert)):
    if expert < num_experts:
      found.setdefault(int(expert), []).append(i)
  assert set(found) == set(range(num_experts))
  longest = []
  for expert, mine in found.items():
    assert mine == list(range(mine[0], mine[-1] + 1)), "side by side"
    bounds = [(int(parts.first[i]), int(parts.end[i])) for i in mine]
    assert bounds[0][0] == starts[expert]
    assert bounds[-1][1] == starts[expert] + sizes[expert]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    rows = [end - first for first, end in bounds]
    longest.append(max(rows))
    if len(mine) == 1:
      continue
    assert min(rows) > 0 and max(rows) <= 1.5 * plan.part_rows + ROWS
    assert all(first % plan.aligned == 0 for first, _ in bounds[1:])
    others = [int(parts.others[i]) for i in mine]
    assert others == [-1] * (len(mine) - 1) + [len(mine) - 1]
    own = [int(parts.slot[i]) for i in mine]
    assert own[:-1] == list(range(own[-1], own[-1] + len(mine) - 1))
    slots += own[:-1]
  assert all(a > b - ROWS - 8 for a, b in itertools.pairwise(longest))
  assert all(a > 0 or b == 0 for a, b in itertools.pairwise(longest))
  assert slots == list(range(len(slots))) and len(slots) <= plan.most_cuts


@pytest.mark.parametrize("least", [ROWS, 1024])
@pytest.mark.parametrize("fair", [64, 1088, 4096])
def test_no_part_of_a_cut_group_is_without_rows(monkeypatch, fair, least):
  monkeypatch.setattr(xty_plan, "LEAST_ROWS", least)
  sizes = jnp.arange(1, 40000, 7)
  plan = xty_plan.Plan(
    left=xty_plan.Side(128, 128, True, 1, False),
    right=xty_plan.Side(64, 64, False, 1, True),
    transposed=False,
    num_experts=sizes.shape[0],
    dtype=jnp.bfloat16,
    config=TileConfig(128, 64),
    most_cuts=1,
    part_rows=fair,
  )
  length, count = xty_tiles._cuts(plan, sizes, num_rows=int(sizes.sum()))
  assert int(count.max()) > 1
  # Parts count from the multiple of 8 at or below the group's first row.
  assert bool(jnp.all((count - 1) * length < sizes))
  assert bool(jnp.all(sizes <= count * length))


def test_even_groups_are_not_cut_to_take_two_turns():
  # 128 tiles for 132 blocks, each of a little more than a share.
  num_experts, d, n = 8, 1024, 512
  ids = np.arange(32768, dtype=np.int32).reshape(-1, 2) % num_experts
  routing = route(jnp.asarray(ids), num_experts)
  x, y = (jax.ShapeDtypeStruct(s, "bfloat16") for s in ((32768, n), (16384, d)))
  config = TileConfig(256, 128)
  plan = make_plan(x, y, routing, True, False, config)
  assert plan.most_cuts and plan.num_experts * plan.per_part == 128
  assert np.all(np.asarray(parts_of_groups(plan, routing).count)[:8] == 1)


@ends_before_a_barrier
@pytest.mark.timeout(200)  # Ends a deadlock.
def test_group_xty_passes_many_experts_without_rows():
  # One block, more tiles in turn without rows than it may draw ahead.
  num_experts = 2 * RING
  x, y = operands(False, True, 64, 64)
  ids = np.full_like(IDS, 5)
  config = TileConfig(128, 64, num_stages=3, num_sms=1)
  assert_interpreted_equals_oracle(
    x, y, ids, num_experts, config, y_grouped=True
  )


def test_group_xty_gathering_y_keeps_a_neighbours_nan_out():
  x, y = operands(True, False, 64, 64)
  routing = route(jnp.asarray(IDS), EXPERTS)
  others = np.asarray(routing.expert_ids) != 1
  poisoned = jnp.where(others[:, None], jnp.asarray(np.nan, x.dtype), x)
  # One block, so that each tile follows another in the same buffers.
  config = TileConfig(64, 128, num_stages=4, num_sms=1)
  got = interpreted(
    poisoned, y, routing, config=config, x_grouped=True, races=True
  )
  truth = oracle.group_xty(x, y, IDS, EXPERTS, x_grouped=True)
  baseline = xla.group_xty(x, y, routing, x_grouped=True)
  assert_accurate(got[1], truth[1], baseline[1])
  assert np.all(np.isnan(np.asarray(got[3], np.float32)))


LOWERED = {
  # (T, k, E, d, n, x_grouped, y_grouped, dtype)
  "large_gathered_x": (32768, 8, 128, 4096, 2048, False, True, "bfloat16"),
  "large_gathered_y": (32768, 8, 128, 1024, 4096, True, False, "bfloat16"),
  "float16": (4096, 8, 512, 2880, 5760, False, True, "float16"),
  "ones": (4096, 8, 64, 8, 4096, True, True, "bfloat16"),
  "odd": (1001, 3, 8, 600, 40, False, True, "bfloat16"),
  "odd_transposed": (1001, 3, 8, 40, 600, True, False, "bfloat16"),
  "both_gathered": (1000, 2, 8, 1024, 1024, False, False, "bfloat16"),
  "in_parts": (24576, 8, 128, 256, 1536, True, False, "bfloat16"),
  "in_parts_float16": (24576, 8, 128, 256, 1536, False, True, "float16"),
}


@pytest.mark.parametrize("case", LOWERED)
def test_group_xty_lowers_without_a_gpu(case):
  num_tokens, k, num_experts, d, n, x_grouped, y_grouped, dtype = LOWERED[case]
  rows = lambda grouped: num_tokens * (k if grouped else 1)
  x = jax.ShapeDtypeStruct((rows(x_grouped), d), dtype)
  y = jax.ShapeDtypeStruct((rows(y_grouped), n), dtype)
  ids = jax.ShapeDtypeStruct((num_tokens, k), jnp.int32)

  def product(x, y, ids):
    routing = route(ids, num_experts)
    return group_xty(x, y, routing, x_grouped=x_grouped, y_grouped=y_grouped)

  text = lowered(product, x, y, ids)
  [call] = kernel_calls(text)
  # Beside the result, sums of parts.
  results = call.rpartition("->")[2]
  assert ("xf32>" in results) == case.startswith("in_parts")


def test_group_xty_is_mapped_one_member_after_the_other():
  # Launches of one grid would draw their tiles from one counter.
  x, y = operands(False, True, 64, 64)
  routing = route(jnp.asarray(IDS), EXPERTS)
  product = lambda x, y: group_xty(x, y, routing, y_grouped=True)
  mapped = jax.vmap(product)
  alone, both = lowered(product, x, y), lowered(mapped, x[None], y[None])
  assert "stablehlo.while" in both and "stablehlo.while" not in alone


def on_gpu(x, y, routing, **layout):
  product = jax.jit(lambda x, y, r: group_xty(x, y, r, **layout))
  got = product(x, y, routing)
  for _ in range(5):
    same = product(x, y, routing)
    assert bool(jnp.array_equal(got, same, equal_nan=True)), "bits differ"
  return got


GPU_CASES = {
  # (T, k, E, d, n, skew, not here)
  "even": (1000, 2, 16, 256, 512, 0.0, 0.0),
  "skewed_many_empty": (500, 4, 256, 128, 256, 2.0, 0.0),
  "some_not_here": (1000, 2, 16, 256, 512, 0.0, 0.3),
  "odd": (333, 3, 8, 600, 40, 0.5, 0.1),
  "ones": (1000, 2, 16, 8, 1024, 0.5, 0.0),
  "one_token": (1, 8, 8, 512, 256, 0.0, 0.0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_group_xty_in_parts_on_gpu_equals_xla(monkeypatch, case, dtype):
  cut_to_steps(monkeypatch)
  test_group_xty_on_gpu_equals_xla(case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", GPU_CASES)
def test_group_xty_on_gpu_equals_xla(case, dtype):
  num_tokens, k, num_experts, d, n, skew, not_here = GPU_CASES[case]
  ids, routing = distinct_or_nowhere(num_tokens, k, num_experts, skew, not_here)
  for x_grouped, y_grouped in (
    (False, True), (True, False), (True, True), (False, False)
  ):  # fmt: skip
    layout = dict(x_grouped=x_grouped, y_grouped=y_grouped)
    x, y = operands(x_grouped, y_grouped, d, n, ids, dtype)
    # Rows of no group are never read into a sum, whatever they hold.
    grouped_rows = np.asarray(routing.expert_ids) < num_experts
    poison = lambda a, on, keep=grouped_rows: (
      jnp.where(keep[:, None], a, jnp.asarray(np.nan, a.dtype)) if on else a
    )
    got = on_gpu(poison(x, x_grouped), poison(y, y_grouped), routing, **layout)
    wide = (x.astype(jnp.float32), y.astype(jnp.float32), routing)
    truth = xla.group_xty(*wide, **layout, precision=lax.Precision.HIGHEST)
    baseline = xla.group_xty(x, y, routing, **layout)
    assert_accurate(got, truth, baseline, err_msg=str(layout))


@pytest.mark.gpu
@pytest.mark.timeout(200)  # Ends a deadlock.
def test_group_xty_on_gpu_passes_many_experts_without_rows():
  num_experts = 512
  ids = np.full((2048, 2), 5)
  routing = route(jnp.asarray(ids), num_experts)
  x, y = operands(False, True, 512, 512, ids)
  got = on_gpu(x, y, routing, y_grouped=True)
  truth = oracle.group_xty(x, y, ids, num_experts, y_grouped=True)
  assert_accurate(got, truth, xla.group_xty(x, y, routing, y_grouped=True))


@pytest.mark.gpu
def test_group_xty_on_gpu_past_2_to_the_31():
  # 96 * 4096 * 6144 elements of the output, 2.4e9.
  num_experts, d, n, num_tokens = 96, 4096, 6144, 2048
  ids = np.arange(num_tokens, dtype=np.int32)[:, None] % num_experts
  routing = route(jnp.asarray(ids), num_experts)
  x, y = operands(False, True, d, n, ids)
  got = on_gpu(x, y, routing, y_grouped=True)
  for expert in (0, 90, num_experts - 1):
    rows = np.asarray(routing.expert_ids) == expert
    tokens = np.asarray(routing.scattered_ids)[rows]
    x_e, y_e = x[tokens].astype(jnp.float32), y[rows].astype(jnp.float32)
    truth = np.asarray(x_e, np.float64).T @ np.asarray(y_e, np.float64)
    assert_accurate(got[expert], truth, None)


@pytest.mark.gpu
def test_rows_behind_32_gib_are_gathered_on_gpu():
  # A row has 2^11 chunks of 16 bytes: the last 128 begin behind 2^31 of them.
  before, d = 2**20, 2**14
  rows = before + 128
  stats = jax.local_devices()[0].memory_stats() or {}
  if stats.get("bytes_limit", 0) < 40 * 2**30:
    pytest.skip("needs 40 GiB")

  @jax.jit
  def ones_after_zeros():
    is_after = jnp.arange(rows) >= before
    return jnp.broadcast_to(is_after.astype(jnp.bfloat16)[:, None], (rows, d))

  y = jnp.ones((rows, 64), jnp.bfloat16)
  routing = route(jnp.zeros((rows, 1), jnp.int32), 1)
  try:
    x = jax.block_until_ready(ones_after_zeros())
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    pytest.skip("other processes, or tests before, hold the 32 GiB it needs")
  got = group_xty(x, y, routing, y_grouped=True)
  np.testing.assert_array_equal(np.asarray(got, np.float32), rows - before)


@pytest.mark.gpu
def test_every_candidate_of_group_xty_is_right_on_gpu():
  ids = distinct_ids(np.random.default_rng(1), 512, 4, 8)
  routing = route(jnp.asarray(ids), 8)
  # 6 and 7 tiles of 128: the former in pairs, the latter not.
  problem = Problem(ids.size, 8, 768, 896, "bfloat16", current_device())
  for op, x_grouped in (
    ("group_xty_gathered_x", False), ("group_xty_gathered_y", True)
  ):  # fmt: skip
    layout = dict(x_grouped=x_grouped, y_grouped=not x_grouped)
    x, y = operands(x_grouped, not x_grouped, 768, 896, ids)
    truth = oracle.group_xty(x, y, ids, 8, **layout)
    baseline = xla.group_xty(x, y, routing, **layout)
    for config in tuning.candidates(op, problem):
      got = on_gpu(x, y, routing, config=config, **layout)
      assert_accurate(got, truth, baseline, err_msg=str(config))
