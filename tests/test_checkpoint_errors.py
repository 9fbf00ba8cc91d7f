"""Folders that are not whole or do not fit: one sentence, nothing half done."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import checkpoints, sharding
from scattermoe_jax.checkpoints import reader, writer
from scattermoe_jax.checkpoints.config_json import config_from_entries
from scattermoe_jax.models import ModelConfig
from scattermoe_jax.nn import lora
from tests.families import (
  FAMILY_ENTRIES,
  random_variables,
  stored,
  write_some,
)


@pytest.fixture
def mixtral(tmp_path):
  config = config_from_entries(FAMILY_ENTRIES["mixtral"], "config.json")
  directory = tmp_path / "mixtral"
  checkpoints.save(
    directory,
    config,
    random_variables(config),
    family="mixtral",
    max_shard_bytes=60_000,
  )
  return directory


def first_shard(directory) -> Path:
  return min(directory.glob("*.safetensors"))


def one_file(directory):
  """Turns shards into one file, for tests that change it."""
  tensors = {n: t.read() for n, t in reader.read_folder(directory).items()}
  for path in directory.glob("model*"):
    path.unlink()
  return tensors


def rewrite(directory, tensors):
  writer.write_tensors(directory, [stored(n, a) for n, a in tensors.items()])


_GATE = "model.layers.0.block_sparse_moe.gate.weight"


def test_a_missing_shard_is_named(mixtral):
  shard = first_shard(mixtral)
  shard.unlink()
  with pytest.raises(
    checkpoints.CheckpointError,
    match=f"{shard.name} is missing; .*index.json says that it holds tensor 'm",
  ):
    checkpoints.load(mixtral)


def test_a_truncated_file_is_named_with_its_tensor(mixtral):
  shard = first_shard(mixtral)
  last = list(reader.read_header(shard))[-1]
  os.truncate(shard, shard.stat().st_size - 1)
  with pytest.raises(
    checkpoints.CheckpointError, match=f"{shard.name} is truncated.*'{last}'"
  ):
    checkpoints.load(mixtral)
  os.truncate(shard, 100)
  with pytest.raises(
    checkpoints.CheckpointError, match=f"{shard.name} is truncated"
  ):
    checkpoints.load(mixtral)


def test_a_file_cut_while_it_is_read_is_named(tmp_path):
  array = np.ones((100, 100), np.float32)
  write_some(tmp_path / "m", {"w": array})
  tensor = reader.read_folder(tmp_path / "m")["w"]
  os.truncate(tensor.path, 20_000)
  with pytest.raises(
    checkpoints.CheckpointError, match="ended while tensor 'w'"
  ):
    tensor.read()


def test_a_missing_tensor_is_named(mixtral):
  tensors = one_file(mixtral)
  del tensors[_GATE]
  rewrite(mixtral, tensors)
  with pytest.raises(
    checkpoints.CheckpointError,
    match=f"lacks tensor '{_GATE}'.*'params/layer_0/ffn/router/kernel'",
  ):
    checkpoints.load(mixtral)


def test_a_wrong_shape_is_named(mixtral):
  tensors = one_file(mixtral)
  tensors[_GATE] = tensors[_GATE].T.copy()
  rewrite(mixtral, tensors)
  with pytest.raises(
    checkpoints.CheckpointError,
    match=rf"model.safetensors: tensor '{_GATE}' has shape \(32, 5\); "
    r"config.json says \(5, 32\)",
  ):
    checkpoints.load(mixtral)


def test_an_unexpected_tensor_is_named(mixtral):
  tensors = one_file(mixtral)
  tensors["model.layers.0.extra.weight"] = np.zeros(3, np.float32)
  rewrite(mixtral, tensors)
  with pytest.raises(
    checkpoints.CheckpointError,
    match="model.safetensors holds tensor 'model.layers.0.extra.weight'",
  ):
    checkpoints.load(mixtral)
  # Buffers of old programs are no weights.
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors.pop(
    "model.layers.0.extra.weight"
  )
  rewrite(mixtral, tensors)
  checkpoints.load(mixtral)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "gpt5"}, "config.json: model_type 'gpt5' is not known"),
    ({"model_type": ["mixtral"]}, r"model_type \['mixtral'\] is not known"),
    ({"model_type": "scattermoe_jax"}, "config.json lacks the entry 'model'"),
    ({"hidden_size": "32"}, "config.json: hidden_size = '32' is no integer"),
    ({"hidden_size": None}, "config.json lacks the entry 'hidden_size'"),
    ({"num_attention_heads": 3}, "num_heads = 3 is not a multiple"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ({"hidden_act": "tanh"}, "'tanh'"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantised as 'fp8'"),
    ({"quantization_config": "x"}, "quantization_config = 'x' is no object"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rotary .* lacks .*'factor'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
     "lacks .*'original_max_position_embeddings'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": [2]}},
     r"factor = \[2\] is no number"),
    ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' is no object"),
    ({"rope_scaling": []}, r"rope_scaling = \[\] is no object"),
    ({"rope_parameters": 3}, "rope_parameters = 3 is no object"),
    ({"rope_theta": [1e6]}, r"rope_theta = \[1000000.0\] is no number"),
    ({"num_attention_heads": 0, "head_dim": None, "num_key_value_heads": None},
     "num_heads must be at least 1, got 0"),
    ({"hidden_size": [32]}, r"hidden_size = \[32\] is no integer"),
    ({"num_hidden_layers": [2]}, r"num_hidden_layers = \[2\] is no integer"),
    ({"num_hidden_layers": True}, "num_hidden_layers = True is no integer"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' is no number"),
    ({"hidden_act": ["silu"]}, r"hidden_act = \['silu'\] is no string"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 is no boolean"),
    ({"torch_dtype": "fp16"}, "config.json: torch_dtype = 'fp16' .*'float16'"),
    ({"dtype": "int8"}, "config.json: dtype = 'int8' is not supported, only"),
    ({"torch_dtype": 16}, "torch_dtype = 16 is no string"),
  ],
)  # fmt: skip
def test_a_config_that_we_cannot_compute_is_refused(mixtral, change, message):
  path = mixtral / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(checkpoints.CheckpointError, match=message):
    checkpoints.load(mixtral)


@pytest.mark.parametrize(
  ("family", "change", "message"),
  [
    ("qwen3_moe", {"mlp_only_layers": 0}, "mlp_only_layers = 0 is no list"),
    ("qwen3_moe", {"decoder_sparse_step": "2"}, "step = '2' is no integer"),
    ("qwen3_moe", {"norm_topk_prob": "no"}, "norm_topk_prob = 'no' is no bool"),
    ("gpt_oss", {"layer_types": 0}, "layer_types = 0 is no list"),
    ("gpt_oss", {"num_hidden_layers": [2]}, r"layers = \[2\] is no integer"),
    (
      "olmoe",
      {"num_attention_heads": 0},
      "num_heads must be at least 1, got 0",
    ),
    ("jetmoe", {"num_local_experts": [5]}, r"experts = \[5\] is no integer"),
  ],
)
def test_an_entry_of_another_kind_is_refused(family, change, message):
  entries = FAMILY_ENTRIES[family] | change
  with pytest.raises(
    checkpoints.CheckpointError, match=f"config.json: .*{message}"
  ):
    config_from_entries(entries, "config.json")


def test_an_index_that_lies_is_refused(mixtral):
  path = mixtral / reader.INDEX_NAME
  index = json.loads(path.read_text())
  files = sorted(set(index["weight_map"].values()))
  for change, message in (
    ({_GATE: "../model.safetensors"}, "outside its folder"),
    ({"no.such": files[0]}, f"{files[0]} lacks tensor 'no.such'"),
    ({_GATE: None}, f"holds tensor '{_GATE}', of which"),
  ):
    weight_map = {
      name: file
      for name, file in {**index["weight_map"], **change}.items()
      if file is not None
    }
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(checkpoints.CheckpointError, match=message):
      reader.read_folder(mixtral)


def test_pickles_are_not_opened(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(
    checkpoints.CheckpointError,
    match="holds no .safetensors file. pytorch_model.bin is a pickle",
  ):
    reader.read_folder(tmp_path)


@pytest.mark.parametrize(
  ("header", "message"),
  [
    (b"not json", "header does not parse"),
    (b'{"w": {"dtype": "F32", "shape": [2]}}', "header does not parse"),
    (
      b'{"w": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 1]}}',
      "'w' has dtype Q4",
    ),
    (
      b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
      "needs 8 bytes; its header gives it 4",
    ),
  ],
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, header, message):
  path = tmp_path / "model.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
  with pytest.raises(checkpoints.CheckpointError, match=message):
    reader.read_folder(tmp_path)


def test_nothing_is_left_of_a_save_that_fails(tmp_path):
  def fail():
    raise RuntimeError("the device is gone")

  broken = stored("w", np.ones(3, np.float32))._replace(make=fail)
  with (
    pytest.raises(RuntimeError, match="device"),
    writer.new_folder(tmp_path / "m") as partial,
  ):
    writer.write_tensors(partial, [broken])
  assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
  config = ModelConfig(num_layers=1)
  variables = random_variables(config)
  (tmp_path / "m").mkdir()  # An empty folder is taken.
  checkpoints.save(tmp_path / "m", config, variables)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(checkpoints.CheckpointError, match="already exists"):
    checkpoints.save(tmp_path / "m", config, variables)
  assert sorted(tmp_path.rglob("*")) == before


def test_a_family_refuses_a_model_that_it_cannot_say(tmp_path):
  config = config_from_entries(FAMILY_ENTRIES["mixtral"], "config.json")
  variables = random_variables(config)
  with pytest.raises(
    checkpoints.CheckpointError, match="'olmoe' cannot say .*sliding_window"
  ):
    checkpoints.save(tmp_path / "m", config, variables, family="olmoe")
  with pytest.raises(checkpoints.CheckpointError, match="'gpt5' is not known"):
    checkpoints.save(tmp_path / "m", config, variables, family="gpt5")
  like = tmp_path / "like"
  like.mkdir()
  for entries, said in (({}, "None"), ({"model_type": "gpt5"}, "'gpt5'")):
    (like / "config.json").write_text(json.dumps(entries))
    with pytest.raises(
      checkpoints.CheckpointError,
      match=rf"like.config.json: model_type {said} is not known",
    ):
      checkpoints.save(tmp_path / "m", config, variables, like=like)
  variables["params"]["extra"] = {"w": jnp.zeros(2)}
  with pytest.raises(
    checkpoints.CheckpointError, match="model has no 'params/extra/w'"
  ):
    checkpoints.save(tmp_path / "m", config, variables, family="mixtral")
  assert list(tmp_path.iterdir()) == [like]


def _with_adapters(params):
  adapters = lora.init_adapters(jax.random.key(0), params, rank=2)
  return lora.with_adapters(params, adapters)


@pytest.mark.parametrize("family", [None, "mixtral"])
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda v: v["params"],
     "'embed/embedding' is in no collection; pass {'params': params}"),
    (lambda v: v | {"seen": {"x": jnp.zeros(3)}},
     "model has no 'seen/x'; it has the collections \\['params'\\]"),
    (lambda v: v | {"intermediates": {"x": (jnp.zeros(3), jnp.zeros(2))}},
     "model has no 'intermediates/x'"),
    (lambda v: {"params": _with_adapters(v["params"])},
     "'params/layer_0/ffn/experts/lora/w_gate_up/a' belongs to an adapter"),
    (lambda v: {"params": sharding.split_gate(v["params"])},
     r"has shape \(5, 32, 2, 24\); the config's model has \(5, 32, 48\); join "
     r"what a mesh splits: sharding.join_gate\(variables\)\."),
    (lambda v: {"params": {**v["params"], "embed": {"embedding": jnp.ones(9)}}},
     r"has shape \(9,\); the config's model has \(\d+, 32\)\.$"),
    (lambda v: {"params": {**v["params"], "layer_1": {}}},
     "variables lack 'params/layer_1/"),
  ],
  ids=["params", "seen", "sown", "adapters", "mesh", "shape", "layer"],
)  # fmt: skip
def test_what_would_not_load_is_not_saved(family, change, message, tmp_path):
  config = config_from_entries(FAMILY_ENTRIES["mixtral"], "config.json")
  variables = change(random_variables(config))
  with pytest.raises(checkpoints.CheckpointError, match=f"save: .*{message}"):
    checkpoints.save(tmp_path / "m", config, variables, family=family)
  assert list(tmp_path.iterdir()) == []


def family_params(family):
  config = config_from_entries(FAMILY_ENTRIES[family], "config.json")
  return random_variables(config)["params"]


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_adapters_of_another_shape_are_refused(family, tmp_path):
  """One sentence with the file and the tensor."""
  params = family_params(family)
  adapters = lora.init_adapters(jax.random.key(0), params, rank=3)
  checkpoints.save_adapters(tmp_path / "a", adapters, family=family)
  wider = jax.tree.map(
    lambda w: jnp.zeros((*w.shape[:-1], w.shape[-1] + 2)), params
  )
  with pytest.raises(
    checkpoints.CheckpointError,
    match=r"adapter_model.safetensors: tensor '.*lora_A.weight' has shape",
  ):
    checkpoints.load_adapters(tmp_path / "a", wider, family=family)


def test_adapter_folders_that_do_not_fit_are_refused(tmp_path):
  params = family_params("mixtral")
  adapters = lora.init_adapters(jax.random.key(0), params, rank=3)
  folder = tmp_path / "a"
  checkpoints.save_adapters(folder, adapters, family="mixtral")
  other = {**params, "layer_1": family_params("qwen3_moe")["layer_1"]}
  with pytest.raises(
    checkpoints.CheckpointError, match="holds tensor .*adapts no expert weight"
  ):
    checkpoints.load_adapters(folder, other, family="mixtral")
  entries = json.loads((folder / "adapter_config.json").read_text())
  for change, message in (
    ({"use_dora": True}, "use_dora = True is not supported"),
    ({"peft_type": "IA3"}, "'IA3' is not supported"),
  ):
    (folder / "adapter_config.json").write_text(json.dumps(entries | change))
    with pytest.raises(checkpoints.CheckpointError, match=message):
      checkpoints.load_adapters(folder, params, family="mixtral")
  with pytest.raises(checkpoints.CheckpointError, match="already exists"):
    checkpoints.save_adapters(folder, adapters, family="mixtral")
  stacked = jax.tree.map(lambda leaf: leaf[None], adapters)
  with pytest.raises(
    checkpoints.CheckpointError, match=r"w_gate_up' has A of shape \(1, 5, 32"
  ):
    checkpoints.save_adapters(tmp_path / "b", stacked, family="mixtral")
