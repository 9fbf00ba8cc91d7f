"""The Hopper weight gradient: interpreted here, lowered here, run on a GPU.

The interpreter cannot run cp.async, so `InterpretedOps` stands in for
`warpgroup_ops`; schedule, barriers, TMA copies, products and stores are the
kernel's own. What the stand-in hides is checked by the tests marked gpu.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from scattermoe_jax._compat import Device, current_device
from scattermoe_jax.kernels import Problem, mosaic, sum_choices, tuning, xla
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.ops import smoe_mlp
from scattermoe_jax.routing import route
from tests import oracle
from tests.accuracy import assert_accurate
from tests.conftest import poison_memory

if reason := mosaic.missing_feature():
  pytest.skip(reason, allow_module_level=True)

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from scattermoe_jax.kernels.mosaic import choice_sums, xty_plan, xty_tiles
from scattermoe_jax.kernels.mosaic.grouped_xty import (
  group_xty,
  group_xty_and_sum,
)
from scattermoe_jax.kernels.mosaic.tickets import RING
from scattermoe_jax.kernels.mosaic.xty_plan import make_plan
from scattermoe_jax.kernels.mosaic.xty_tiles import (
  part_at,
  parts_of_groups,
  tile_at,
)

ROWS = 64

# A warpgroup that has read its last ticket does not wait for later ones.
ends_before_a_barrier = pytest.mark.skipif(
  jax.__version_info__ < (0, 12),
  reason="this interpreter wants every phase of a barrier seen: use JAX 0.12",
)


class InterpretedOps:
  """The functions of `warpgroup_ops`, as plain loads and stores."""

  def __init__(self, num_blocks):
    self.num_blocks = num_blocks

  def new_counter(self):
    return None

  def increment(self, counter, ring, place, turn):
    del counter
    ring[place] = lax.axis_index("cluster") + turn * lax.axis_size("cluster")

  def meet_cluster(self):
    pass

  @staticmethod
  def sum_share(plan, worker, smem, first_byte, rows, places, out, slice_index):
    del smem, first_byte  # Rows pass no shared memory here.
    workers = plan.blocks * plan.warpgroups
    columns = pl.ds(slice_index * plan.width, plan.width)

    def sum_token(i, _):
      token = worker + i * workers
      total = jnp.zeros((plan.width,), jnp.float32)
      for j in range(plan.top_k):
        total += rows[places[token, j], :].astype(jnp.float32)
      out[token, columns] = total.astype(plan.dtype)

    lax.fori_loop(
      0, pl.cdiv(plan.num_tokens - worker, workers), sum_token, None
    )

  def new_flags(self, count):
    # One block: no part is waited for.
    assert self.num_blocks == 1
    return None

  def signal(self, flags, i):
    pass

  def wait_for(self, flags, i):
    pass

  @staticmethod
  def range_ids(window):
    return window[0] + jnp.arange(ROWS, dtype=jnp.int32)

  @staticmethod
  def load_ids(ids, window):
    # One slice that stays inside; then each row its own place.
    start = jnp.clip(window[0], 0, max(ids.shape[0] - ROWS, 0))
    rows = ids[pl.ds(start, min(ROWS, ids.shape[0]))]
    place = window[0] - start + jnp.arange(ROWS, dtype=jnp.int32)
    return rows[jnp.clip(place, 0, rows.shape[0] - 1)]

  @staticmethod
  def copy(source, smem, ids, window, *, column, width, fan_out):
    first_row, group_first, group_end = window
    piece = math.gcd(width, smem.shape[-1])
    for first in range(0, smem.shape[-1], piece):
      in_width = column + first < width
      from_column = jnp.where(in_width, column + first, 0)

      def copy_row(r, _, first=first, in_width=in_width, column=from_column):
        row = first_row + r
        exists = in_width & (row >= group_first) & (row < group_end)
        source_row = jnp.where(exists, ids[r] // fan_out, 0)
        values = source[source_row, pl.ds(column, piece)]
        smem[r, first : first + piece] = jnp.where(
          exists, values, jnp.zeros_like(values)
        )

      lax.fori_loop(0, ROWS, copy_row, None)

  @staticmethod
  def commit():
    pass

  @staticmethod
  def wait(groups):
    del groups
    plgpu.commit_smem()


# 3, 133, 0 and 16 rows: expert 1 has a step cut at its start, a whole one, and
# one cut at its end; expert 2 has none.
IDS = np.array([[0, 3]] * 3 + [[1, 3]] * 13 + [[1, 1]] * 60, np.int32)
EXPERTS = 4


def operands(x_grouped, y_grouped, d, n, ids=IDS, dtype=jnp.bfloat16, seed=0):
  rng = np.random.default_rng(seed)
  rows = lambda grouped: ids.size if grouped else ids.shape[0]
  x = jnp.asarray(rng.normal(size=(rows(x_grouped), d)), dtype)
  y = jnp.asarray(rng.normal(size=(rows(y_grouped), n)), dtype)
  return x, y


def interpreted(*arrays, config, product=group_xty, races=False, **layout):
  params = plgpu.InterpretGPUParams(detect_races=races)
  ops = InterpretedOps(config.num_sms)
  with plgpu.force_gpu_interpret_mode(params):
    return jax.jit(
      lambda *arrays: product(*arrays, config=config, ops=ops, **layout)
    )(*arrays)


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


def test_group_xty_refuses_tiles_that_would_wait_for_themselves():
  x, y = operands(False, True, 64, 64)
  routing = route(jnp.asarray(IDS), EXPERTS)
  config = TileConfig(128, 64, num_stages=1)
  with pytest.raises(ValueError, match="config: num_stages = 1; .* takes 2"):
    group_xty(x, y, routing, y_grouped=True, config=config)


def cut_to_steps(monkeypatch):
  monkeypatch.setattr(xty_plan, "_part_rows", lambda *_: ROWS)
  monkeypatch.setattr(xty_plan, "LEAST_ROWS", ROWS)


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


def sum_beside_every_product(monkeypatch):
  monkeypatch.setattr(choice_sums, "_MOST_BLOCKS", math.inf)
  monkeypatch.setattr(choice_sums, "_LEAST_TILES_EACH", 0)
  monkeypatch.setattr(choice_sums, "_PRODUCTS_PER_SUM", 1)


def slices_of(rows):
  """Returns what makes slices of columns: copies of those of `rows`."""
  return lambda _, columns: rows if columns is None else columns.of(rows, 1)


# All four experts at once, two by two, in three shares of which two are short,
# and in more shares than there are experts.
@pytest.mark.parametrize(
  "num_sms, num_chunks", [(4, 1), (3, 1), (1, 1), (4, 2), (3, 3), (4, 8)]
)
@pytest.mark.parametrize("x_grouped", [False, True])
def test_blocks_that_sum_first_multiply_what_is_left(
  monkeypatch, x_grouped, num_sms, num_chunks
):
  sum_beside_every_product(monkeypatch)
  layout = dict(x_grouped=x_grouped, y_grouped=not x_grouped)
  d, n = (48 if num_chunks == 3 else 64, 256) if x_grouped else (384, 64)
  x, y = operands(*layout.values(), d, n)
  rows = operands(True, True, d, n, seed=1)[0]
  routing = route(jnp.asarray(IDS), EXPERTS)
  blocks = (64, 128) if x_grouped else (128, 64)
  config = TileConfig(*blocks, num_stages=3, num_sms=num_sms)

  def both(x, y, rows, routing, **options):
    options |= dict(num_chunks=num_chunks)
    return group_xty_and_sum(x, y, slices_of(rows), routing, **options)

  options = dict(config=config, product=both, races=True)
  xty, sums = interpreted(x, y, rows, routing, **options, **layout)
  truth = oracle.group_xty(x, y, IDS, EXPERTS, **layout)
  assert_accurate(xty, truth, xla.group_xty(x, y, routing, **layout))
  ones = np.ones(IDS.shape)
  assert_accurate(sums, oracle.combine(rows, ones, IDS, EXPERTS), None)


def summing(**changes):
  """Returns how C3 would sum rows of dx, but for `changes`."""
  problem = dict(
    products=262144 * 4096 * 2048,
    num_tiles=32768,
    num_blocks=132,
    warpgroups=3,
    ring_bytes=65536,
  )
  rows = jax.ShapeDtypeStruct(
    (changes.pop("num_rows", 262144), changes.pop("width", 4096)),
    changes.pop("dtype", "bfloat16"),
  )
  top_k, num_slices = changes.pop("top_k", 8), changes.pop("num_slices", 1)
  return choice_sums.plan_sum(rows, top_k, num_slices, **problem | changes)


def test_a_sum_takes_the_share_of_blocks_that_ends_before_the_product():
  assert summing().blocks == 6
  assert summing(products=262144 * 4096 * 512).blocks == 20
  assert summing(products=262144 * 4096 * 65536).blocks == 2
  assert summing(num_blocks=1, num_tiles=8).blocks == 1
  assert (summing().groups, summing(top_k=16).groups) == (4, 2)


@pytest.mark.parametrize(
  "changes",
  [
    dict(products=262144 * 4096 * 256),  # Hardly anything to multiply.
    dict(num_tiles=1000),  # Who comes late finds none.
    dict(top_k=32),  # No slots for two sums of k rows.
    dict(width=4092),  # No whole chunks.
    dict(dtype="float32"),  # Chunks are of 16 bits a number.
    dict(num_rows=2**21, products=2**52),  # More than 32 bits count.
    dict(num_slices=64),  # More than 32 bits count in what is stored.
  ],
)
def test_a_sum_that_would_not_end_in_time_is_made_alone(changes):
  assert summing() is not None
  assert summing(**changes) is None


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


def h200():
  return use_abstract_mesh(
    AbstractMesh(
      (), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "cuda")
    )
  )


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

  with h200():
    traced = jax.jit(product).trace(x, y, ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  [call] = [line for line in text.splitlines() if "call @mosaic_gpu" in line]
  # Beside the result, sums of parts.
  results = call.rpartition("->")[2]
  assert ("xf32>" in results) == case.startswith("in_parts")


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("k", [8, 16, 6])
def test_a_sum_beside_group_xty_lowers_without_a_gpu(k, num_chunks):
  num_tokens, num_experts, d, n = 4096, 128, 4096, 2048
  array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
  x, y = array(num_tokens, d), array(num_tokens * k, n)
  rows = array(num_tokens * k, d)
  ids = jax.ShapeDtypeStruct((num_tokens, k), jnp.int32)

  def both(x, y, rows, ids):
    routing, options = route(ids, num_experts), dict(y_grouped=True)
    options |= dict(num_chunks=num_chunks, at_once=True)
    return mosaic.group_xty_and_sum(x, y, slices_of(rows), routing, **options)

  with h200():
    traced = jax.jit(both).trace(x, y, rows, ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  first, *others = [
    line for line in text.splitlines() if "call @mosaic_gpu" in line
  ]
  # One more kernel serves all slices but the first, and writes what that made.
  assert len(others) == (num_chunks > 1)
  for call in (first, *others):
    assert f"tensor<{num_tokens}x{d}xbf16>" in call.rpartition("->")[2]
    # Besides the counter of tiles.
    assert call.count("output_operand_alias<") == 1 + 2 * (call in others)


@pytest.mark.parametrize(
  "wanted, num_chunks, together",
  [
    ((0, 1), 1, 1),
    ((0,), 1, 0),
    ((1,), 1, 0),
    # A slice of rows has twice the size of dw_in, the same, or a half.
    ((0, 1), 2, 2),
    ((0, 1), 4, 2),
    ((0, 1), 8, 2),
    ((1,), 4, 0),
  ],
)
def test_a_layer_sums_dx_beside_dw_in_if_both_are_wanted(
  wanted, num_chunks, together
):
  num_tokens, k, num_experts, d, n = 32768, 16, 256, 4096, 256
  array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
  ids = jax.ShapeDtypeStruct((num_tokens, k), jnp.int32)

  def loss(x, w_in, w_out, ids):
    gates = jnp.ones((num_tokens, k))
    routing = route(ids, num_experts)
    options = dict(num_chunks=num_chunks, implementation="mosaic")
    y = smoe_mlp(x, gates, routing, w_in, w_out, **options)
    return jnp.sum(y.astype(jnp.float32))

  with h200():
    traced = jax.jit(jax.grad(loss, wanted)).trace(
      array(num_tokens, d),
      array(num_experts, d, 2 * n),
      array(num_experts, n, d),
      ids,
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  dw_in, dx = f"{num_experts}x{d}x{2 * n}xbf16", f"{num_tokens}x{d}xbf16"
  results = [
    line.rpartition("->")[2]
    for line in text.splitlines()
    if "call @mosaic_gpu" in line
  ]
  at_once = [made for made in results if dw_in in made and dx in made]
  assert len(at_once) == together


def test_group_xty_is_mapped_one_member_after_the_other():
  # Launches of one grid would draw their tiles from one counter.
  x, y = operands(False, True, 64, 64)
  routing = route(jnp.asarray(IDS), EXPERTS)
  product = lambda x, y: group_xty(x, y, routing, y_grouped=True)
  mapped = jax.vmap(product)
  with h200():
    alone = jax.jit(product).trace(x, y)
    both = jax.jit(mapped).trace(x[None], y[None])
    alone, both = (
      traced.lower(lowering_platforms=("cuda",)).as_text()
      for traced in (alone, both)
    )
  assert "stablehlo.while" in both and "stablehlo.while" not in alone


def on_gpu(x, y, routing, **layout):
  product = jax.jit(lambda x, y, r: group_xty(x, y, r, **layout))
  got = product(x, y, routing)
  for _ in range(5):
    same = product(x, y, routing)
    assert bool(jnp.array_equal(got, same, equal_nan=True)), "bits differ"
  return got


def distinct_ids(rng, num_tokens, k, num_experts, skew=0.0):
  weight = -skew * np.log1p(np.arange(num_experts))
  noise = rng.gumbel(size=(num_tokens, num_experts)) + weight
  return np.argsort(-noise, axis=1)[:, :k].astype(np.int32)


def distinct_or_nowhere(num_tokens, k, num_experts, skew, not_here):
  """Returns ids of which a part is 'not here', and their routing."""
  rng = np.random.default_rng(0)
  ids = distinct_ids(rng, num_tokens, k, num_experts, skew)
  ids = np.where(rng.random(ids.shape) < not_here, num_experts, ids)
  return ids, route(jnp.asarray(ids), num_experts)


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


SUMMED_CASES = {
  # (T, k, E, d, n, skew, not here)
  "in_pairs": (3000, 8, 16, 512, 512, 0.5, 0.1),
  "sixteen": (1111, 16, 32, 256, 512, 0.5, 0.0),
  "no_quads": (333, 6, 8, 600, 40, 0.5, 0.1),
  "three": (1000, 3, 16, 1536, 256, 0.0, 0.0),
  "one_choice": (2000, 1, 8, 512, 512, 1.0, 0.0),
  "one_token": (1, 8, 8, 512, 256, 0.0, 0.0),
}


@pytest.mark.gpu
@pytest.mark.timeout(200)  # Ends a deadlock.
@pytest.mark.parametrize(
  "form", ["whole", "in_parts", "few_chunks", "many_chunks"]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", SUMMED_CASES)
def test_a_sum_beside_group_xty_on_gpu_changes_no_bit(
  monkeypatch, case, dtype, form
):
  sum_beside_every_product(monkeypatch)
  num_tokens, k, num_experts, d, n, skew, not_here = SUMMED_CASES[case]
  num_chunks = 1
  if form == "in_parts":
    cut_to_steps(monkeypatch)
  elif form != "whole":
    # Chunks share groups, which are not cut then.
    monkeypatch.setattr(xty_plan, "_part_rows", lambda *_: num_tokens)
    possible = [c for c in range(2, 17) if d % (8 * c) == 0]
    num_chunks = possible[0 if form == "few_chunks" else -1]
  ids, routing = distinct_or_nowhere(num_tokens, k, num_experts, skew, not_here)
  x, y = operands(False, True, d, n, ids, dtype)
  rows = operands(True, True, d, n, ids, dtype, seed=1)[0]
  alone = jax.jit(lambda *args: group_xty(*args, y_grouped=True))
  options = dict(num_chunks=num_chunks, y_grouped=True)
  both = jax.jit(
    lambda x, y, rows, routing: group_xty_and_sum(
      x, y, slices_of(rows), routing, **options
    )
  )
  expected = alone(x, y, routing), jax.jit(sum_choices)(rows, routing)
  for _ in range(5):
    poison_memory()
    for got, want in zip(both(x, y, rows, routing), expected, strict=True):
      assert bool(jnp.array_equal(got, want)), case


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
