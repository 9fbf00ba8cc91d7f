"""The Flax modules under every transformation, on a mesh, and in nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import scattermoe_jax as sm
from scattermoe_jax import nn as smnn
from tests.test_nn import (
  NORMAL,
  B,
  D,
  E,
  K,
  L,
  N,
  T,
  assert_same_tree,
  block,
  initialized,
  randomized,
  tokens,
)


def grads_of(module, variables, x):
  def loss(params):
    y, metrics = module.apply({**variables, "params": params}, x)[:2]
    return jnp.sum(y * y) + jnp.sum(metrics.load_balancing_loss)

  return jax.jit(jax.value_and_grad(loss))(variables["params"])


def test_remat_changes_nothing():
  x = tokens()
  plain = block(jitter=0.0)
  variables = randomized(plain, x)
  remat = nn.remat(smnn.SMoEBlock)(num_experts=E, top_k=K, d_expert=N)
  assert_same_tree(grads_of(remat, variables, x), grads_of(plain, variables, x))


class WithJitter(nn.Module):
  """A block in training, recomputed in the backward or not."""

  remat: bool

  @nn.compact
  def __call__(self, x):
    call = lambda block, x: block(x, deterministic=False)
    return (nn.remat(call) if self.remat else call)(block(jitter=0.1), x)


def test_remat_knows_what_is_said_inside():
  x, rngs = tokens(), {"router": jax.random.key(3)}
  variables = WithJitter(False).init(rngs | {"params": jax.random.key(0)}, x)

  def loss(module, variables):
    y, _ = module.apply(variables, x, rngs=rngs)
    return jnp.sum(y * y)

  got, expected = (
    jax.jit(jax.value_and_grad(lambda v, m=m: loss(m, v)))(variables)
    for m in (WithJitter(True), WithJitter(False))
  )
  assert_same_tree(got, expected)


@pytest.mark.parametrize("name", ["SMoEBlock", "MixtureOfAttention"])
def test_every_intermediate_can_be_captured(name):
  sizes = dict(num_experts=E, top_k=K)
  if name == "SMoEBlock":
    sizes |= dict(d_expert=N, num_shared_experts=1, shared_gate=True)
  else:
    sizes |= dict(num_heads=2, head_dim=4)
  module, x = getattr(smnn, name)(**sizes), tokens()
  variables = randomized(module, x)

  @jax.jit
  def run(variables):
    return module.apply(variables, x, capture_intermediates=lambda *_: True)

  (y, *_), state = run(variables)
  seen = state["intermediates"]
  assert_same_tree(seen["__call__"][0][0], y)
  assert seen["router"]["__call__"][0].gates.shape == (T, K)


class Layers(nn.Module):
  """Three blocks with residuals, by nn.scan."""

  @nn.compact
  def __call__(self, x):
    def layer(module, x):
      y, metrics = module(x)
      return x + y, metrics

    scanned = nn.scan(
      layer,
      variable_axes={"params": 0, "router_state": 0},
      split_rngs={"params": True},
      length=3,
    )
    return scanned(block(scoring="sigmoid", use_selection_bias=True), x)


def test_scan_over_layers_equals_a_loop():
  x = tokens()
  layers = Layers()
  (y, metrics), variables = initialized(layers, x)
  assert metrics.tokens_per_expert.shape == (3, E)
  [name] = variables["params"]
  one = {collection: tree[name] for collection, tree in variables.items()}
  apply = jax.jit(block(scoring="sigmoid", use_selection_bias=True).apply)
  expected = x
  for i in range(3):
    expected += apply(jax.tree.map(lambda a, i=i: a[i], one), expected)[0]
  assert_same_tree(y, expected)
  grads = grads_of(layers, variables, x)[1]
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_lax_scan_over_batches_equals_a_loop():
  module = block()
  x = jnp.stack([tokens(i) for i in range(3)])
  variables = randomized(module, x[0])
  apply = jax.jit(lambda x: module.apply(variables, x)[0])
  _, y = jax.lax.scan(lambda _, x: (None, apply(x)), None, x)
  for i in range(3):
    assert_same_tree(y[i], apply(x[i]))


def test_vmap_over_parameters_equals_a_loop():
  module, x = block(), tokens()
  one = randomized(module, x)
  many = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), one)
  loss = lambda params: jnp.sum(module.apply(params, x)[0] ** 2)
  value, grads = jax.jit(jax.vmap(jax.value_and_grad(loss)))(many)
  step = jax.jit(jax.value_and_grad(loss))
  for i in range(3):
    expected = step(jax.tree.map(lambda a, i=i: a[i], many))
    got = value[i], jax.tree.map(lambda a, i=i: a[i], grads)
    assert_same_tree(got, expected)


@pytest.mark.slow
def test_linen_vmap_gives_each_member_its_parameters():
  ensemble = nn.vmap(
    smnn.SMoEBlock, variable_axes={"params": 0}, split_rngs={"params": True}
  )(num_experts=E, top_k=K, d_expert=N)
  x = jnp.stack([tokens()] * 2)
  (y, _), variables = initialized(ensemble, x)
  assert variables["params"]["experts"]["w_out"].shape == (2, E, N, D)
  assert np.abs(y[0] - y[1]).max() > 0.1


def test_logical_axis_names_reach_the_parameters():
  named = nn.with_logical_partitioning
  lecun = nn.initializers.lecun_normal(batch_axis=0)
  dense = nn.initializers.lecun_normal()
  module = block(
    kernel_init=named(lecun, ("expert", "embed", "mlp")),
    out_kernel_init=named(lecun, ("expert", "mlp", "embed")),
    router_kernel_init=named(dense, ("embed", None)),
    num_shared_experts=1,
    shared_kernel_init=named(dense, ("embed", "mlp")),
    shared_out_kernel_init=named(dense, ("mlp", "embed")),
  )
  x = tokens()
  variables = randomized(module, x)
  specs = nn.get_partition_spec(variables)["params"]
  spec = jax.sharding.PartitionSpec
  assert specs["experts"]["w_gate_up"] == spec("expert", "embed", "mlp")
  assert specs["experts"]["w_out"] == spec("expert", "mlp", "embed")
  assert specs["router"]["kernel"] == spec("embed", None)
  assert specs["shared"]["w_gate_up"] == spec("embed", "mlp")
  assert specs["shared"]["w_out"] == spec("mlp", "embed")
  rules = [("expert", "x"), ("embed", None), ("mlp", "y")]
  mesh_spec = nn.logical_to_mesh(specs["experts"]["w_gate_up"], rules)
  assert mesh_spec == spec("x", None, "y")
  boxed = jax.jit(module.apply)(variables, x)[0]
  plain = jax.jit(block(num_shared_experts=1).apply)
  plain = plain(nn.unbox(variables), x)[0]
  np.testing.assert_array_equal(boxed, plain)


def test_mesh_axes_split_the_parameters_and_change_no_number():
  axes = sm.sharding.MeshAxes(data="data", expert="expert", tensor="tensor")
  fields = dict(use_bias=True, bias_init=NORMAL, num_shared_experts=1)
  plain, meshed = block(**fields), block(mesh_axes=axes, **fields)
  x, mask = tokens(), jnp.arange(T).reshape(B, L) % 5 != 0
  key = jax.random.key(0)
  params = jax.jit(plain.init)(key, x)["params"]
  boxed = jax.jit(meshed.init)(key, x)["params"]
  spec = jax.sharding.PartitionSpec
  specs = nn.get_partition_spec(boxed)["experts"]
  assert specs["w_gate_up"] == spec("expert", "embed", None, "mlp")
  assert specs["bias_in"] == spec("expert", None, "mlp")
  split = nn.unbox(boxed)
  assert split["experts"]["w_gate_up"].shape == (E, D, 2, N)
  joined = {**split, "experts": sm.sharding.join_gate(split["experts"])}
  jax.tree.map(np.testing.assert_array_equal, joined, params)

  def step(module, params):
    def loss(params):
      y, metrics = module.apply({"params": params}, x, mask=mask)
      return jnp.sum(y * y) + metrics.load_balancing_loss, metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  mesh = jax.make_mesh(
    (2, 2, 2),
    ("data", "expert", "tensor"),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  with jax.set_mesh(mesh):
    got, grads = step(meshed, split)
  expected = step(plain, params)
  grads = {**grads, "experts": sm.sharding.join_gate(grads["experts"])}
  assert_same_tree((got, grads), expected)


@pytest.mark.parametrize("role", ["tensor", "fsdp", "expert"])
def test_shared_experts_run_on_explicit_axes(role):
  spec = jax.sharding.PartitionSpec
  axes = sm.sharding.MeshAxes(data="data", **{role: role})
  fields = dict(num_shared_experts=2, shared_gate=True)
  plain, meshed = block(**fields), block(mesh_axes=axes, **fields)
  x = jax.random.normal(jax.random.key(1), (8, L, D))
  boxed = jax.jit(meshed.init)(jax.random.key(0), x)
  params = nn.unbox(boxed)["params"]
  joined = {**params, "experts": sm.sharding.join_gate(params["experts"])}

  def step(module, params, x):
    def loss(params):
      y, _ = module.apply({"params": params}, x)
      return jnp.sum(y * y), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  mesh = jax.make_mesh(
    (2, 2), ("data", role), axis_types=(jax.sharding.AxisType.Explicit,) * 2
  )
  place = lambda a, spec: jax.device_put(
    a, jax.sharding.NamedSharding(mesh, spec)
  )
  specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), axes.rules)["params"]
  with jax.set_mesh(mesh):
    split = jax.tree.map(place, params, specs)
    got, grads = step(meshed, split, place(x, spec(axes.tokens)))
  grads = jax.device_get(grads)
  grads = {**grads, "experts": sm.sharding.join_gate(grads["experts"])}
  expected = step(plain, joined, x)
  assert_same_tree((jax.device_get(got), grads), expected)


def test_the_nnx_bridge_trains_a_block():
  x = tokens()
  linen = block(num_shared_experts=1)
  create = nnx.jit(
    lambda: nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
  )
  model = create()
  state = nnx.state(model, nnx.Param)
  params = nnx.to_pure_dict(state)
  params = {k: v for k, v in params.items() if k in ("router", "experts")} | {
    "shared": params["shared"]
  }

  @nnx.jit
  def loss_and_grads(model, x):
    def loss(model):
      y, metrics = model(x)
      return jnp.sum(y * y) + metrics.load_balancing_loss

    return nnx.value_and_grad(loss)(model)

  value, grads = loss_and_grads(model, x)
  expected = grads_of(linen, {"params": params}, x)
  assert_same_tree(value, expected[0])
  assert_same_tree(nnx.to_pure_dict(grads), expected[1])
