"""Sums of k rows beside a weight gradient: interpreted, lowered, on a GPU."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax.kernels import mosaic, sum_choices, xla
from scattermoe_jax.kernels.config import TileConfig
from scattermoe_jax.ops import smoe_mlp
from scattermoe_jax.routing import route
from tests import oracle
from tests.accuracy import assert_accurate
from tests.conftest import poison_memory
from tests.hopper import distinct_or_nowhere, kernel_calls, lowered

if reason := mosaic.missing_feature():
  pytest.skip(reason, allow_module_level=True)

from scattermoe_jax.kernels.mosaic import choice_sums, xty_plan
from scattermoe_jax.kernels.mosaic.grouped_xty import (
  group_xty,
  group_xty_and_sum,
)
from scattermoe_jax.kernels.mosaic.xty_plan import make_plan
from scattermoe_jax.kernels.mosaic.xty_tiles import parts_of_groups, tile_at
from tests.interpreted_xty import (
  EXPERTS,
  IDS,
  cut_to_steps,
  interpreted,
  operands,
)


def sum_beside_every_product(monkeypatch):
  monkeypatch.setattr(choice_sums, "_MOST_BLOCKS", math.inf)
  monkeypatch.setattr(choice_sums, "_LEAST_TILES_EACH", 0)
  monkeypatch.setattr(choice_sums, "_PRODUCTS_PER_SUM", 1)


def slices_of(rows):
  """Returns what makes slices of columns: copies of those of `rows`."""
  return lambda _, columns: rows if columns is None else columns.of(rows, 1)


# Blocks in pairs, and one alone; three, in as many shares of the four experts;
# in pairs, in more shares than there are experts.
@pytest.mark.parametrize(
  "num_sms, num_chunks", [(4, 1), (1, 1), (3, 3), (4, 8)]
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


@pytest.mark.parametrize("num_slices", [2, 3, 4, 9])
@pytest.mark.parametrize("num_experts", [1, 4, 7, 8])
def test_slices_share_the_experts_longest_first(
  monkeypatch, num_experts, num_slices
):
  sum_beside_every_product(monkeypatch)
  ids = np.random.default_rng(0).integers(0, num_experts, (300, 1))
  ids[ids == 3] = 0  # One has no rows.
  routing = route(jnp.asarray(ids, jnp.int32), num_experts)
  x, y = operands(False, True, 256, 128, ids)
  config = TileConfig(128, 64, num_stages=3, num_sms=1)
  plan = make_plan(x, y, routing, False, True, config)
  rows = jax.ShapeDtypeStruct((300, 256 // num_slices // 8 * 8), x.dtype)
  plan = plan.with_sum(rows, routing, num_slices)
  assert plan.num_parts == math.ceil(num_experts / num_slices)
  found = []
  for index in range(num_slices):
    parts = parts_of_groups(plan, routing, jnp.int32(index))
    numbers = jnp.arange(plan.num_tiles)
    tiles = jax.vmap(lambda i, parts=parts: tile_at(plan, parts, i))(numbers)
    here = np.asarray(tiles.number) < plan.num_tiles
    assert not np.any(here[1:] & ~here[:-1]), "one after the last"
    experts = np.asarray(tiles.expert)[here].reshape(-1, plan.per_part)
    assert np.all(experts == experts[:, :1])
    sizes = np.asarray(routing.group_sizes)[experts[:, 0]]
    assert np.all(sizes[1:] <= sizes[:-1])
    found += experts[:, 0].tolist()
  assert sorted(found) == list(range(num_experts))


def test_a_slice_takes_the_share_of_blocks_that_the_whole_takes():
  # C2 with an eighth of its tokens.
  num_tokens, k, num_experts, d, n = 4096, 16, 256, 4096, 512
  ids = jnp.arange(num_tokens * k, dtype=jnp.int32).reshape(-1, k) % num_experts
  routing, array = route(ids, num_experts), jax.ShapeDtypeStruct
  x, y = (
    array(shape, "bfloat16") for shape in ((num_tokens, d), (ids.size, n))
  )
  config = TileConfig(128, 256, num_stages=4, num_sms=132)
  plan = make_plan(x, y, routing, False, True, config)

  def sum_plan(num_slices):
    rows = array((ids.size, d // num_slices), "bfloat16")
    return plan.with_sum(rows, routing, num_slices).sum_plan

  assert sum_plan(1).blocks == sum_plan(4).blocks == 20
  # 16384 tiles: 15 for each block of a launch, and 7.
  assert sum_plan(8) is not None and sum_plan(16) is None


@pytest.mark.parametrize("blocks", [(128, 64), (128, 256), (64, 128)])
def test_slots_of_a_sum_fit_in_each_warpgroups_share_of_the_ring(
  monkeypatch, blocks
):
  sum_beside_every_product(monkeypatch)
  x, y = operands(False, True, 256, 256)
  rows = operands(True, True, 256, 256)[0]
  routing = route(jnp.asarray(IDS), EXPERTS)
  config = TileConfig(*blocks, num_stages=4, num_sms=2)
  plan = make_plan(x, y, routing, False, True, config)
  groups = plan.with_sum(rows, routing).sum_plan.groups
  # A slot is 16 bytes of each of 128 threads.
  assert groups == min(plan.ring_shares) // (128 * 16 * routing.top_k)


def test_each_slice_waits_until_the_one_before_is_gone(monkeypatch):
  sum_beside_every_product(monkeypatch)
  x, y = operands(False, True, 64, 64)
  rows, given = operands(True, True, 64, 64)[0], []

  def rows_of(y, columns):
    given.append(y)
    return columns.of(rows, 1)

  config = TileConfig(128, 64, num_stages=3, num_sms=2)
  options = dict(num_chunks=4, y_grouped=True, config=config)
  routing = route(jnp.asarray(IDS), EXPERTS)
  product = lambda x, y: group_xty_and_sum(x, y, rows_of, routing, **options)
  jax.make_jaxpr(product)(x, y)
  assert len({id(y) for y in given}) == 4, "y of a barrier, but for the first"


def test_groups_in_parts_are_not_shared_by_slices(monkeypatch):
  sum_beside_every_product(monkeypatch)
  cut_to_steps(monkeypatch)
  x, y = operands(False, True, 64, 64)
  rows = operands(True, True, 64, 64)[0]
  config = TileConfig(128, 64, num_stages=3, num_sms=2)
  options = dict(y_grouped=True, config=config)
  product = lambda num_chunks: group_xty_and_sum(
    x,
    y,
    slices_of(rows),
    route(jnp.asarray(IDS), EXPERTS),
    num_chunks=num_chunks,
    **options,
  )
  assert jax.eval_shape(lambda: product(1)) is not None
  assert product(2) is None


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


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("k", [8, 16, 6])
def test_a_sum_beside_group_xty_lowers_without_a_gpu(k, num_chunks):
  num_tokens, num_experts, d, n = 4096, 128, 4096, 2048
  array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
  x, y = array(num_tokens, d), array(num_tokens * k, n)
  rows = array(num_tokens * k, d)
  ids = jax.ShapeDtypeStruct((num_tokens, k), jnp.int32)

  def both(x, y, rows, ids):
    routing = route(ids, num_experts)
    options = dict(num_chunks=num_chunks, y_grouped=True)
    return group_xty_and_sum(x, y, slices_of(rows), routing, **options)

  text = lowered(both, x, y, rows, ids)
  first, *others = kernel_calls(text)
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
    # A slice of rows has twice the size of dw_in, or the same.
    ((0, 1), 2, 2),
    ((0, 1), 4, 2),
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

  w_in, w_out = array(num_experts, d, 2 * n), array(num_experts, n, d)
  text = lowered(jax.grad(loss, wanted), array(num_tokens, d), w_in, w_out, ids)
  dw_in, dx = f"{num_experts}x{d}x{2 * n}xbf16", f"{num_tokens}x{d}xbf16"
  results = [call.rpartition("->")[2] for call in kernel_calls(text)]
  at_once = [made for made in results if dw_in in made and dx in made]
  assert len(at_once) == together


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
