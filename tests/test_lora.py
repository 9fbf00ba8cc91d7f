"""Adapters of experts: the same as merged weights, and PEFT's folders."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from scattermoe_jax import checkpoints, route, smoe_mlp
from scattermoe_jax import nn as smnn
from scattermoe_jax.checkpoints import reader
from scattermoe_jax.checkpoints.config_json import config_from_entries
from scattermoe_jax.models import ModelConfig, Transformer
from scattermoe_jax.nn import lora
from tests import oracle, plain
from tests.accuracy import assert_accurate
from tests.conftest import enable_x64
from tests.families import FAMILY_ENTRIES, random_variables

T, D, N, E, K, R = 13, 10, 12, 5, 2, 3
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def pair(d_in, d_out, rank=R):
  return {"a": normal(E, d_in, rank), "b": normal(E, rank, d_out)}


def some_adapters(params, rank=R, **options):
  """Adapters with a B that is not zero."""
  adapters = lora.init_adapters(jax.random.key(0), params, rank=rank, **options)
  return jax.tree.map(lambda x: x + 0.1 * normal(*x.shape), adapters)


@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu", "relu2"])
def test_adapted_experts_equal_merged_ones(activation):
  width = N if activation == "relu2" else 2 * N
  x, gates = normal(T, D), normal(T, K)
  # The last tokens are padding: 'not here'.
  expert_ids = np.sort(
    RANDOM.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :K]
  )
  expert_ids[-2:] = E
  weights = {"w_in": normal(E, D, width), "w_out": normal(E, N, D)}
  biases = {"bias_in": normal(E, width), "bias_out": normal(E, D)}
  adapters = {"w_in": pair(D, width), "w_out": pair(N, D)}
  routing = route(jnp.asarray(expert_ids, jnp.int32), E)

  def adapted(x, gates, adapters):
    return lora.adapted_smoe_mlp(
      x, gates, routing, **weights, **biases, activation=activation,
      adapter_in=adapters["w_in"], adapter_out=adapters["w_out"],
    )  # fmt: skip

  def merged(x, gates, adapters):
    full = {
      name: w
      + jnp.einsum("edr,ern->edn", adapters[name]["a"], adapters[name]["b"])
      for name, w in weights.items()
    }
    return smoe_mlp(x, gates, routing, **full, **biases, activation=activation)

  full = {
    name: oracle.f64(w)
    + oracle.f64(adapters[name]["a"]) @ oracle.f64(adapters[name]["b"])
    for name, w in weights.items()
  }
  expected = oracle.smoe_mlp(
    x, gates, expert_ids, **full, **biases, activation=activation
  )
  arguments = (x, gates, adapters)
  got, baseline = (jax.jit(f)(*arguments) for f in (adapted, merged))
  assert_accurate(got, expected, baseline)

  weight = normal(T, D)
  loss = lambda f: lambda *args: (f(*args) * weight).sum()
  with enable_x64():
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
    weights, biases, weight = jax.tree.map(
      lambda a: jnp.asarray(a, jnp.float64), (weights, biases, weight)
    )
    got, expected = (
      jax.jit(jax.grad(loss(f), argnums=(0, 1, 2)))(*wide)
      for f in (adapted, merged)
    )
  for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    assert np.max(np.abs(a - b)) <= 1e-12 * np.max(np.abs(b))


def test_adapters_of_one_choice_a_token_equal_merged_ones():
  ids = RANDOM.integers(0, E + 1, (T, 1))  # E: not here
  gates, routing = normal(T, 1), route(jnp.asarray(ids), E)
  x, w, w_in = normal(T, D), normal(E, N, D), normal(E, D, 2 * N)
  adapter = pair(N, D)
  rows = normal(T, N)
  merged = w + jnp.einsum("enr,erd->end", adapter["a"], adapter["b"])

  @jax.jit
  def adapted(x, rows):
    return lora.adapted_smoe_mlp(
      x, gates, routing, w_in, w, adapter_in=None, adapter_out=adapter
    ), lora.adapted_linear_combine(rows, gates, routing, w, adapter=adapter)

  @jax.jit
  def baseline(x, rows):
    products = plain.linear(rows[:, None], merged, jnp.asarray(ids))[:, 0]
    return plain.smoe_mlp(
      x, gates, jnp.asarray(ids), w_in, merged
    ), gates * products

  products = oracle.scatter2scatter(rows, merged, ids, grouped_out=True)
  truth = (
    oracle.smoe_mlp(x, gates, ids, w_in, merged),
    oracle.combine(products, gates, ids, E),
  )
  for results in zip(adapted(x, rows), truth, baseline(x, rows), strict=True):
    assert_accurate(*results)


@pytest.mark.parametrize("attention", ["mha", "moa"])
def test_a_model_with_adapters_equals_the_merged_model(attention):
  config = ModelConfig(
    num_layers=1, attention=attention, num_kv_heads=2, attention_top_k=2
  )
  params = random_variables(config)["params"]
  targets = lora.EXPERT_WEIGHTS
  if attention == "moa":
    targets = (*targets, "kernel")
  adapters = some_adapters(params, targets=targets)
  names = {path[-2] for path in flatten_dict(adapters)}
  assert names == {"w_gate_up", "w_out"} | (
    {"kernel"} if attention == "moa" else set()
  )
  input_ids = jnp.asarray(RANDOM.integers(0, 256, (2, 7)), jnp.int32)
  logits = jax.jit(
    lambda params: (
      Transformer(config).apply({"params": params}, input_ids).logits
    )
  )
  adapted = logits(lora.with_adapters(params, adapters))
  merged, _ = lora.merge(params, adapters)
  scale = np.max(np.abs(adapted))
  assert np.max(np.abs(adapted - logits(merged))) <= 1e-5 * scale
  assert np.max(np.abs(adapted - logits(params))) > 0.05 * scale
  # Adapters as they begin change nothing.
  fresh = lora.init_adapters(jax.random.key(0), params, rank=R, targets=targets)
  unchanged = logits(lora.with_adapters(params, fresh))
  assert np.max(np.abs(unchanged - logits(params))) <= 1e-5 * scale


def test_only_adapters_learn():
  config = ModelConfig(num_layers=1)
  params = random_variables(config)["params"]
  adapters = some_adapters(params)
  input_ids = jnp.asarray(RANDOM.integers(0, 256, (2, 7)), jnp.int32)

  def loss(params, adapters):
    variables = {"params": lora.with_adapters(params, adapters)}
    return Transformer(config).apply(variables, input_ids).logits.var()

  grads, adapter_grads = jax.jit(jax.grad(loss, (0, 1)))(params, adapters)
  assert all((g == 0).all() for g in jax.tree.leaves(grads))
  assert all((g != 0).any() for g in jax.tree.leaves(adapter_grads))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [0.3, 1e4])
def test_unmerge_gives_back_every_bit(dtype, size):
  params = {
    "experts": {"w_out": normal(E, N, D).astype(dtype)},
    "other": normal(3),
  }
  adapters = lora.init_adapters(jax.random.key(0), params, rank=R)
  adapters = jax.tree.map(
    lambda x: jnp.asarray(size * normal(*x.shape), x.dtype), adapters
  )
  merged, remainder = lora.merge(params, adapters)
  a, b = (
    oracle.f64(adapters["experts"]["lora"]["w_out"][name]) for name in "ab"
  )
  w = params["experts"]["w_out"]
  assert_accurate(merged["experts"]["w_out"], oracle.f64(w) + a @ b, None)
  assert (merged["experts"]["w_out"] != w).any()
  back = lora.unmerge(merged, remainder)
  np.testing.assert_array_equal(
    np.asarray(back["experts"]["w_out"]).view(np.uint8),
    np.asarray(w).view(np.uint8),
  )
  assert back["other"] is params["other"]


class Stacked(nn.Module):
  """Three blocks in one array, each with a dense MLP in it, by nn.scan."""

  @nn.compact
  def __call__(self, x):
    scanned = nn.scan(
      lambda module, x: (x + module(x)[0], None),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=3,
    )
    block = smnn.SMoEBlock(E, K, N, num_shared_experts=1, name="block")
    return scanned(block, x)[0]


def test_stacked_layers_have_adapters_each():
  model, x = Stacked(), normal(T, D)
  params = jax.jit(model.init)(jax.random.key(0), x)["params"]
  adapters = some_adapters(params, stacked_axes=1)
  assert {p: a.shape for p, a in flatten_dict(adapters, sep="/").items()} == {
    "block/experts/lora/w_gate_up/a": (3, E, D, R),
    "block/experts/lora/w_gate_up/b": (3, E, R, 2 * N),
    "block/experts/lora/w_out/a": (3, E, N, R),
    "block/experts/lora/w_out/b": (3, E, R, D),
  }
  apply = jax.jit(lambda params: model.apply({"params": params}, x))
  adapted = apply(lora.with_adapters(params, adapters))
  merged, remainder = lora.merge(params, adapters)
  scale = np.max(np.abs(adapted))
  assert np.max(np.abs(adapted - apply(merged))) <= 1e-5 * scale
  assert np.max(np.abs(adapted - apply(params))) > 0.05 * scale
  back = lora.unmerge(merged, remainder)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_every_weight_has_a_random_a_of_its_own():
  w = jnp.zeros((E, D, N))
  params = {f"layer_{i}": {"experts": {"w_in": w}} for i in range(2)}
  adapters = lora.init_adapters(jax.random.key(0), params, rank=R)
  first, second = (
    layer["experts"]["lora"]["w_in"]["a"] for layer in adapters.values()
  )
  assert np.all(first != second)


def test_a_of_a_stack_is_as_large_as_of_one_layer():
  w = {"w_out": jnp.zeros((E, N, D))}
  stacked = {"w_out": jnp.zeros((40, E, N, D))}
  one = lora.init_adapters(jax.random.key(0), w, rank=R)
  all_ = lora.init_adapters(jax.random.key(0), stacked, rank=R, stacked_axes=1)
  ratio = all_["lora"]["w_out"]["a"].std() / one["lora"]["w_out"]["a"].std()
  assert 0.8 < ratio < 1.25


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      dict(targets=["w9"]),
      r"named \['w9'\]; of 3 axes they have \['w_gate_up'",
    ),
    (dict(targets=["w_out", "w_uot"]), r"named \['w_uot'\]; of 3"),
    (dict(targets=["w_out", "kernel"]), r"named \['kernel'\]; of 3"),
    (dict(targets="w_uot"), r"named \['w_uot'\]; of 3"),
    (dict(stacked_axes=1), r"named \[.*\]; of 4 axes they have \[\]"),
    (dict(rank=0), "rank must be at least 1, got 0"),
    (dict(stacked_axes=-1), "stacked_axes must be at least 0, got -1"),
  ],
  ids=["none", "one-of-two", "matrix", "alone", "stacked", "rank", "axes"],
)
def test_what_cannot_be_adapted_is_said(options, message):
  params = random_variables(ModelConfig(num_layers=1))["params"]
  with pytest.raises(ValueError, match=f"init_adapters: .*{message}"):
    lora.init_adapters(jax.random.key(0), params, **{"rank": 2, **options})


@pytest.mark.parametrize("got", [True, 1.5, "1", None])
@pytest.mark.parametrize("name", ["rank", "stacked_axes"])
def test_numbers_of_adapters_are_ints(unchecked, name, got):
  params = {"w_out": normal(E, N, D)}
  message = f"^init_adapters: {name} must be a static int, got {got!r}"
  with pytest.raises(TypeError, match=message):
    lora.init_adapters(jax.random.key(0), params, **{"rank": 2, name: got})


def test_one_name_of_a_weight_is_enough():
  params = {name: normal(E, N, D) for name in ("w_out", "out")}
  key = jax.random.key(0)
  adapters = lora.init_adapters(key, params, rank=2, targets="w_out")
  assert {path[-2] for path in flatten_dict(adapters)} == {"w_out"}


def test_kernels_of_other_layers_are_left_alone():
  shapes = {"conv": (3, 3, 8, 8), "q": (4, 8, 8), "dense": (8, 8)}
  params = {name: {"kernel": jnp.zeros(s)} for name, s in shapes.items()}
  adapters = lora.init_adapters(
    jax.random.key(0), params, rank=2, targets=("kernel",)
  )
  assert adapters.keys() == {"q"}


def test_stacked_layers_want_a_word():
  w = {"w_out": jnp.zeros((3, E, N, D))}
  with pytest.raises(ValueError, match="'w_out' of .* pass stacked_axes = 1"):
    lora.init_adapters(jax.random.key(0), w, rank=2)


@pytest.mark.parametrize(
  ("name", "num_experts"), [("experts", E), ("experts", 3), ("ffn", E)]
)
def test_layers_in_part_stacked_are_adapted_in_parts(name, num_experts):
  params = {
    "all": {name: {"w_out": jnp.zeros((3, num_experts, N, D))}},
    "one": {name: {"w_out": jnp.zeros((num_experts, N, D))}},
  }
  init = functools.partial(lora.init_adapters, jax.random.key(0), rank=2)
  with pytest.raises(
    ValueError, match=f"'one/{name}/w_out' of .* fewer .* a call of its own"
  ):
    init(params, stacked_axes=1)
  parts = init({"all": params["all"]}, stacked_axes=1)
  parts |= init({"one": params["one"]})
  assert lora.with_adapters(params, parts).keys() == params.keys()


def test_boxes_of_parameters_stay_those_of_adapters_go():
  box = functools.partial(nn.Partitioned, names=("expert", None, None))
  plain = {"experts": {"w_out": normal(E, N, D)}, "norm": normal(D)}
  params = {**plain, "experts": {"w_out": box(plain["experts"]["w_out"])}}
  adapters = some_adapters(params)
  boxed_adapters = jax.tree.map(box, adapters)
  expected, _ = lora.merge(plain, adapters)
  same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  for some in (adapters, boxed_adapters):
    merged, remainder = lora.merge(params, some)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    same(nn.unbox(merged), expected)
    same(lora.unmerge(merged, remainder), params)
    beside = lora.with_adapters(params, some)["experts"]
    assert beside["w_out"].names == ("expert", None, None)
    same({"experts": {"lora": beside["lora"]}}, adapters)


@pytest.mark.parametrize("function", [lora.with_adapters, lora.merge])
@pytest.mark.parametrize(
  ("path", "shapes", "message"),
  [
    ("experts/lora/w_uot", ((E, N, 2), (E, 2, D)),
     r"no weight 'experts/w_uot' to adapt; there are \['experts/w_out'\]"),
    ("lora/w_out", ((E, N, 2), (E, 2, D)), "no weight 'w_out' to adapt"),
    ("experts/lora/w_out", ((E, N, 2), (E, 2, N)),
     r"'experts/w_out' has shape \(5, 12, 10\), its adapter .* \(5, 2, 12\)"),
    ("experts/lora/w_out", ((E, N, 2), (E, 3, D)), "its adapter"),
    ("experts/lora/w_out", ((E, N, 2),), "a' is no half of an adapter"),
    ("experts/w_out", ((E, N, 2), (E, 2, D)), "a' is no half of an adapter"),
    ("experts/lora/w_out", (None, (E, 2, D)), "'experts/lora/w_out/a' is None"),
    ("experts/lora/w_out", ((E, N, 2), None), "'experts/lora/w_out/b' is None"),
  ],
  ids=["name", "place", "shape", "rank", "half", "weight", "no-a", "no-b"],
)  # fmt: skip
def test_adapters_of_another_model_are_refused(function, path, shapes, message):
  params = {"experts": {"w_out": normal(E, N, D)}, "norm": normal(D)}
  names = [f"{path}/{name}" for name in "ab"[: len(shapes)]]
  leaves = {n: s and normal(*s) for n, s in zip(names, shapes, strict=True)}
  with pytest.raises(ValueError, match=f"{function.__name__}: .*{message}"):
    function(params, unflatten_dict(leaves, sep="/"))


# PEFT's folders


def family_params(family, dtype="float32"):
  config = config_from_entries(FAMILY_ENTRIES[family], "config.json")
  return random_variables(config, dtype)["params"]


@pytest.mark.parametrize("family", [*FAMILY_ENTRIES, None])
def test_adapters_survive_their_folder(family, tmp_path):
  params = family_params(family or "jetmoe")
  adapters = some_adapters(params)
  checkpoints.save_adapters(tmp_path / "a", adapters, family=family, base="x")
  again = checkpoints.load_adapters(tmp_path / "a", params, family=family)
  assert jax.tree.structure(again) == jax.tree.structure(adapters)
  jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_the_files_are_pefts(tmp_path):
  params = family_params("mixtral")
  adapters = some_adapters(params)
  checkpoints.save_adapters(
    tmp_path / "a", adapters, family="mixtral", base="x"
  )
  tensors = reader.read_header(tmp_path / "a" / "adapter_model.safetensors")
  assert len(tensors) == 2 * 5 * 3 * 2  # layers, experts, matrices, A and B
  pair = adapters["layer_1"]["ffn"]["experts"]["lora"]["w_gate_up"]
  expert = "base_model.model.model.layers.1.block_sparse_moe.experts.3"
  for name, expected in {
    "w1.lora_A": pair["a"][3].T,
    "w3.lora_A": pair["a"][3].T,
    "w1.lora_B": pair["b"][3, :, :24].T,
    "w3.lora_B": pair["b"][3, :, 24:].T,
  }.items():
    got = tensors[f"{expert}.{name}.weight"].read()
    np.testing.assert_array_equal(got, expected, err_msg=name)
  entries = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
  assert (entries["r"], entries["lora_alpha"]) == (R, R)
  assert entries["base_model_name_or_path"] == "x"


def test_factors_of_other_programs_are_understood(tmp_path):
  """Gate and up with an A each, some experts alone, and a scale."""
  params = family_params("mixtral")
  adapters = some_adapters(params)
  checkpoints.save_adapters(tmp_path / "a", adapters, family="mixtral")
  path = tmp_path / "a" / "adapter_model.safetensors"
  tensors = {n: t.read() for n, t in reader.read_header(path).items()}
  prefix = "base_model.model.model.layers.0.block_sparse_moe.experts."
  a_up = np.asarray(normal(R, 32))
  tensors[f"{prefix}1.w3.lora_A.weight"] = a_up
  for letter in "AB":
    del tensors[f"{prefix}2.w2.lora_{letter}.weight"]
  from scattermoe_jax.checkpoints import writer

  writer.write_file(
    path,
    [
      writer.TensorToWrite(n, x.dtype, x.shape, lambda x=x: x)
      for n, x in tensors.items()
    ],
  )
  config = tmp_path / "a" / "adapter_config.json"
  entries = json.loads(config.read_text()) | {"lora_alpha": 2 * R}
  config.write_text(json.dumps(entries))
  loaded = checkpoints.load_adapters(tmp_path / "a", params, family="mixtral")
  ours = adapters["layer_0"]["ffn"]["experts"]["lora"]
  got = loaded["layer_0"]["ffn"]["experts"]["lora"]
  delta = lambda pair: 2 * np.asarray(pair["a"] @ pair["b"])
  expected = delta(ours["w_gate_up"])
  expected[1, :, 24:] = (
    2 * a_up.T @ np.asarray(ours["w_gate_up"]["b"])[1, :, 24:]
  )
  close = dict(rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(delta(got["w_gate_up"]) / 2, expected, **close)
  expected = delta(ours["w_out"])
  expected[2] = 0
  np.testing.assert_allclose(delta(got["w_out"]) / 2, expected, **close)
  # The other layer, which has one A, keeps its rank.
  assert (
    loaded["layer_1"]["ffn"]["experts"]["lora"]["w_gate_up"]["a"].shape[2] == R
  )
