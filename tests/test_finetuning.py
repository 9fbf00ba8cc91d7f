"""Training that goes on with a folder's weights, all of them or adapters."""

import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tokenizers")

import tokenizers

from scattermoe_jax import checkpoints
from scattermoe_jax.checkpoints.config_json import config_from_entries
from scattermoe_jax.models import (
  ModelConfig,
  Transformer,
  data,
  generate,
  tokens,
  train,
)
from scattermoe_jax.models.training import cross_entropy
from scattermoe_jax.nn import lora
from tests.families import FAMILY_ENTRIES, random_variables

MIXTRAL = FAMILY_ENTRIES["mixtral"] | {"num_hidden_layers": 1}
WORDS = ["the", "cat", "sat", "on", "a", "large", "mat", ".", "\n"]
LENGTH = 8
FLAGS = (
  "--batch-size=2 --sequence-length=8 --steps=6 --warmup-steps=1 "
  "--evaluate-every=6 --checkpoint-every=4 --validation-batches=2 "
  "--sample-tokens=3 --learning-rate=0.02"
).split()


def save_tokenizer(directory, vocabulary):
  model = tokenizers.models.WordLevel(vocabulary, next(iter(vocabulary)))
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
  tokenizer.save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """A folder with base/, a Mixtral of words, and text.txt."""
  work = tmp_path_factory.mktemp("finetuning")
  config = config_from_entries(MIXTRAL, "config.json")
  variables = random_variables(config)
  checkpoints.save(work / "base", config, variables, family="mixtral")
  save_tokenizer(work / "base", {word: 3 * i for i, word in enumerate(WORDS)})
  random = np.random.default_rng(0)
  (work / "text.txt").write_text(" ".join(random.choice(WORDS, 1200)))
  return work


def train_from(work, name, *flags):
  out = work / "runs" / name
  code = train.main(
    ["--init-from", str(work / "base"), "--data", str(work / "text.txt"),
     "--out", str(out), "--prompt=the cat", *FLAGS, *flags]
  )  # fmt: skip
  assert code == 0
  return out


@pytest.fixture(scope="module")
def whole(work):
  return train_from(work, "whole")


@pytest.fixture(scope="module")
def adapted(work):
  return train_from(work, "adapted", "--lora-rank=2")


def held_out_bits(work, config, variables):
  """Bits per held-out byte, from the definition: nats of a token by its bytes.

  Every token but the last is followed by a space, which belongs to it.
  """
  corpus = data.load_corpus(work / "text.txt")
  words = corpus.validation.tobytes().decode().split(" ")
  # The text is cut in two anywhere: a part of a word is no token.
  ids = np.array([3 * WORDS.index(word) for word in words if word in WORDS])
  batches = data.validation_batches(
    ids, num_batches=2, batch_size=2, sequence_length=LENGTH
  )
  logits = jax.jit(
    lambda variables, batch: Transformer(config).apply(variables, batch).logits
  )
  losses = [
    cross_entropy(logits(variables, batch[:, :-1]), jnp.asarray(batch[:, 1:]))
    for batch in batches
  ]
  nats = float(np.mean(losses)) * len(ids) / corpus.validation.size
  return nats / math.log(2)


def summary_of(run):
  summary = json.loads((run / "summary.json").read_text())
  (model,) = summary["models"]  # No twin.
  return summary["baselines"], model


def same(a, b):
  return jax.tree.map(lambda x, y: bool((x == y).all()), a, b)


def test_all_weights_learn_and_keep_their_family(work, whole):
  assert checkpoints.read_family(whole / "export") == "mixtral"
  tokenizer = (work / "base" / "tokenizer.json").read_text()
  assert (whole / "export" / "tokenizer.json").read_text() == tokenizer
  config, before = checkpoints.load(work / "base")
  again, after = checkpoints.load(whole / "export")
  assert again == config
  assert not any(jax.tree.leaves(same(before, after)))
  baselines, model = summary_of(whole)
  assert model["validation_bits"] < baselines["as loaded"]
  assert model["trained_params"] == model["params"]


