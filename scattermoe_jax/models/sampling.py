"""Text from a model, one token at a time, with a cache of keys and values."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from scattermoe_jax.models.transformer import Transformer, init_cache
from scattermoe_jax.nn import checks


def sample(
  model: Transformer,
  variables: Any,
  prompt_ids: Int[Array, "B P"],
  num_tokens: int,
  *,
  key: Array,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> Int[Array, "B N"]:
  """Returns the tokens that continue each prompt; pure, to be jitted.

  The prompt fills the cache in one pass; then every token costs one pass over
  itself alone.

  Args:
    model: the model.
    variables: its variables.
    prompt_ids: at least one token each.
    num_tokens: how many to add.
    key: of the random choices.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: choose among the likeliest tokens that hold this much probability.

  Raises:
    ValueError: if prompts are not (B, P) of P above 0, num_tokens is below 1,
      the temperature below 0 or top_p not above 0.
    TypeError: if prompts are no array of integers, or one of those is traced.
  """
  checks.check_ids("sample", ("B", "P"), prompt_ids=prompt_ids)
  checks.check_ints("sample", P=prompt_ids.shape[1], num_tokens=num_tokens)
  batch_size, length = prompt_ids.shape
  cache = init_cache(model.config, batch_size, length + num_tokens)
  prefill = model.apply(variables, prompt_ids, cache=cache)
  keys = jax.random.split(key, num_tokens)

  def choose(logits, key):
    return choose_token(logits, key, temperature=temperature, top_p=top_p)

  def decode(carry, key):
    tokens, cache = carry
    output = model.apply(variables, tokens[:, None], cache=cache)
    new_tokens = choose(output.logits[:, -1], key)
    return (new_tokens, output.cache), tokens

  first = choose(prefill.logits[:, -1], keys[0])
  (last, _), tokens = lax.scan(decode, (first, prefill.cache), keys[1:])
  return jnp.concatenate([tokens, last[None]]).T


def choose_token(
  logits: Float[Array, "B V"],
  key: Array,
  *,
  temperature: float = 1.0,
  top_p: float = 1.0,
) -> Int[Array, " B"]:
  """Returns one token of each row; see `sample` for the arguments."""
  checks.check_not_negative("choose_token", temperature=temperature)
  checks.check_positive("choose_token", top_p=top_p)
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_p < 1:
    logits = jnp.where(
      _is_likely(logits, top_p), logits, jnp.full_like(logits, -jnp.inf)
    )
  return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _is_likely(logits, top_p: float):
  """Marks the fewest likeliest tokens that hold top_p; always one at least."""
  probs = jax.nn.softmax(logits, axis=-1)
  descending = jnp.sort(probs, axis=-1)[:, ::-1]
  before = jnp.cumsum(descending, axis=-1) - descending
  kept = jnp.where(before < top_p, descending, jnp.full_like(descending, 2.0))
  return probs >= kept.min(axis=-1, keepdims=True)
