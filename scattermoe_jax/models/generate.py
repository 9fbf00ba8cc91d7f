"""Continues a prompt with a trained model, from a folder of weights.

  python -m scattermoe_jax.models.generate --checkpoint DIR --prompt TEXT
  python -m scattermoe_jax.models.generate         the newest run of train
  python -m scattermoe_jax.models.generate --adapters DIR     and their model
  python -m scattermoe_jax.models.generate --checkpoint DIR --prompt "1 15 7"
                                     token ids, if the folder has no tokenizer

DIR holds config.json and safetensors: a Hugging Face mixture-of-experts model,
or what this library saved; a run's folder stands for its export/.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scattermoe_jax import checkpoints
from scattermoe_jax.models.sampling import choose_token
from scattermoe_jax.models.tokens import Vocabulary, vocabulary_of
from scattermoe_jax.models.transformer import Transformer, init_cache
from scattermoe_jax.models.weights import EXPORT
from scattermoe_jax.nn.lora import merge


def main(argv: list[str] | None = None) -> int:
  """Runs the program; returns its exit code."""
  flags = _parse(argv)
  try:
    _run(flags)
  except (checkpoints.CheckpointError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(file=sys.stderr)
    return 130
  return 0


class Generated(NamedTuple):
  """One token of a continuation.

  Attributes:
    token: its id.
    seconds: what it took, with the compilation where that was needed.
  """

  token: int
  seconds: float


def generate(
  model: Transformer,
  variables: Any,
  prompt_ids: list[int],
  *,
  max_tokens: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  end_ids: frozenset[int] = frozenset(),
  seed: int = 0,
) -> Iterator[Generated]:
  """Yields the tokens that continue a prompt, as they come.

  The prompt fills the cache of keys and values in one pass; then every token
  costs one pass over itself alone. The first two tokens' seconds include their
  pass's compilation.

  Args:
    model: the model.
    variables: its variables.
    prompt_ids: at least one.
    max_tokens: how many to add at most.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: choose among the likeliest tokens that hold this much probability.
    end_ids: stop after one of these.
    seed: of the random choices.

  Raises:
    ValueError: with the first token, if the prompt has none, the temperature
      is below 0 or top_p not above 0.
  """
  if not prompt_ids:
    raise ValueError("generate: prompt_ids is empty; give at least one token.")

  @functools.partial(jax.jit, donate_argnums=1)
  def step(variables, cache, tokens, key):
    output = model.apply(variables, tokens, cache=cache)
    token = choose_token(
      output.logits[:, -1], key, temperature=temperature, top_p=top_p
    )
    return token[:, None], output.cache

  cache = init_cache(model.config, 1, len(prompt_ids) + max_tokens)
  tokens = jnp.asarray([prompt_ids], jnp.int32)
  key = jax.random.key(seed)
  for i in range(max_tokens):
    began = time.perf_counter()
    tokens, cache = step(variables, cache, tokens, jax.random.fold_in(key, i))
    token = int(tokens[0, 0])
    yield Generated(token, time.perf_counter() - began)
    if token in end_ids:
      return


def newest_export(runs: Path) -> Path:
  """Returns the weights of the run that was trained last.

  Raises:
    ValueError: if there is none.
  """
  exports = sorted(
    runs.glob(f"*/{EXPORT}/config.json"), key=lambda path: path.stat().st_mtime
  )
  if not exports:
    raise ValueError(
      f"there is no trained model under {runs}/: train one with `make demo` "
      "(python -m scattermoe_jax.models.train), or name a folder with "
      "--checkpoint."
    )
  return exports[-1].parent


def base_of(adapters: Path) -> Path:
  """Returns the folder of the model that a folder of adapters belongs to.

  Raises:
    ValueError: if it names none, or none that is on this machine.
  """
  path = adapters / "adapter_config.json"
  base = None
  if path.exists():
    base = json.loads(path.read_text()).get("base_model_name_or_path")
  if not base or not Path(base).is_dir():
    raise ValueError(
      f"--adapters {adapters}: the model that they adapt is "
      f"{base or 'not named there'}; name its folder with --checkpoint."
    )
  return Path(base)


def end_ids_of(directory: Path) -> frozenset[int]:
  """Returns the ids that end a text, as the folder's files say."""
  ids: set[int] = set()
  for name in ("generation_config.json", "config.json"):
    path = directory / name
    if path.exists():
      value = json.loads(path.read_text()).get("eos_token_id")
      ids |= set(value if isinstance(value, list) else [value])
  return frozenset(ids - {None})


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m scattermoe_jax.models.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--checkpoint", type=Path, metavar="DIR", help="a folder of weights")
  add("--adapters", type=Path, metavar="DIR", help="LoRA adapters to merge")
  add("--prompt", default="def ", metavar="TEXT")
  add("--max-tokens", type=int, default=200, metavar="N")
  add("--temperature", type=float, default=0.8, help="0: the likeliest token")
  add("--top-p", type=float, default=0.95, help="choose among these likeliest")
  add("--seed", type=int, default=0)
  add(
    "--dtype",
    choices=("float32", "bfloat16", "float16"),
    help="of weights and arithmetic (default: what the folder says)",
  )
  flags = parser.parse_args(argv)
  for name, is_right, wanted in (
    ("max_tokens", flags.max_tokens >= 1, "at least 1"),
    ("temperature", flags.temperature >= 0, "at least 0"),
    ("top_p", 0 < flags.top_p <= 1, "above 0 and at most 1"),
  ):
    if not is_right:
      flag = name.replace("_", "-")
      parser.error(f"--{flag} must be {wanted}, got {getattr(flags, name)}")
  return flags


