"""The losses that keep a router's choices even and its logits small."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Real

from scattermoe_jax.nn import checks


def load_balancing_loss(
  probs: Float[Array, "T E"],
  tokens_per_expert: Real[Array, " E"],
  *,
  mask: Bool[Array, " T"] | None = None,
) -> Float[Array, ""]:
  """Returns E sum_e f_e P_e: k at perfect balance, more for uneven load.

  f_e is the number of choices of expert e per token (their sum is k; it carries
  no gradient), P_e the mean probability of e. Divide by k for the form that is
  1 at perfect balance (Switch, SonicMoE).

  Args:
    probs: of `RouterOutput`.
    tokens_per_expert: choices of each expert, `Routing.group_sizes`; of masked
      tokens none. For a balance over the whole of a larger batch, give its
      counts scaled to T tokens.
    mask: True for the tokens that count; all if None.

  Source: Switch Transformer (Fedus et al., 2021), equation 4, for k experts as
  transformers' load_balancing_loss_func writes it.
  """
  name = "load_balancing_loss"
  checks.check_expert_rows(name, "probs", probs)
  shape = probs.shape[1:]
  checks.check_shape(name, "tokens_per_expert", tokens_per_expert, shape)
  checks.check_mask(name, mask, probs.shape[:1])
  choices = lax.stop_gradient(tokens_per_expert).astype(probs.dtype)
  per_token = choices / _count(mask, probs)
  return probs.shape[1] * jnp.sum(per_token * mean_probs(probs, mask=mask))


def mean_probs(
  probs: Float[Array, "T E"], *, mask: Bool[Array, " T"] | None = None
) -> Float[Array, " E"]:
  """Returns P_e, the mean over the tokens that count; zeros if none does."""
  checks.check_expert_rows("mean_probs", "probs", probs)
  checks.check_mask("mean_probs", mask, probs.shape[:1])
  if mask is not None:
    probs = jnp.where(mask[:, None], probs, jnp.zeros_like(probs))
  return probs.sum(axis=0) / _count(mask, probs)


def router_z_loss(
  logits: Float[Array, "T E"], *, mask: Bool[Array, " T"] | None = None
) -> Float[Array, ""]:
  """Returns the mean over tokens of logsumexp(z)^2; (log E)^2 for zero logits.

  Args:
    logits: of `RouterOutput`.
    mask: True for the tokens that count; all if None.

  Source: ST-MoE (Zoph et al., 2022, arXiv 2202.08906), equation 5.
  """
  checks.check_expert_rows("router_z_loss", "logits", logits)
  checks.check_mask("router_z_loss", mask, logits.shape[:1])
  squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
  if mask is not None:
    squares = jnp.where(mask, squares, jnp.zeros_like(squares))
  return squares.sum() / _count(mask, logits)


def _count(mask, rows):
  """Returns how many tokens count, at least 1 so that none give a zero loss."""
  if mask is None:
    return jnp.asarray(max(rows.shape[0], 1), rows.dtype)
  return jnp.maximum(mask.sum(), 1).astype(rows.dtype)
