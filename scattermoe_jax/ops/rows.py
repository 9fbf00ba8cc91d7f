"""Tokens to routed rows and back, each the gradient of the other."""

import jax
from jaxtyping import Array, Float

from scattermoe_jax.ops.combine import sum_choices
from scattermoe_jax.routing import Routing, input_rows


@jax.custom_vjp
def repeat_tokens(
  x: Float[Array, "T d"], routing: Routing
) -> Float[Array, "S d"]:
  """Returns the token of each grouped row.

  Its gradient sums the k rows of a token by a gather, where autodiff would
  scatter and add. Residuals: the ids of `routing`.
  """
  return x[input_rows(routing, routing.num_tokens, grouped=False)]


@jax.custom_vjp
def sum_rows(
  rows: Float[Array, "S d"], routing: Routing
) -> Float[Array, "T d"]:
  """Returns out[t] = sum_j rows[grouped row of choice j of t].

  Residuals: the ids of `routing`.
  """
  return sum_choices(rows, routing)


repeat_tokens.defvjp(
  lambda x, routing: (repeat_tokens(x, routing), routing),
  lambda routing, drows: (sum_rows(drows, routing), None),
)
sum_rows.defvjp(
  lambda rows, routing: (sum_rows(rows, routing), routing),
  lambda routing, dout: (repeat_tokens(dout, routing), None),
)