@pytest.mark.parametrize("name", ["whole", "adapted"])
def test_bits_are_those_of_a_byte(name, work, request):
  run = request.getfixturevalue(name)
  baselines, model = summary_of(run)
  config, variables = checkpoints.load(work / "base")
  loaded = held_out_bits(work, config, variables)
  np.testing.assert_allclose(baselines["as loaded"], loaded, rtol=1e-5)
  if name == "whole":
    config, variables = checkpoints.load(run / "export")
  else:
    params = variables["params"]
    adapters = checkpoints.load_adapters(
      run / "adapters", params, family="mixtral"
    )
    variables = {"params": lora.merge(params, adapters)[0]}
  learned = held_out_bits(work, config, variables)
  np.testing.assert_allclose(model["validation_bits"], learned, rtol=1e-5)
  # Baselines are of bytes, whatever the tokens.
  corpus = data.load_corpus(work / "text.txt")
  assert baselines["uniform"] == 8
  assert baselines["unigram"] == data.unigram_bits(corpus)
  lines = (run / "metrics.jsonl").read_text().splitlines()
  first = next(m["bits"] for m in map(json.loads, lines) if "bits" in m)
  assert abs(first - loaded) < 0.5 * loaded  # Not bits of a token.


def test_adapters_alone_learn(work, adapted, monkeypatch, capsys):
  baselines, model = summary_of(adapted)
  assert model["validation_bits"] < baselines["as loaded"]
  _, variables = checkpoints.load(work / "base")
  params = variables["params"]
  adapters = lora.init_adapters(jax.random.key(0), params, rank=2)
  count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert (model["trained_params"], model["params"]) == (count, size + count)
  assert not (adapted / "export").exists()
  # The adapters know their base.
  flags = ["--prompt=the cat", "--max-tokens=4", "--temperature=0"]
  folder = str(adapted / "adapters")
  assert generate.main(["--adapters", folder, *flags]) == 0
  alone = capsys.readouterr().out
  base = str(work / "base")
  command = ["--checkpoint", base, "--adapters", folder, *flags]
  assert generate.main(command) == 0
  assert capsys.readouterr().out == alone
  merged = []
  monkeypatch.setattr(
    generate, "merge", lambda *trees: merged.append(trees[1]) or (params, None)
  )
  assert generate.main(command) == 0
  assert all((leaf != 0).any() for leaf in jax.tree.leaves(merged))


class Killed(BaseException):
  """Stands for a kill."""


@pytest.mark.slow
def test_killed_adapters_go_on_to_the_same_weights(work, adapted, monkeypatch):
  count = itertools.count()
  make_batch = train._batch

  def batch_or_die(*args):
    if next(count) == 4:  # After the checkpoint of step 4.
      raise Killed
    return make_batch(*args)

  monkeypatch.setattr(train, "_batch", batch_or_die)
  with pytest.raises(Killed):
    train_from(work, "killed", "--lora-rank=2")
  monkeypatch.setattr(train, "_batch", make_batch)
  killed = work / "runs" / "killed"
  # Frozen weights are in no checkpoint.
  stored = sum(
    file.stat().st_size
    for file in (killed / "checkpoints" / "moe" / "4" / "state").rglob("*")
  )
  base = (work / "base" / "model.safetensors").stat().st_size
  assert stored < base
  assert train.main(["--resume", str(killed)]) == 0
  name = pathlib.Path("adapters", "adapter_model.safetensors")
  assert (killed / name).read_bytes() == (adapted / name).read_bytes()
  assert (
    summary_of(killed)[1]["validation_bits"]
    == (summary_of(adapted)[1]["validation_bits"])
  )


@pytest.mark.slow
def test_bytes_go_on_from_where_a_run_ended(tmp_path):
  """What a run reported last is what the next one finds, to the last bit."""
  text = tmp_path / "text.txt"
  text.write_text("the cat sat on the mat. " * 60)
  model = "d_model=8 num_heads=2 num_kv_heads=2 head_dim=4 num_experts=4 "
  model += "d_expert=4 num_layers=1 scoring=sigmoid selection_bias=True"
  # A bias so large that the choices hang on it.
  common = ["--data", str(text), *FLAGS, "--selection-bias-rate=0.5"]
  first, second = tmp_path / "first", tmp_path / "second"
  settings = [f"--set={field}" for field in model.split()]
  command = [*common, "--no-twin", "--out", str(first), *settings]
  assert train.main(command) == 0
  command = [*common, "--init-from", str(first / "export"), "--out", second]
  assert train.main([*map(str, command), "--steps=1"]) == 0
  _, before = summary_of(first)
  baselines, _ = summary_of(second)
  assert baselines["as loaded"] == before["validation_bits"]


