"""Every benchmark runs, on a CPU, on a problem too small to mean anything."""

import dataclasses
import functools
import itertools
import json
import weakref

import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
  bench_attention,
  bench_granularity,
  bench_memory,
  bench_mlp,
  bench_ops,
  bench_train,
  layer_products,
  layer_steps,
  peers,
  shapes,
  timing,
  tune,
)
from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import Problem, mosaic, tuning, xla
from scattermoe_jax.kernels.config import TileConfig


def test_time_interleaved_times_every_variant():
  calls = []
  variants = {name: lambda name=name: calls.append(name) for name in "ab"}
  taken = timing.time_interleaved(variants, samples=3, sample_ms=0.0)
  assert set(taken) == {"a", "b"}
  assert all(t.ms_p20 <= t.ms_median <= t.ms_p80 for t in taken.values())
  assert calls.count("a") == calls.count("b") == 3 + 3


def test_time_interleaved_keeps_few_calls_under_way():
  made, waited = itertools.count(1), [0]
  under_way = []

  class Result:
    def __init__(self):
      self.number = next(made)
      under_way.append(self.number - waited[-1])

    def block_until_ready(self):
      waited.append(self.number)

  timing.time_interleaved({"fast": Result}, samples=2, sample_ms=20.0)
  assert max(under_way) == 8
  assert waited[-1] == len(under_way) > 40


def test_time_interleaved_holds_little_of_calls_under_way():
  alive, most = weakref.WeakSet(), []

  class Array:
    def __init__(self, nbytes):
      self.nbytes = nbytes
      alive.add(self)

    def block_until_ready(self):
      return self

  def call():
    made = [Array(4), Array(2**30)]
    most.append(sum(array.nbytes for array in alive))
    return made

  timing.time_interleaved({"wide": call}, samples=1, sample_ms=1.0)
  assert max(most) < 3 * 2**30


def test_merge_records_replaces_by_key(tmp_path):
  path = tmp_path / "device" / "bench.json"
  first = [{"op": "up", "ms": 2.0}, {"op": "down", "ms": 3.0}]
  timing.merge_records(path, first, key=("op",))
  timing.merge_records(path, [{"op": "up", "ms": 1.0}], key=("op",))
  merged = {r["op"]: r for r in json.loads(path.read_text())}
  assert {op: r["ms"] for op, r in merged.items()} == {"up": 1.0, "down": 3.0}
  assert {"device", "jax", "command", "commit", "date"} <= set(merged["up"])


def test_a_record_names_its_commit_without_a_history(monkeypatch):
  monkeypatch.setenv("BENCH_COMMIT", "0123abc")
  made_here = timing.environment.__wrapped__
  assert made_here()["commit"] == "0123abc"


