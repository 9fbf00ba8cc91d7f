"""The attention layers that benchmarks compare, and what they are given.

Each is a function of parameters and x. The plain ones have no kernels: they say
what the others must return.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scattermoe_jax import nn as smnn
from scattermoe_jax.ops import parallel_linear
from scattermoe_jax.routing import Routing, input_rows, route

LAYERS = ("moa", "dense", "regroup", "regroup_fused")

Layer = Callable[[Any, Array], Array]


class Shape(NamedTuple):
  """An attention layer: B sequences of L tokens of width d."""

  batch: int
  length: int
  d_model: int
  num_heads: int
  head_dim: int
  top_k: int

  @property
  def num_experts(self) -> int:
    """E = 8 k: one in eight is active, whatever the granularity."""
    return 8 * self.top_k

  @property
  def heads_per_expert(self) -> int:
    """h_expert, the heads of keys and values of a mixture of attention."""
    return self.num_heads // self.top_k

  def flops(self, layer: str) -> int:
    """Of the forward; of causal attention only the half that is not masked."""
    tokens, active = self.batch * self.length, self.num_heads * self.head_dim
    kv_width = active if layer == "dense" else active // self.top_k
    projections = 2 * tokens * self.d_model * (2 * active + 2 * kv_width)
    return projections + 2 * tokens * self.length * active


def full(top_k: int) -> Shape:
  """Returns the shape of the paper's granularity study."""
  return Shape(16, 2048, 4096, 32, 128, top_k)


def tiny(top_k: int) -> Shape:
  """Returns a shape for a CPU; not a measurement of anything."""
  return Shape(2, 16, 64, 8, 8, top_k)


def moa_module(shape: Shape, implementation: str | None, dtype=jnp.bfloat16):
  """Returns the module that is measured."""
  return smnn.MixtureOfAttention(
    num_experts=shape.num_experts,
    top_k=shape.top_k,
    num_heads=shape.heads_per_expert,
    head_dim=shape.head_dim,
    dtype=dtype,
    param_dtype=dtype,
    implementation=implementation,
  )


def layers(shape: Shape, implementation: str | None) -> dict[str, Layer]:
  """Returns the layers by name: functions of (params, x)."""
  module = moa_module(shape, implementation)
  regroup = functools.partial(regroup_layer, shape, implementation)
  return {
    "moa": lambda params, x: module.apply({"params": params}, x)[0],
    "dense": functools.partial(dense_layer, shape),
    "regroup": functools.partial(regroup, False),
    "regroup_fused": functools.partial(regroup, True),
  }


def dense_layer(shape: Shape, params, x: Float[Array, "B L d"]) -> Array:
  """Returns multi-head attention with rotary positions."""
  heads = (*x.shape[:2], shape.num_heads, shape.head_dim)
  query, key, value = (
    a.reshape(heads) for a in jnp.split(x @ params["qkv"], 3, axis=-1)
  )
  return _attend(query, key, value).reshape(*x.shape[:2], -1) @ params["out"]


def regroup_layer(
  shape: Shape,
  implementation: str | None,
  fused: bool,
  params,
  x: Float[Array, "B L d"],
) -> Array:
  """Returns the mixture of attention with its rows regrouped twice."""
  batch, length, d = x.shape
  rows = x.reshape(-1, d)
  router = smnn.Router(shape.num_experts, shape.top_k, "top_k_softmax")
  routed = router.apply({"params": params["router"]}, rows)
  routing = route(routed.expert_ids, shape.num_experts)
  multiply = functools.partial(
    parallel_linear,
    routing=routing,
    grouped_in=True,
    grouped_out=True,
    implementation=implementation,
  )
  query = multiply(group(fused, rows, routing), params["query"]["kernel"])
  query = ungroup(fused, query, routing)
  query = jnp.swapaxes(
    query.reshape(batch, length, shape.top_k, -1, shape.head_dim), 2, 3
  )
  key, value = jnp.split(x @ params["key_value"]["kernel"], 2, axis=-1)
  kv_heads = (batch, length, -1, shape.head_dim)
  heads = _attend(
    query.reshape(kv_heads), key.reshape(kv_heads), value.reshape(kv_heads)
  )
  heads = heads.reshape(batch, length, -1, shape.top_k, shape.head_dim)
  heads = jnp.swapaxes(heads, 2, 3).reshape(routing.num_rows, -1)
  y = multiply(group(fused, heads, routing), params["output"]["kernel"])
  y = ungroup(fused, y, routing).reshape(-1, shape.top_k, d)
  gates = routed.gates.astype(x.dtype)
  y = jnp.einsum("tk,tkd->td", gates, y, preferred_element_type=x.dtype)
  return y.reshape(x.shape)


def _attend(query, key, value) -> Array:
  positions = smnn.consecutive_positions(*query.shape[:2])
  query, key = (smnn.rotary_embedding(a, positions) for a in (query, key))
  return smnn.attend(query, key, value)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def group(fused: bool, rows: Float[Array, "rows d"], routing: Routing) -> Array:
  """Returns a copy of (T or S) scattered rows in grouped order."""
  ids = input_rows(routing, rows.shape[0], grouped=False)
  return _copy(fused, rows, ids)


def _group_fwd(fused, rows, routing):
  return group(fused, rows, routing), (routing, rows.shape[0])