@pytest.mark.slow
def test_bfloat16_weights_learn_in_float32(work, tmp_path):
  config = config_from_entries(MIXTRAL, "config.json")
  variables = random_variables(config, "bfloat16")
  config = ModelConfig.from_dict(
    config.to_dict() | {"dtype": "bfloat16", "param_dtype": "bfloat16"}
  )
  base = tmp_path / "base"
  checkpoints.save(base, config, variables, family="mixtral")
  save_tokenizer(base, {word: i for i, word in enumerate(WORDS)})
  out = tmp_path / "out"
  common = ["--init-from", base, "--data", work / "text.txt", *FLAGS]
  # Steps that bfloat16 would round away add up.
  flags = ["--prompt=cat", "--out", out, "--learning-rate=0.0002"]
  # The backward of JAX's attention mixes dtypes; programs never set "strict".
  with jax.numpy_dtype_promotion("standard"):
    assert train.main([*map(str, [*common, *flags])]) == 0
  settings = json.loads((out / "config.json").read_text())["settings"]
  assert settings["model"]["param_dtype"] == "float32"
  assert settings["model"]["dtype"] == "bfloat16"
  again, after = checkpoints.load(out / "export")
  assert again.param_dtype == "bfloat16"
  scale = lambda v: v["params"]["layer_0"]["ffn_norm"]["scale"]
  assert scale(after).dtype == jnp.bfloat16
  assert (scale(after) != scale(variables)).any()


def test_a_corpus_in_pieces_is_the_corpus_in_tokens(work, monkeypatch):
  monkeypatch.setattr(tokens, "_PIECE", 50)
  monkeypatch.setattr(tokens, "_PIECES_AT_ONCE", 3)
  vocabulary = tokens.training_vocabulary(work / "base", 97)
  # A line ends in a space, so that no token goes over the end of a piece.
  text = "the cat sat on the mat . \n" * 40
  ids = vocabulary.encode_corpus(np.frombuffer(text.encode(), np.uint8))
  words = text.replace("\n", "").split()
  pieces = list(tokens._pieces(text))
  assert "".join(pieces) == text and len(pieces) == 20
  got = [i for i in ids.tolist() if i != 3 * WORDS.index("\n")]
  assert got == [3 * WORDS.index(word) for word in words]


def write(path, text="{}"):
  path.write_text(text)


@pytest.mark.parametrize(
  ("spoil", "flags", "message"),
  [
    (None, ["--init-from=/nowhere"], "--init-from /nowhere: /nowhere/config"),
    (None, ["--lora-rank=-1"], "--lora-rank must be at least 0, got -1"),
    (None, ["--set=d_model=64"], "d_model = 64: the weights of"),
    (None, ["--attention=moa"], "have 'mha'; --set can change dtype, impl"),
    (None, ["--lora-rank=1", "--mesh=data=2"], "without --mesh"),
    (None, ["--prompt="], "--prompt '' has no token"),
    (None, ["--sequence-length=90"], "tokens; a sequence of 90 needs 91"),
    (lambda base: (base / "tokenizer.json").unlink(), [],
     "there is no tokenizer.json, and vocab_size = 97 is too small for bytes"),
    (lambda base: (base / "tokenizer.json").rename(base / "vocab.json"), [],
     "there is a vocab.json but no tokenizer.json"),
    (lambda base: write(base / "tokenizer.json"), [], "is no tokenizer"),
    (lambda base: save_tokenizer(base, {"the": 1, "cat": 97}), [],
     "gives the token 97; the model's vocab_size is 97"),
    (lambda base: write(base / "config.json"), [], "model_type None is not"),
  ],
  ids=["folder", "rank", "set", "attention", "mesh", "prompt", "length",
       "small", "other-tokenizer", "broken", "large-token", "config"],
)  # fmt: skip
def test_what_cannot_go_on_is_said_and_nothing_is_written(
  spoil, flags, message, work, tmp_path, capsys
):
  base = tmp_path / "base"
  base.mkdir()
  for file in (work / "base").iterdir():
    (base / file.name).write_bytes(file.read_bytes())
  if spoil is not None:
    spoil(base)
  out = tmp_path / "out"
  code = train.main(
    ["--init-from", str(base), "--data", str(work / "text.txt"),
     "--out", str(out), "--prompt=the", *FLAGS, *flags]
  )  # fmt: skip
  said = capsys.readouterr().err
  assert code == 2
  assert said.startswith("error: ") and message in said
  assert said.count("\n") == 1
  assert not out.exists()


def test_adapters_need_a_model(capsys, tmp_path):
  assert train.main(["--lora-rank=2", "--data=/nowhere"]) == 2
  assert "name their folder with --init-from" in capsys.readouterr().err
  (tmp_path / "adapter_config.json").write_text(
    json.dumps({"base_model_name_or_path": "mistralai/Mixtral"})
  )
  assert generate.main(["--adapters", str(tmp_path)]) == 2
  said = capsys.readouterr().err
  assert "they adapt is mistralai/Mixtral; name its folder" in said