@pytest.mark.parametrize(
  ("device", "folder"),
  [
    ("cpu", "cpu"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
  ],
)
def test_every_card_has_a_folder_of_its_own(device, folder):
  path = timing.results_path("bench_ops", device)
  assert path == timing.RESULTS / folder / "bench_ops.json"


@pytest.mark.parametrize(
  ("main", "flags", "message"),
  [
    (bench_ops.main, "--shapes tiny --ops upp", "invalid choice: 'upp'"),
    (bench_ops.main, "--shapes tiny --implementations cu", "invalid choice"),
    (bench_mlp.main, "--shapes tiny --implementations sonic", "'sonic'"),
    (bench_mlp.main, "--shapes tiny --directions backward", "'backward'"),
    (bench_mlp.main, "--shapes tiny --routing odd", "invalid choice: 'odd'"),
    (bench_mlp.main, "--shapes tiny --backend xla --write", "the default"),
    (bench_memory.main, "--shapes tiny --backend xla --write", "the default"),
    (bench_memory.main, "--shapes tiny --variants h_chunks_2",
     "h_chunks_2: expected chunks_N"),
    (bench_attention.main, "--tiny --implementation xla --write",
     "the default"),
    (bench_attention.main, "--tiny --directions backward", "invalid choice"),
    (bench_train.main, "--tiny --variants dens", "invalid choice: 'dens'"),
  ],
)  # fmt: skip
def test_what_nobody_measures_is_refused(
  main, flags, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(timing, "results_path", lambda bench: tmp_path / bench)
  with pytest.raises(SystemExit):
    main(flags.split())
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("routing", shapes.ROUTINGS)
def test_expert_ids_are_distinct(routing):
  ids = shapes.expert_ids(shapes.SHAPES["tiny"], routing)
  assert ids.shape == (48, 2)
  assert all(len(set(row)) == 2 for row in ids.tolist())


def test_bench_ops_checks_and_records():
  records = bench_ops.main(
    ["--shapes", "tiny", "--routings", "zipf", "--implementations", "xla"]
    + ["--samples", "2", "--sample-ms", "0"]
  )
  assert {r["op"] for r in records} == set(layer_products.OPS)
  assert {r["implementation"] for r in records} == {"xla", "dense"}
  for field in ("ms_median", "ms_p20", "ms_p80", "tflops", "of_dense"):
    assert all(r[field] > 0 for r in records), field


@pytest.mark.parametrize("op", ["down", "dw_up"])
def test_bench_ops_refuses_a_wrong_product(op, monkeypatch):
  right = bench_ops.compute

  def wrong(*args):
    # The last row of the last expert, or the last row of its gradient.
    result = right(*args)
    return result.at[..., -1, :].multiply(2)

  monkeypatch.setattr(bench_ops, "compute", wrong)
  with pytest.raises(AssertionError, match=f"xla {op} random: off by"):
    bench_ops.main(
      ["--shapes", "tiny", "--routings", "random", "--ops", op]
      + ["--implementations", "xla", "--samples", "2"]
    )


class JaxResults(list):
  def to_jax(self):
    return self


def test_bench_ops_measures_a_peer_that_is_right(monkeypatch, capsys):
  scale = 1.0

  def products(op, left, right, routes):
    if op == "down":
      raise peers.Absent("no down here")
    product = layer_products.products(shapes.SHAPES["tiny"])[op]
    call = lambda routing: JaxResults(
      [layer_products.compute(xla, product, left, right, routing) * scale]
    )
    return {
      name: functools.partial(call, routing) for name, routing in routes.items()
    }

  monkeypatch.setattr(bench_ops.scattermoe_adapter, "products", products)
  run = lambda: bench_ops.main(
    ["--shapes", "tiny", "--routings", "zipf", "--ops", "down", "dw_up"]
    + ["--implementations", "scattermoe", "--samples", "2", "--sample-ms", "0"]
  )
  assert {(r["op"], r["implementation"]) for r in run()} == {
    ("down", "dense"), ("dw_up", "dense"), ("dw_up", "scattermoe"),
  }  # fmt: skip
  assert "scattermoe down: no down here" in capsys.readouterr().out
  scale = 1.1
  with pytest.raises(AssertionError, match="scattermoe dw_up zipf: off by"):
    run()


def test_bench_mlp_checks_and_records():
  implementations = ["scattermoe_jax", "composed", "dense"]
  records = bench_mlp.main(
    ["--shapes", "tiny", "--backend", "xla", "--samples", "2"]
    + ["--sample-ms", "0", "--implementations", *implementations]
  )
  assert [r["implementation"] for r in records] == 2 * implementations
  step = {r["implementation"]: r for r in records[3:]}
  # h (S, 2n) in bfloat16 and ids; the composition keeps more.
  assert 0 < step["scattermoe_jax"]["held_mib"] < step["composed"]["held_mib"]
  assert step["scattermoe_jax"]["peak_mib"] > 0


@pytest.mark.parametrize(
  "width, count", [(4096, 4), (1536, 3), (512, 2), (2880, 4)]
)
def test_bench_mlp_chunks_are_whole_tiles_if_they_can(width, count):
  assert layer_steps.chunks_of(width) == count


def test_bench_mlp_says_nothing_of_dense_products_that_did_not_run(capsys):
  options = ["--shapes", "tiny", "--directions", "forward", "--backend", "xla"]
  options += ["--samples", "2", "--sample-ms", "1", "--implementations"]
  bench_mlp.main([*options, "scattermoe_jax"])
  assert "of dense" not in capsys.readouterr().out
  bench_mlp.main([*options, "scattermoe_jax", "dense"])
  assert "of dense" in capsys.readouterr().out


def test_bench_mlp_counts_what_is_held_beside_the_inputs():
  data = jax.eval_shape(
    functools.partial(layer_steps.inputs, shapes.SHAPES["tiny"], "random")
  )
  held = lambda layer: layer_steps.held_bytes(layer, data)
  one = data.x.size * data.x.dtype.itemsize
  layers = {
    "x": lambda x, *_, expert_ids: x * x,
    "as large as x": lambda x, *_, expert_ids: jnp.exp(x),
    "x and two more": lambda x, *_, expert_ids: jnp.sin(x) * x,
  }
  kept = {name: held(layer) // one for name, layer in layers.items()}
  assert kept == {"x": 0, "as large as x": 1, "x and two more": 2}
  # h (S, 2n), and the routing: ids of S rows three times and the group sizes.
  assert held(layer_steps.ours(4, "xla")) == 96 * 64 * 2 + 3 * 96 * 4 + 4 * 4
  assert held(bench_memory.variant("keep_h", 4, "xla")) == 96 * 64 * 2


@pytest.mark.parametrize(
  ("named", "result"), [("y", 0), ("dgates", 2), ("dw_in", 3), ("dw_out", 4)]
)
def test_bench_mlp_refuses_a_wrong_step(named, result, monkeypatch):
  right = layer_steps.step_of

  def wrong(layer, direction):
    def step(*args):
      results = list(right(layer, direction)(*args))
      results[result] *= -1
      return tuple(results)

    return step

  monkeypatch.setattr(layer_steps, "step_of", wrong)
  with pytest.raises(AssertionError, match=f"{named}: off by"):
    bench_mlp.main(
      ["--shapes", "tiny", "--backend", "xla", "--samples", "2"]
      + ["--implementations", "scattermoe_jax"]
      + ["--directions", "forward+backward"]
    )


@pytest.mark.parametrize("peer", peers.PEERS)
def test_absent_peers_are_skipped_with_a_word(peer, capsys):
  records = bench_mlp.main(
    ["--shapes", "tiny", "--implementations", peer, "--samples", "2"]
    + ["--directions", "forward"]
  )
  assert records == []
  said = capsys.readouterr().out
  assert "not installed" in said or "no GPU" in said


def test_bench_granularity_is_one_amount_of_work():
  widths = {
    shapes.SHAPES[n].top_k * shapes.SHAPES[n].d_expert
    for n in shapes.GRANULARITY
  }
  assert widths == {8192}
  records = bench_granularity.main(
    ["--shapes", "tiny", "--backend", "xla", "--samples", "2"]
    + ["--implementations", "dense", "--directions", "forward"]
  )
  assert [r["bench"] for r in records] == ["bench_granularity"]


@pytest.mark.parametrize(
  "shape, counts", [("C1", "2 3"), ("C2", "2 4"), ("gpt-oss-20b", "")]
)
def test_bench_memory_measures_chunks_of_whole_tiles(shape, counts):
  chunks = [f"chunks_{count}" for count in counts.split()]
  assert bench_memory.variants_of(shapes.SHAPES[shape]) == [
    *("chunks_1", *chunks, "keep_nothing", "keep_h", "keep_everything"),
    *(f"keep_h_{most}" for most in chunks[-1:]),
  ]


def test_bench_memory_keeps_less_for_less():
  records = bench_memory.main(
    ["--shapes", "tiny", "--backend", "xla", "--samples", "2"]
    + ["--sample-ms", "0", "--variants", "keep_nothing", "keep_h"]
  )
  held = {r["implementation"]: r["held_mib"] for r in records}
  assert held["keep_nothing"] < held["keep_h"] <= held["chunks_1"]
  assert records[0]["of_time"] == records[0]["of_peak"] == 1.0


def test_bench_train_counts_the_flops_of_active_weights():
  config = bench_train._TINY
  dense = bench_train.model_flops(bench_train.model_of("dense", config), 2, 16)
  routers = 6 * 2 * 16 * config.num_layers * config.d_model * config.num_experts
  assert bench_train.model_flops(config, 2, 16) == dense + routers


@pytest.fixture
def lenient():
  """A user's promotion: JAX's own attention mixes dtypes in its backward."""
  jax.config.update("jax_numpy_dtype_promotion", "standard")
  yield
  jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.mark.usefixtures("lenient")
def test_bench_train_trains_and_records():
  [record] = bench_train.main(
    ["--tiny", "--batch", "2", "--length", "16", "--steps", "2"]
    + ["--variants", "dense"]
  )
  for field in ("ms_median", "tokens_per_s", "mfu", "peak_mib", "first_loss"):
    assert record[field] > 0, field
  assert record["state_mib"] > 3 * record["params"] * 4 / 2**20
  assert record["busiest_expert"] is None, "a dense MLP has no experts"


@pytest.mark.usefixtures("lenient")
def test_bench_train_says_how_uneven_the_routing_is():
  arguments = ["--tiny", "--batch", "2", "--length", "16", "--steps", "1"]
  [record] = bench_train.main([*arguments, "--variants", "xla"])
  assert 1 < record["busiest_expert"] < bench_train._TINY.num_experts


def test_bench_train_keeps_unusual_steps_apart():
  name = lambda *args, **changes: bench_train._described(
    dataclasses.replace(bench_train._MODEL, **changes), *args
  )
  assert name(8, 2048) == "d=1024 layers=16"  # As in the records.
  assert name(2, 2048, remat=True) == "d=1024 layers=16 texts=2 x 2048 remat"


def test_bench_train_starts_from_small_weights_and_unit_scales():
  model = bench_train.Transformer(bench_train._TINY)
  optimizer = bench_train.training.make_optimizer(
    bench_train.training.TrainConfig()
  )
  shapes_of = bench_train._state_of(model, optimizer)
  state = bench_train._filled(shapes_of)
  assert bench_train.abstract(state) == shapes_of
  for path, a in jax.tree_util.tree_leaves_with_path(state.params):
    name = jax.tree_util.keystr(path)
    if a.ndim > 1:
      assert 0.5 < float(a.std()) * a.shape[-2] ** 0.5 < 2, name
    else:
      assert float(a.mean()) == ("scale" in name), name
  assert not any(a.any() for a in jax.tree.leaves(state.opt_state))


@pytest.mark.usefixtures("lenient")
def test_bench_train_keeps_what_was_measured_before_a_failure(
  tmp_path, monkeypatch
):
  path = tmp_path / "bench_train.json"
  monkeypatch.setattr(timing, "results_path", lambda bench: path)
  train = bench_train._train

  def second_fails(*given):
    if path.is_file():
      raise MemoryError("no room")
    return train(*given)

  monkeypatch.setattr(bench_train, "_train", second_fails)
  with pytest.raises(MemoryError):
    bench_train.main(
      ["--tiny", "--batch", "2", "--length", "16", "--steps", "2", "--write"]
      + ["--variants", "dense", "xla"]
    )
  assert [r["variant"] for r in json.loads(path.read_text())] == ["dense"]


@pytest.mark.parametrize("field", ["first_loss", "first_grad_norm"])
def test_bench_train_refuses_steps_that_differ(field):
  first = {"variant": "mosaic", "first_loss": 10.0, "first_grad_norm": 3.0}
  dense = first | {"variant": "dense", field: 1.2 * first[field]}
  bench_train._check([first, dense, first | {"variant": "xla"}])
  with pytest.raises(AssertionError, match=f"{field} differs"):
    bench_train._check([first, dense | {"variant": "xla"}])


@pytest.mark.usefixtures("lenient")
def test_a_dense_model_would_not_pass_for_the_mixture():
  arguments = ["--tiny", "--batch", "2", "--length", "16", "--steps", "1"]
  mixture, dense = bench_train.main([*arguments, "--variants", "xla", "dense"])
  with pytest.raises(AssertionError, match="differs"):
    bench_train._check([mixture, dense | {"variant": "triton"}])


H200 = Device("gpu", "NVIDIA H200", (9, 0), 132)
LAYER = shapes.Shape("layer", 4096, 1024, 512, 16, 4)


def problem_of(case: tune.Case) -> Problem:
  return Problem(
    LAYER.num_rows, LAYER.num_experts, *case.widths, "bfloat16", H200
  )


def test_tune_knows_every_kernel_and_few_tiles_for_each():
  cases = tune.cases(LAYER)
  assert {case.op for case in cases} == set(tuning.OPS)
  for case in cases:
    tiles = tune.pruned(case.op, problem_of(case))
    assert tiles[0] == tuning.heuristic(case.op, problem_of(case))
    assert 1 < len(set(tiles)) == len(tiles) <= tune.MOST_CANDIDATES


def test_tune_passes_its_tiles_to_the_kernel():
  if mosaic.missing_feature():
    pytest.skip(mosaic.missing_feature())
  data, routing = jax.eval_shape(
    lambda: (
      layer_products.arrays(LAYER),
      layer_products.routing_of(LAYER, "random"),
    )
  )
  for case in tune.cases(LAYER):
    texts = []
    for stages in (3, 4):
      config = TileConfig(128, 128, num_stages=stages)
      call = functools.partial(case.call, config=config)
      texts.append(str(jax.make_jaxpr(call)(data, routing)))
    assert texts[0] != texts[1], case.op


def test_tune_prefers_the_rule_but_for_clear_wins():
  rule, near, far = (TileConfig(num_stages=stages) for stages in (2, 3, 4))
  assert tune.winner({rule: 1.0, near: 0.99, far: 1.2}, rule) == rule
  assert tune.winner({rule: 1.0, near: 0.97, far: 0.9}, rule) == far


def test_tune_writes_what_lookup_then_finds(tmp_path):
  rule, best = TileConfig(128, 256, num_stages=3), TileConfig(128, 128)
  problem = Problem(4096, 16, 1024, 2048, "bfloat16", H200)
  near, far = problem._replace(d_out=1536), problem._replace(d_out=256)
  op = "up_projection"
  measured = [
    tune.Measured(op, problem, best, rule),
    tune.Measured(op, near, rule, rule),
    tune.Measured(op, far, rule, rule),
  ]
  entries = tune.table_of([measured[2].entry], measured)
  path = tmp_path / "sm90.json"
  tune.write_table(path, entries)
  read = [tuning.entry_from_json(e) for e in json.loads(path.read_text())]
  assert read == entries
  found = [tuning.lookup(op, p, read) for p in (problem, near, far)]
  # Nothing near the last is in the table: the rule speaks for it.
  assert found == [best, rule, None]
