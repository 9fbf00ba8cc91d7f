"""The same results in plain JAX: every row by every expert, JAX's gradients.

In the dtype under test they are the baseline of the tolerance rule; in float64
their gradients are the truth. Nothing here is shared with the package.
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


def scatter2scatter(
  x, w, expert_ids, *, bias=None, grouped_in=False, grouped_out=False,
  transpose_w=False, matmul=None,
):  # fmt: skip
  """As the oracle's, in the dtype of x with float32 sums."""
  num_experts = w.shape[0]
  if transpose_w:
    w = w.transpose(0, 2, 1)
  rows = _scattered(x, expert_ids, num_experts, grouped_in)
  rows = rows.reshape(*expert_ids.shape, -1)
  y = linear(rows, w, expert_ids, bias, matmul=matmul)
  y = y.reshape(-1, w.shape[2])
  if grouped_out:
    y = y[_grouped_order(expert_ids, num_experts)]
  return y


def group_xty(
  x, y, expert_ids, num_experts, *, x_grouped=False, y_grouped=False,
  matmul=None,
):  # fmt: skip
  """As the oracle's, in the dtype of x with float32 sums."""
  x = _scattered(x, expert_ids, num_experts, x_grouped)
  y = _scattered(y, expert_ids, num_experts, y_grouped)
  experts = jnp.arange(num_experts)[:, None]
  mine = (expert_ids.reshape(1, -1) == experts).astype(x.dtype)
  y_of = (mine[:, :, None] * y[None]).swapaxes(0, 1)  # (S, E, n)
  xty = (matmul or xla_matmul)(x.T, y_of.reshape(y.shape[0], -1))
  xty = xty.reshape(x.shape[1], num_experts, y.shape[1])
  return xty.swapaxes(0, 1).astype(x.dtype)


def up_projection(x, w, expert_ids, *, bias, activation, gated):
  """Returns (h, a) in grouped rows."""
  wide = _wide(x.dtype)
  h = scatter2scatter(x, w, expert_ids, bias=bias, grouped_out=True)
  return h, activate(h.astype(wide), activation, gated).astype(x.dtype)


def down_projection_grad(dy, w, h, gates, expert_ids, *, activation, gated):
  """Returns (dh, weighted_a, dgates) in grouped rows, by autodiff."""
  wide = _wide(h.dtype)
  order = _grouped_order(expert_ids, w.shape[0])
  dy_rows = jnp.repeat(dy, expert_ids.shape[1], axis=0)

  def weighted_rows(h, gates):
    a = activate(h.astype(wide), activation, gated).astype(h.dtype)
    a_rows = jnp.zeros_like(a).at[order].set(a)
    y = linear(a_rows.reshape(*expert_ids.shape, -1), w, expert_ids)
    row_gates = jnp.zeros_like(gates).at[order].set(gates).astype(wide)
    y = row_gates[:, None] * y.reshape(dy_rows.shape).astype(wide)
    return y.astype(h.dtype)

  dh, dgates = jax.vjp(weighted_rows, h, gates)[1](dy_rows)
  a = activate(h.astype(wide), activation, gated)
  weighted_a = (gates.astype(wide)[:, None] * a).astype(h.dtype)
  return dh, weighted_a, dgates


def _grouped_order(expert_ids, num_experts):
  here = (expert_ids >= 0) & (expert_ids < num_experts)
  key = jnp.where(here, expert_ids, num_experts).reshape(-1)
  return jnp.argsort(key, stable=True)


def _scattered(x, expert_ids, num_experts, grouped):
  if grouped:
    order = _grouped_order(expert_ids, num_experts)
    return jnp.zeros_like(x).at[order].set(x)
  if x.shape[0] == expert_ids.size:
    return x
  return jnp.repeat(x, expert_ids.shape[1], axis=0)


def linear(rows, w, expert_ids, bias=None, *, matmul=None):
  """rows (T, k, d) or (T, 1, d) times w[expert_ids]: (T, k, n)."""
  wide = _wide(rows.dtype)
  here = (expert_ids >= 0) & (expert_ids < w.shape[0])
  experts = jnp.where(here, expert_ids, 0)
  num_experts, d, n = w.shape
  products = (matmul or xla_matmul)(
    rows.reshape(-1, d), w.swapaxes(0, 1).reshape(d, num_experts * n)
  ).reshape(*rows.shape[:2], num_experts, n)
  if products.shape[1] != expert_ids.shape[1]:
    products = jnp.repeat(products, expert_ids.shape[1], axis=1)
  y = jnp.take_along_axis(products, experts[:, :, None, None], axis=2)[:, :, 0]
  if bias is not None:
    y = y + bias.astype(wide)[experts]
  return jnp.where(here[:, :, None], y, 0).astype(rows.dtype)


def smoe_mlp(
  x, gates, expert_ids, w_in, w_out, bias_in=None, bias_out=None, *,
  activation="silu", matmul=None,
):  # fmt: skip
  gated = w_in.shape[2] == 2 * w_out.shape[1]
  wide = _wide(x.dtype)
  h = linear(x[:, None], w_in, expert_ids, bias_in, matmul=matmul).astype(wide)
  a = activate(h, activation, gated).astype(x.dtype)
  y = linear(a, w_out, expert_ids, bias_out, matmul=matmul).astype(wide)
  return jnp.sum(gates.astype(wide)[:, :, None] * y, axis=1).astype(x.dtype)


def _wide(dtype):
  return jnp.float64 if dtype == jnp.float64 else jnp.float32


def xla_matmul(a, b):
  """Returns a b with XLA's sums, in float32 or wider."""
  return jnp.matmul(
    a, b, precision="highest", preferred_element_type=_wide(a.dtype)
  )


@jax.custom_vjp
def textbook_matmul(a, b):
  """Returns a b, one term of each sum after another, in float32 or wider."""
  a, b = a.astype(_wide(a.dtype)), b.astype(_wide(b.dtype))

  def add_term(k, total):
    return total + a[:, k, None] * b[None, k]

  total = jnp.zeros((a.shape[0], b.shape[1]), a.dtype)
  return jax.lax.fori_loop(0, a.shape[1], add_term, total)


def _textbook_bwd(operands, dy):
  a, b = operands
  dy = dy.astype(a.dtype)
  da, db = textbook_matmul(dy, b.T), textbook_matmul(a.T, dy)
  return da.astype(a.dtype), db.astype(b.dtype)


textbook_matmul.defvjp(
  lambda a, b: (textbook_matmul(a, b), (a, b)), _textbook_bwd
)
