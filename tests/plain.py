"""The MLP in plain JAX: every row by every expert, differentiated by JAX.

In the dtype under test it is the baseline of the tolerance rule; in float64 its
gradients are the truth. Nothing here is shared with the package.
"""

import jax
import jax.numpy as jnp

FUNCTIONS = {
  "silu": jax.nn.silu,
  "gelu": lambda z: jax.nn.gelu(z, approximate=False),
  "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
  "relu": jax.nn.relu,
  "relu2": lambda z: jnp.square(jax.nn.relu(z)),
  "identity": lambda z: z,
}


def activate(h, activation, gated):
  if activation == "clamped_swiglu":
    g, u = jnp.split(h, 2, axis=-1)
    g, u = jnp.minimum(g, 7.0), jnp.clip(u, -7.0, 7.0)
    return (u + 1) * g * jax.nn.sigmoid(1.702 * g)
  if gated:
    g, u = jnp.split(h, 2, axis=-1)
    return FUNCTIONS[activation](g) * u
  return FUNCTIONS[activation](h)


def linear(rows, w, expert_ids, bias=None):
  """rows (T, k, d) or (T, 1, d) times w[expert_ids]: (T, k, n)."""
  wide = jnp.promote_types(rows.dtype, jnp.float32)
  here = (expert_ids >= 0) & (expert_ids < w.shape[0])
  experts = jnp.where(here, expert_ids, 0)
  products = jnp.einsum(
    "tjd,edn->tjen", rows, w, preferred_element_type=wide,
    precision="highest",
  )  # fmt: skip
  if products.shape[1] != expert_ids.shape[1]:
    products = jnp.repeat(products, expert_ids.shape[1], axis=1)
  y = jnp.take_along_axis(products, experts[:, :, None, None], axis=2)[:, :, 0]
  if bias is not None:
    y = y + bias.astype(wide)[experts]
  return jnp.where(here[:, :, None], y, 0).astype(rows.dtype)


def smoe_mlp(
  x, gates, expert_ids, w_in, w_out, bias_in=None, bias_out=None, *,
  activation="silu",
):  # fmt: skip
  gated = w_in.shape[2] == 2 * w_out.shape[1]
  wide = jnp.promote_types(x.dtype, jnp.float32)
  h = linear(x[:, None], w_in, expert_ids, bias_in).astype(wide)
  a = activate(h, activation, gated).astype(x.dtype)
  y = linear(a, w_out, expert_ids, bias_out).astype(wide)
  return jnp.sum(gates.astype(wide)[:, :, None] * y, axis=1).astype(x.dtype)
