"""The program that continues a prompt, on tiny folders of weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import checkpoints
from scattermoe_jax.checkpoints.config_json import config_from_entries
from scattermoe_jax.models import ModelConfig, Transformer, generate
from scattermoe_jax.models.sampling import choose_token, sample
from scattermoe_jax.nn import lora
from tests.families import FAMILY_ENTRIES, random_variables

TINY = dict(num_layers=1, d_model=16, head_dim=8, d_expert=16)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
  """A folder without a tokenizer, whose window is shorter than the text."""
  entries = FAMILY_ENTRIES["mixtral"] | {"num_hidden_layers": 1}
  config = config_from_entries(entries, "config.json")
  directory = tmp_path_factory.mktemp("generate") / "mixtral"
  variables = random_variables(config)
  checkpoints.save(directory, config, variables, family="mixtral")
  return directory, config, variables


def run(capsys, *arguments):
  code = generate.main([str(a) for a in arguments])
  printed = capsys.readouterr()
  return code, printed.out, printed.err


def test_greedy_tokens_are_those_of_the_full_pass(mixtral, capsys):
  directory, config, variables = mixtral
  code, out, err = run(
    capsys, "--checkpoint", directory, "--prompt", "3 1 4 1 5",
    "--temperature", 0, "--max-tokens", 6,
  )  # fmt: skip
  assert code == 0, err
  ids = [int(word) for word in out.split()]
  assert ids[:5] == [3, 1, 4, 1, 5] and len(ids) == 11
  apply = jax.jit(Transformer(config).apply)
  logits = apply(variables, jnp.asarray([ids])).logits[0]
  assert ids[5:] == np.argmax(logits[4:-1], axis=-1).tolist()
  assert "MiB" in err and "6 tokens; prompt of 5 in" in err
  assert "tokens/s" in err


def test_seeds_decide_and_end_ids_stop(mixtral):
  _, config, variables = mixtral
  model = Transformer(config)

  def tokens(**options):
    generated = generate.generate(
      model, variables, [3, 1], max_tokens=8, **options
    )
    return [step.token for step in generated]

  first = tokens(seed=0)
  assert len(first) == 8
  assert first == tokens(seed=0)
  assert first != tokens(seed=1)
  greedy = tokens(temperature=0.0)
  assert greedy == tokens(top_p=1e-6)
  end = greedy[3]
  stopped = tokens(temperature=0.0, end_ids=frozenset([end]))
  assert stopped == greedy[: greedy.index(end) + 1]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
    ({"top_p": 0.0}, "top_p must be above 0, got 0.0"),
  ],
)
def test_odds_that_choose_nothing_are_refused(options, message):
  with pytest.raises(ValueError, match=f"choose_token: {message}"):
    choose_token(jnp.array([[0.0, 5.0]]), jax.random.key(0), **options)


def test_traced_odds_are_refused(unchecked):
  choose = lambda odds: choose_token(
    jnp.array([[0.0, 5.0]]), jax.random.key(0), temperature=odds
  )
  with pytest.raises(TypeError, match="temperature must be static, got a tr"):
    jax.jit(choose)(1.0)


def test_a_continuation_needs_a_prompt_and_a_length(mixtral, unchecked):
  _, config, variables = mixtral
  model = Transformer(config)
  prompt, key = jnp.ones((2, 3), jnp.int32), jax.random.key(0)
  for ids, num_tokens, message in (
    (prompt, 0, "sample: num_tokens must be at least 1, got 0"),
    (prompt[:, :0], 2, "sample: P must be at least 1, got 0"),
    (prompt[0], 2, r"sample: prompt_ids must have shape \(B, P\), got \(3,\)"),
  ):
    with pytest.raises(ValueError, match=message):
      sample(model, variables, ids, num_tokens, key=key)
  with pytest.raises(ValueError, match="generate: prompt_ids is empty"):
    next(generate.generate(model, variables, [], max_tokens=2))


def test_a_folder_with_a_tokenizer_takes_text(mixtral, tmp_path, capsys):
  tokenizers = pytest.importorskip("tokenizers")
  source, config, variables = mixtral
  directory = tmp_path / "m"
  checkpoints.save(directory, config, variables, like=source)
  words = {f"w{i}": i for i in range(config.vocab_size)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(directory / "tokenizer.json"))
  arguments = ("--temperature", 0, "--max-tokens", 2)
  _, ids, _ = run(capsys, "--checkpoint", source, "--prompt", "3 1", *arguments)
  code, text, err = run(
    capsys, "--checkpoint", directory, "--prompt", "w3 w1", *arguments
  )
  assert code == 0, err
  assert text.split() == [f"w{i}" for i in ids.split()]


def test_without_a_folder_the_newest_run_is_taken(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  code, _, err = run(capsys)
  assert code == 2
  assert "no trained model under runs/: train one with" in err
  config = ModelConfig(**TINY)
  checkpoints.save(
    tmp_path / "runs" / "a" / "export", config, random_variables(config)
  )
  code, out, err = run(capsys, "--prompt", "Käse", "--max-tokens", 3)
  assert code == 0, err
  assert out.startswith("Käse")


def test_adapters_are_merged(mixtral, tmp_path, capsys):
  directory, _, variables = mixtral
  adapters = lora.init_adapters(jax.random.key(0), variables["params"], rank=2)
  checkpoints.save_adapters(tmp_path / "a", adapters, family="mixtral")
  arguments = (
    "--checkpoint", directory, "--prompt", "3 1", "--max-tokens", 3,
    "--temperature", 0,
  )  # fmt: skip
  _, plain, _ = run(capsys, *arguments)
  code, adapted, err = run(capsys, *arguments, "--adapters", tmp_path / "a")
  assert code == 0, err
  assert adapted == plain  # B is still zero.


def test_what_cannot_be_done_is_said_in_one_line(mixtral, tmp_path, capsys):
  directory, _, _ = mixtral
  for arguments, message in (
    (("--prompt", "hello"), "has no tokenizer.json; give token ids"),
    (("--prompt", "3 97"), r"token ids [97] lie outside the vocabulary of 97"),
    (("--prompt", " "), "give at least one token"),
  ):
    code, _, err = run(capsys, "--checkpoint", directory, *arguments)
    assert code == 2
    assert message in err.splitlines()[-1]
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt5"}))
  code, _, err = run(capsys, "--checkpoint", tmp_path, "--prompt", "1")
  assert code == 2
  assert "model_type 'gpt5' is not known" in err
  with pytest.raises(SystemExit):
    generate.main(["--top-p", "0"])
  assert "--top-p must be above 0" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_said_so(capsys, tmp_path):
  missing = tmp_path / "missing"
  assert generate.main(["--checkpoint", str(missing), "--prompt", "a"]) == 2
  assert "missing: there is no such folder." in capsys.readouterr().err
