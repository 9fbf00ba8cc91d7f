"""From a router's choices to a routing, and what the layer reports of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from scattermoe_jax.nn import checks
from scattermoe_jax.nn.losses import (
  load_balancing_loss,
  mean_probs,
  router_z_loss,
)
from scattermoe_jax.nn.router import RouterOutput
from scattermoe_jax.routing import Routing, route


class SMoEMetrics(NamedTuple):
  """What a routed layer reports beside its output.

  Attributes:
    load_balancing_loss: E sum_e f_e P_e; k at perfect balance.
    router_z_loss: mean squared logsumexp of the logits.
    tokens_per_expert: choices of each expert, of unmasked tokens.
    mean_probs: P_e, the mean probability of each expert over unmasked tokens,
      for a balance loss over several layers at once.
  """

  load_balancing_loss: Float[Array, "*layers"]
  router_z_loss: Float[Array, "*layers"]
  tokens_per_expert: Int[Array, "*layers E"]
  mean_probs: Float[Array, "*layers E"]


def route_with_metrics(
  routed: RouterOutput, mask: Bool[Array, " T"] | None = None
) -> tuple[Routing, SMoEMetrics]:
  """Returns the routing of a router's choices, and what it reports.

  Args:
    routed: of `Router`.
    mask: True where the token is real; the others go to no expert.
  """
  checks.check_mask("route_with_metrics", mask, routed.expert_ids.shape[:1])
  routing = route(_masked_ids(routed, mask), routed.logits.shape[1])
  return routing, _metrics(routed, routing.group_sizes, mask)


def ids_with_metrics(
  routed: RouterOutput, mask: Bool[Array, " T"] | None = None
) -> tuple[Int[Array, "T k"], SMoEMetrics]:
  """Returns the ids of `route_with_metrics`, not sorted, and its metrics."""
  expert_ids = _masked_ids(routed, mask)
  tokens_per_expert = _count(expert_ids, routed.logits.shape[1])
  return expert_ids, _metrics(routed, tokens_per_expert, mask)


def _masked_ids(routed, mask):
  if mask is None:
    return routed.expert_ids
  nowhere = jnp.full_like(routed.expert_ids, routed.logits.shape[1])
  return jnp.where(mask[:, None], routed.expert_ids, nowhere)


def _count(expert_ids, num_experts):
  experts = jnp.arange(num_experts, dtype=expert_ids.dtype)
  chosen = expert_ids[:, :, None] == experts[None, None, :]
  return jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)


def _metrics(routed, tokens_per_expert, mask):
  return SMoEMetrics(
    load_balancing_loss(routed.probs, tokens_per_expert, mask=mask),
    router_z_loss(routed.logits, mask=mask),
    tokens_per_expert,
    mean_probs(routed.probs, mask=mask),
  )
