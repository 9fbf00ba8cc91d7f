"""Tokens to routed rows and back, each the gradient of the other."""

import jax
from jaxtyping import Array, Float

from scattermoe_jax.kernels import sum_choices
from scattermoe_jax.routing import Routing, input_rows, take_rows


@jax.custom_vjp
def repeat_tokens(
  x: Float[Array, "T d"], routing: Routing
) -> Float[Array, "S d"]:
  """Returns the token of each grouped row.

  Its gradient sums the k rows of a token by a gather, where autodiff would
  scatter and add. Residuals: the ids of `routing`.
  """
  return take_rows(x, input_rows(routing, routing.num_tokens, grouped=False))


@jax.custom_vjp
def sum_rows(
  rows: Float[Array, "S d"], routing: Routing
) -> Float[Array, "T d"]:
  """Returns out[t] = sum_j rows[grouped row of choice j of t].

  Residuals: the ids of `routing`.
  """
  return sum_choices(rows, routing)


@jax.custom_vjp
def group_rows(
  rows: Float[Array, "S n"], routing: Routing
) -> Float[Array, "S n"]:
  """Returns scattered rows in grouped order.

  For narrow rows that another pass writes anyway: XLA makes the gather part of
  it. Residuals: the ids of `routing`.
  """
  return take_rows(rows, routing.scattered_ids)


@jax.custom_vjp
def ungroup_rows(
  rows: Float[Array, "S n"], routing: Routing
) -> Float[Array, "S n"]:
  """Returns grouped rows in scattered order; see `group_rows`."""
  return take_rows(rows, routing.grouped_ids.reshape(-1))


repeat_tokens.defvjp(
  lambda x, routing: (repeat_tokens(x, routing), routing),
  lambda routing, drows: (sum_rows(drows, routing), None),
)
sum_rows.defvjp(
  lambda rows, routing: (sum_rows(rows, routing), routing),
  lambda routing, dout: (repeat_tokens(dout, routing), None),
)
group_rows.defvjp(
  lambda rows, routing: (group_rows(rows, routing), routing),
  lambda routing, dout: (ungroup_rows(dout, routing), None),
)
ungroup_rows.defvjp(
  lambda rows, routing: (ungroup_rows(rows, routing), routing),
  lambda routing, dout: (group_rows(dout, routing), None),
)
