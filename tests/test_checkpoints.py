"""Folders of safetensors: format, layouts, names, errors. No torch needed."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from scattermoe_jax import checkpoints
from scattermoe_jax.checkpoints import mxfp4, reader
from scattermoe_jax.checkpoints.config_json import (
  config_from_entries,
  config_to_entries,
)
from scattermoe_jax.checkpoints.layouts import LAYOUTS, copy_into, empty_aligned
from scattermoe_jax.checkpoints.names import NAMES
from scattermoe_jax.checkpoints.plan import make_plan
from scattermoe_jax.models import ModelConfig, Transformer
from tests.families import FAMILY_ENTRIES, random_variables, write_some

RANDOM = np.random.default_rng(0)


def some_tensors():
  return {
    "a.weight": RANDOM.normal(size=(5, 3)).astype(np.float32),
    "half": RANDOM.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
    "bytes": RANDOM.integers(0, 255, (7,), np.uint8),
    "scalar": np.array(3.5, np.float64),
    "none": np.zeros((0, 4), np.float16),
  }


def assert_same_tree(got, expected):
  got, expected = flatten_dict(got, sep="/"), flatten_dict(expected, sep="/")
  assert got.keys() == expected.keys()
  for path, array in expected.items():
    assert got[path].dtype == array.dtype, path
    np.testing.assert_array_equal(
      np.asarray(got[path]), np.asarray(array), err_msg=path
    )


# The format


@pytest.mark.parametrize("max_shard_bytes", [10**9, 64])
def test_folder_reads_what_was_written(tmp_path, max_shard_bytes):
  tensors = some_tensors()
  write_some(tmp_path / "m", tensors, max_shard_bytes=max_shard_bytes)
  files = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
  assert (len(files) > 1) == (max_shard_bytes == 64), files
  found = reader.read_folder(tmp_path / "m")
  assert list(found) == list(tensors)
  for name, array in tensors.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name].read(), array)


def test_chunks_are_the_rows_in_order(tmp_path):
  array = RANDOM.normal(size=(10, 3)).astype(np.float32)
  write_some(tmp_path / "m", {"w": array})
  tensor = reader.read_folder(tmp_path / "m")["w"]
  parts = [(i, rows.copy()) for i, rows in tensor.chunks(max_bytes=4 * 12)]
  assert [i for i, _ in parts] == [0, 4, 8]
  np.testing.assert_array_equal(np.concatenate([r for _, r in parts]), array)


def test_the_safetensors_library_agrees_in_both_directions(tmp_path):
  library = pytest.importorskip("safetensors.numpy")
  tensors = {
    name: array
    for name, array in some_tensors().items()
    if array.dtype != ml_dtypes.bfloat16
  }
  write_some(tmp_path / "ours", tensors)
  theirs = library.load_file(tmp_path / "ours" / "model.safetensors")
  assert theirs.keys() == tensors.keys()
  (tmp_path / "theirs").mkdir()
  library.save_file(tensors, tmp_path / "theirs" / "model.safetensors")
  ours = reader.read_folder(tmp_path / "theirs")
  for name, array in tensors.items():
    np.testing.assert_array_equal(theirs[name], array)
    np.testing.assert_array_equal(ours[name].read(), array)


# Layouts


def test_layouts_are_those_of_the_families():
  w = RANDOM.normal(size=(2, 3, 8)).astype(np.float32)  # (E, d, [g | u])
  gate, up = w[..., :4], w[..., 4:]
  interleaved = np.empty_like(w)
  interleaved[..., 0::2], interleaved[..., 1::2] = gate, up
  expected = {
    "same": w,
    "transposed": np.concatenate([gate, up], axis=-1).transpose(0, 2, 1),
    "gate": gate.transpose(0, 2, 1),
    "up": up.transpose(0, 2, 1),
    "interleaved": interleaved,
    "interleaved_transposed": interleaved.transpose(0, 2, 1),
  }
  assert expected.keys() == LAYOUTS.keys()
  for name, file in expected.items():
    layout = LAYOUTS[name]
    assert layout.file_shape(w.shape) == file.shape, name
    np.testing.assert_array_equal(layout.view(w).reshape(file.shape), file)
    back = np.full_like(w, np.nan)
    copy_into(layout.view(back), file)
    # gate and up write a half each.
    half = {"gate": np.s_[..., :4], "up": np.s_[..., 4:]}.get(name, np.s_[...])
    np.testing.assert_array_equal(back[half], w[half], err_msg=name)


@pytest.mark.parametrize("shape", [(40, 33), (3, 40, 33), (16, 1), (5,)])
def test_copies_cast_and_reach_every_element(shape):
  out = empty_aligned(shape, np.dtype(ml_dtypes.bfloat16))
  assert out.ctypes.data % 64 == 0
  view = out.swapaxes(-1, -2) if len(shape) > 1 else out
  rows = RANDOM.normal(size=view.shape).astype(np.float32)
  copy_into(view, rows)
  np.testing.assert_array_equal(view, rows.astype(ml_dtypes.bfloat16))


def test_mxfp4_is_the_definition():
  blocks = RANDOM.integers(0, 256, (3, 2, 16), np.uint8)
  blocks[0, 0, :8] = np.arange(0, 256, 34)[:8]
  scales = np.array([[127, 120], [130, 0], [127, 250]], np.uint8)
  got = mxfp4.dequantise(blocks, scales)
  expected = np.zeros((3, 64))
  for row in range(3):
    for i in range(64):
      byte = int(blocks[row, i // 32, i % 32 // 2])
      nibble = byte >> 4 if i % 2 else byte & 15
      exponent, mantissa = nibble >> 1 & 3, nibble & 1
      value = (
        (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
      )
      sign = -1 if nibble & 8 else 1
      expected[row, i] = sign * value * 2.0 ** (int(scales[row, i // 32]) - 127)
  np.testing.assert_array_equal(got, expected.astype(np.float32))


# Names and whole models


@pytest.mark.parametrize("family", FAMILY_ENTRIES)
def test_names_cover_every_weight_once(family):
  config = config_from_entries(FAMILY_ENTRIES[family], "config.json")
  shapes = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )
  shapes = {p: a.shape for p, a in flatten_dict(shapes, sep="/").items()}
  tables = [name for name in NAMES if name.startswith(family)]
  for table in [family] + [t for t in tables if t.endswith("mxfp4")]:
    plan = make_plan(table, shapes)
    names = [piece.theirs for pieces in plan.values() for piece in pieces]
    assert len(set(names)) == len(names)
    assert not any("{" in name for name in names)
    for path, pieces in plan.items():
      times = np.zeros(shapes[path], np.int8)
      for piece in pieces:
        view = piece.view(times)
        view += 1
      assert (times == 1).all(), path


@pytest.mark.parametrize("family", FAMILY_ENTRIES)
def test_config_survives_the_familys_words(family):
  config = config_from_entries(FAMILY_ENTRIES[family], "config.json")
  entries = json.loads(json.dumps(config_to_entries(config, family)))
  assert config_from_entries(entries, "config.json") == config


@pytest.mark.parametrize("family", FAMILY_ENTRIES)
def test_saved_models_load_bit_for_bit(family, tmp_path):
  config = config_from_entries(FAMILY_ENTRIES[family], "config.json")
  variables = random_variables(config, "bfloat16")
  # Small enough a bound to give several shards.
  checkpoints.save(
    tmp_path / "m", config, variables, family=family, max_shard_bytes=20_000
  )
  assert (tmp_path / "m" / reader.INDEX_NAME).exists()
  again, loaded = checkpoints.load(tmp_path / "m", dtype="bfloat16")
  assert (again.dtype, again.param_dtype) == ("bfloat16", "bfloat16")
  assert_same_tree(loaded, variables)


def test_own_names_keep_any_model(tmp_path):
  config = ModelConfig(
    num_layers=1, scoring="sigmoid", selection_bias=True, attention="moa",
    num_heads=4, num_kv_heads=2, attention_top_k=2, d_shared=16,
    param_dtype="bfloat16",
  )  # fmt: skip
  variables = random_variables(config, "bfloat16")
  assert "router_state" in variables
  checkpoints.save(tmp_path / "m", config, variables)
  again, loaded = checkpoints.load(tmp_path / "m")
  assert again == config
  assert_same_tree(loaded, variables)


def test_what_init_returns_can_be_saved_as_it_is(tmp_path):
  """Boxed with names of axes, and of a model for another machine's backend."""
  variables = random_variables(ModelConfig(num_layers=1))
  config = ModelConfig(num_layers=1, implementation="mosaic")
  boxed = jax.tree.map(
    lambda array: nn.LogicallyPartitioned(array, (None,) * array.ndim),
    variables,
  )
  checkpoints.save(tmp_path / "m", config, boxed)
  again, loaded = checkpoints.load(tmp_path / "m")
  assert again == config
  assert_same_tree(loaded, variables)