def _group_bwd(fused, residuals, dy):
  routing, num_rows = residuals
  drows = _copy(fused, dy, routing.grouped_ids.reshape(-1))
  if num_rows == routing.num_rows:
    return drows, None
  drows = drows.reshape(num_rows, -1, drows.shape[1]).astype(jnp.float32)
  return drows.sum(axis=1).astype(dy.dtype), None


group.defvjp(_group_fwd, _group_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ungroup(fused: bool, rows: Float[Array, "S d"], routing: Routing) -> Array:
  """Returns a copy of S grouped rows in scattered order."""
  return _copy(fused, rows, routing.grouped_ids.reshape(-1))


ungroup.defvjp(
  lambda fused, rows, routing: (ungroup(fused, rows, routing), routing),
  lambda fused, routing, dy: (_copy(fused, dy, routing.scattered_ids), None),
)


def _copy(fused: bool, rows, ids) -> Array:
  copied = rows[ids]
  return copied if fused else jax.lax.optimization_barrier(copied)


def plain_dense(shape: Shape, params, x: Float[Array, "B L d"]) -> Array:
  """Returns the dense layer, no kernels."""
  qkv = jnp.einsum("bld,dn->bln", x, params["qkv"], precision="highest")
  heads = (*x.shape[:2], shape.num_heads, shape.head_dim)
  attended = _plain_attend(
    *(a.reshape(heads) for a in jnp.split(qkv, 3, axis=-1))
  )
  return jnp.einsum(
    "bln,nd->bld",
    attended.reshape(*x.shape[:2], -1),
    params["out"],
    precision="highest",
  )


def plain_moa(shape: Shape, params, x: Float[Array, "B L d"]) -> Array:
  """Returns the mixture of attention, every row by every expert, no kernels."""
  module_router = smnn.Router(shape.num_experts, shape.top_k, "top_k_softmax")
  rows = x.reshape(-1, x.shape[-1])
  routed = module_router.apply({"params": params["router"]}, rows)
  mine = jax.nn.one_hot(routed.expert_ids, shape.num_experts, dtype=x.dtype)
  product = functools.partial(jnp.einsum, precision="highest")
  every = product("td,edn->ten", rows, params["query"]["kernel"])
  query = product("tke,ten->tkn", mine, every)
  query = query.reshape(*x.shape[:2], shape.num_heads, shape.head_dim)
  key, value = (
    # Head j n + i reads keys and values of head i: tiled k times.
    jnp.tile(
      a.reshape(*x.shape[:2], -1, shape.head_dim), (1, 1, shape.top_k, 1)
    )
    for a in jnp.split(
      product("bld,dn->bln", x, params["key_value"]["kernel"]), 2, axis=-1
    )
  )
  heads = _plain_attend(query, key, value)
  heads = heads.reshape(rows.shape[0], shape.top_k, -1)
  gates = routed.gates.astype(x.dtype)
  heads = product("tke,tkn->ten", mine * gates[:, :, None], heads)
  return product("ten,end->td", heads, params["output"]["kernel"]).reshape(
    x.shape
  )


def _plain_attend(query, key, value) -> Array:
  product = functools.partial(jnp.einsum, precision="highest")
  positions = smnn.consecutive_positions(*query.shape[:2])
  query, key = (smnn.rotary_embedding(a, positions) for a in (query, key))
  logits = product("blhc,bmhc->bhlm", query, key) * query.shape[-1] ** -0.5
  causal = np.tri(query.shape[1], dtype=bool)[None, None]
  probs = jax.nn.softmax(jnp.where(causal, logits, -1e30).astype(jnp.float32))
  return product("bhlm,bmhc->blhc", probs.astype(value.dtype), value)


class Inputs(NamedTuple):
  """What the programs of one shape are given.

  Attributes:
    params: by layer; all but dense's are the same.
    x: tokens.
    dy: the gradient of y.
    dy_first: the same in the first sequence, zero in the others.
  """

  params: dict[str, Any]
  x: Float[Array, "B L d"]
  dy: Float[Array, "B L d"]
  dy_first: Float[Array, "B L d"]


def inputs(shape: Shape) -> Inputs:
  """Returns normal data, in bfloat16 but for the router's parameters."""
  d, experts = shape.d_model, shape.num_experts
  active = shape.num_heads * shape.head_dim
  n = active // shape.top_k
  moa = {
    # In float32, but of numbers that bfloat16 has.
    "router": {"kernel": _normal(0, d, experts).astype(jnp.float32)},
    "query": {"kernel": _normal(1, experts, d, n)},
    "key_value": {"kernel": _normal(2, d, 2 * n)},
    "output": {"kernel": _normal(3, experts, n, d)},
  }
  dense = {"qkv": _normal(4, d, 3 * active), "out": _normal(5, active, d)}
  tokens = (shape.batch, shape.length, d)
  x, dy = (_normal(seed, *tokens, scale=1.0) for seed in (6, 7))
  first = (jnp.arange(shape.batch) == 0)[:, None, None]
  dy_first = jnp.where(first, dy, jnp.zeros_like(dy))
  params = {name: moa for name in LAYERS} | {"dense": dense}
  return Inputs(params, x, dy, dy_first)


def _normal(seed: int, *size: int, scale: float | None = None) -> Array:
  draw = jax.random.normal(jax.random.key(seed), size, jnp.bfloat16)
  return draw * jnp.bfloat16(size[-2] ** -0.5 if scale is None else scale)
