"""The truth, in NumPy float64: loops over (token, choice), obviously right.

Every function takes plain arrays and expert ids (T, k); ids outside [0, E) mean
'not here'. Grouped order is defined here a second time, by Python's own sort.
"""

import math

import numpy as np


def f64(x):
  return np.asarray(x).astype(np.float64)


def grouped_order(expert_ids, num_experts):
  """Scattered row of each grouped row; 'not here' last."""
  flat = [int(e) for e in np.asarray(expert_ids).reshape(-1)]
  key = [e if 0 <= e < num_experts else num_experts for e in flat]
  return np.array(sorted(range(len(flat)), key=lambda s: (key[s], s)), np.int64)


def choices(expert_ids, num_experts):
  """(scattered row, token, choice, expert) of every choice that is here."""
  num_tokens, top_k = np.shape(expert_ids)
  for t in range(num_tokens):
    for j in range(top_k):
      expert = int(expert_ids[t][j])
      if 0 <= expert < num_experts:
        yield t * top_k + j, t, j, expert


def scattered(x, expert_ids, num_experts, grouped):
  """The S scattered rows that x holds, in float64."""
  x = f64(x)
  num_tokens, top_k = np.shape(expert_ids)
  if grouped:
    rows = np.empty_like(x)
    rows[grouped_order(expert_ids, num_experts)] = x
    return rows
  if x.shape[0] == num_tokens * top_k:
    return x
  return np.repeat(x, top_k, axis=0)


def reorder(rows, expert_ids, num_experts, grouped):
  """Scattered rows, in grouped order if `grouped`."""
  return rows[grouped_order(expert_ids, num_experts)] if grouped else rows


def scatter2scatter(
  x, w, expert_ids, *, bias=None, grouped_in=False, grouped_out=False,
  transpose_w=False,
):  # fmt: skip
  w = f64(w)
  if transpose_w:
    w = w.transpose(0, 2, 1)
  num_experts = w.shape[0]
  rows = scattered(x, expert_ids, num_experts, grouped_in)
  y = np.zeros((rows.shape[0], w.shape[2]))
  for s, _, _, expert in choices(expert_ids, num_experts):
    y[s] = rows[s] @ w[expert]
    if bias is not None:
      y[s] += f64(bias)[expert]
  return reorder(y, expert_ids, num_experts, grouped_out)


def group_xty(
  x, y, expert_ids, num_experts, *, x_grouped=False, y_grouped=False
):
  x = scattered(x, expert_ids, num_experts, x_grouped)
  y = scattered(y, expert_ids, num_experts, y_grouped)
  xty = np.zeros((num_experts, x.shape[1], y.shape[1]))
  for s, _, _, expert in choices(expert_ids, num_experts):
    xty[expert] += np.outer(x[s], y[s])
  return xty


def combine(y, gates, expert_ids, num_experts):
  y = scattered(y, expert_ids, num_experts, grouped=True)
  out = np.zeros((gates.shape[0], y.shape[1]))
  for s, t, j, _ in choices(expert_ids, num_experts):
    out[t] += f64(gates)[t, j] * y[s]
  return out


def _sigmoid(z):
  return 1 / (1 + np.exp(-z))


_FUNCTIONS = {
  "silu": lambda z: z * _sigmoid(z),
  "gelu": lambda z: 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
  "gelu_tanh": lambda z: (
    0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
  ),
  "relu": lambda z: np.maximum(z, 0),
  "relu2": lambda z: np.maximum(z, 0) ** 2,
  "identity": lambda z: z,
}


def activate(h, activation, gated):
  if activation == "clamped_swiglu":
    g, u = np.split(h, 2, axis=-1)
    g, u = np.minimum(g, 7.0), np.clip(u, -7.0, 7.0)
    return (u + 1) * g * _sigmoid(1.702 * g)
  if gated:
    g, u = np.split(h, 2, axis=-1)
    return _FUNCTIONS[activation](g) * u
  return _FUNCTIONS[activation](h)


def smoe_mlp(
  x, gates, expert_ids, w_in, w_out, *, bias_in=None, bias_out=None,
  activation="silu",
):  # fmt: skip
  x, gates, w_in, w_out = f64(x), f64(gates), f64(w_in), f64(w_out)
  gated = w_in.shape[2] == 2 * w_out.shape[1]
  y = np.zeros_like(x)
  for _, t, j, expert in choices(expert_ids, w_in.shape[0]):
    h = x[t] @ w_in[expert]
    if bias_in is not None:
      h = h + f64(bias_in)[expert]
    out = activate(h, activation, gated) @ w_out[expert]
    if bias_out is not None:
      out = out + f64(bias_out)[expert]
    y[t] += gates[t, j] * out
  return y