def quantise_folder(directory, target):
  """Rewrites gpt-oss experts as random MXFP4, and as their values."""
  tensors = {n: t.read() for n, t in reader.read_folder(directory).items()}
  plain, quantised = {}, {}
  for name, array in tensors.items():
    if not name.endswith(("gate_up_proj", "down_proj")):
      plain[name] = quantised[name] = array
      continue
    num_experts, d_in, d_out = array.shape
    blocks = RANDOM.integers(
      0, 256, (num_experts, d_out, d_in // 32, 16), np.uint8
    )
    scales = RANDOM.integers(120, 126, blocks.shape[:-1], np.uint8)
    quantised[f"{name}_blocks"], quantised[f"{name}_scales"] = blocks, scales
    values = mxfp4.dequantise(blocks, scales).transpose(0, 2, 1)
    plain[name] = np.ascontiguousarray(values).astype(ml_dtypes.bfloat16)
  entries = json.loads((directory / "config.json").read_text())
  for folder, written in (("plain", plain), ("mxfp4", quantised)):
    write_some(target / folder, written)
    if folder == "mxfp4":
      entries["quantization_config"] = {"quant_method": "mxfp4"}
    (target / folder / "config.json").write_text(json.dumps(entries))


def test_mxfp4_loads_as_its_values(tmp_path):
  entries = FAMILY_ENTRIES["gpt_oss"]
  config = config_from_entries(entries, "config.json")
  variables = random_variables(config, "bfloat16")
  checkpoints.save(tmp_path / "m", config, variables, family="gpt_oss")
  quantise_folder(tmp_path / "m", tmp_path)
  _, expected = checkpoints.load(tmp_path / "plain", dtype="bfloat16")
  _, got = checkpoints.load(tmp_path / "mxfp4", dtype="bfloat16")
  assert_same_tree(got, expected)
  # Saved like the quantised folder, it is not quantised any more.
  checkpoints.save(tmp_path / "back", config, got, like=tmp_path / "mxfp4")
  _, again = checkpoints.load(tmp_path / "back", dtype="bfloat16")
  assert_same_tree(again, expected)


def test_loading_casts_places_and_reports(tmp_path):
  config = ModelConfig(num_layers=1)
  variables = random_variables(config)
  checkpoints.save(tmp_path / "m", config, variables)
  seen, progress = {}, []
  config, loaded = checkpoints.load(
    tmp_path / "m",
    dtype="bfloat16",
    place=lambda path, array: seen.setdefault(path, jnp.asarray(array)),
    on_progress=lambda done, total: progress.append((done, total)),
  )
  assert config.dtype == config.param_dtype == "bfloat16"
  assert_same_tree(
    loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  )
  assert "params/layer_0/ffn/experts/w_gate_up" in seen
  size = sum(x.nbytes for x in jax.tree.leaves(loaded))
  assert progress[-1] == (size, size)
  assert progress == sorted(progress)


def test_saving_like_a_folder_takes_its_tokenizer_along(tmp_path):
  config = config_from_entries(FAMILY_ENTRIES["mixtral"], "config.json")
  variables = random_variables(config)
  checkpoints.save(tmp_path / "a", config, variables, family="mixtral")
  entries = json.loads((tmp_path / "a" / "config.json").read_text())
  entries |= {"eos_token_id": 7, "num_local_experts": None}
  (tmp_path / "a" / "config.json").write_text(json.dumps(entries))
  (tmp_path / "a" / "tokenizer.json").write_text("{}")
  checkpoints.save(tmp_path / "b", config, variables, like=tmp_path / "a")
  assert (tmp_path / "b" / "tokenizer.json").read_text() == "{}"
  entries = json.loads((tmp_path / "b" / "config.json").read_text())
  assert (entries["eos_token_id"], entries["num_local_experts"]) == (7, 5)
  assert_same_tree(checkpoints.load(tmp_path / "b")[1], variables)


def test_loading_holds_little_beside_the_model(tmp_path):
  sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
  entries = FAMILY_ENTRIES["mixtral"] | sizes | {"num_local_experts": 32}
  config = config_from_entries(entries, "config.json")
  checkpoints.save(
    tmp_path / "m", config, random_variables(config), family="mixtral"
  )
  tracemalloc.start()  # Which sees NumPy's arrays; so let them stay such.
  try:
    _, arrays = checkpoints.load(
      tmp_path / "m", place=lambda path, array: array
    )
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  size = sum(array.nbytes for array in jax.tree.leaves(arrays))
  assert size <= peak <= 1.3 * size, (peak, size)