def _run(flags: argparse.Namespace) -> None:
  directory = _choose_folder(flags)
  vocabulary = vocabulary_of(directory)
  prompt_ids = vocabulary.encode(flags.prompt)
  began = time.perf_counter()
  config, variables = checkpoints.load(
    directory,
    dtype=flags.dtype,
    on_progress=functools.partial(_show_progress, directory),
  )
  if flags.adapters:
    variables = _merge_adapters(flags.adapters, directory, variables)
  seconds = time.perf_counter() - began
  print(f"\rloaded {directory} in {seconds:.1f} s", " " * 20, file=sys.stderr)
  too_large = [i for i in prompt_ids if not 0 <= i < config.vocab_size]
  if too_large or not prompt_ids:
    raise ValueError(
      f"--prompt: token ids {too_large} lie outside the vocabulary of "
      f"{config.vocab_size}."
      if too_large
      else "--prompt: give at least one token."
    )
  generated = generate(
    Transformer(config),
    variables,
    prompt_ids,
    max_tokens=flags.max_tokens,
    temperature=flags.temperature,
    top_p=flags.top_p,
    end_ids=end_ids_of(directory),
    seed=flags.seed,
  )
  times = _print_as_it_comes(vocabulary, prompt_ids, generated)
  # The first two tokens' passes compile.
  steady = times[2:]
  speed = (
    f"{len(steady) / sum(steady):.1f} tokens/s" if steady else "too few to time"
  )
  print(
    f"{len(times)} tokens; prompt of {len(prompt_ids)} in "
    f"{times[0]:.2f} s; {speed}",
    file=sys.stderr,
  )


def _choose_folder(flags: argparse.Namespace) -> Path:
  """Returns the folder of weights that the flags mean."""
  if flags.checkpoint is None and flags.adapters is not None:
    return base_of(flags.adapters)
  if flags.checkpoint is None:
    return newest_export(Path("runs"))
  inside = flags.checkpoint / EXPORT
  if not flags.checkpoint.is_dir():
    raise ValueError(
      f"--checkpoint {flags.checkpoint}: there is no such folder."
    )
  return inside if inside.is_dir() else flags.checkpoint


def _merge_adapters(adapters_directory: Path, directory: Path, variables):
  params = variables["params"]
  adapters = checkpoints.load_adapters(
    adapters_directory, params, family=checkpoints.read_family(directory)
  )
  params, _ = merge(params, adapters)
  return {**variables, "params": params}


def _print_as_it_comes(
  vocabulary: Vocabulary, prompt_ids: list[int], generated
) -> list[float]:
  """Prints prompt and continuation; returns the seconds of each token."""
  ids, seconds = list(prompt_ids), []
  shown = vocabulary.decode(ids)
  print(shown, end="", flush=True)
  for token, token_seconds in generated:
    ids.append(token)
    seconds.append(token_seconds)
    text = vocabulary.decode(ids)
    # A character of several tokens shows as a mark until it is whole.
    if text.startswith(shown) and not text.endswith(
      "\N{REPLACEMENT CHARACTER}"
    ):
      print(text[len(shown) :], end="", flush=True)
      shown = text
  text = vocabulary.decode(ids)
  print(text[len(shown) :] if text.startswith(shown) else f"\n{text}")
  return seconds


def _show_progress(directory: Path, done: int, total: int) -> None:
  print(
    f"\rloading {directory}: {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB",
    end="",
    file=sys.stderr,
    flush=True,
  )


if __name__ == "__main__":
  sys.exit(main())
