"""The ops on eight devices equal the ops on one, with all their gradients."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import scattermoe_jax as sm
from scattermoe_jax import sharding
from scattermoe_jax.ops import placement
from scattermoe_jax.sharding import MeshAxes, mlp
from tests import plain, strategies

# Eight devices divide none of T and k, and E = 8 * 3 leaves k = 4 above the
# experts of a device.
CASE = strategies.Case(29, 4, 24, 16, 8)
PATTERNS = ("some_not_here", "one_expert", "first_and_last", "none_here")
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}

EVERYTHING = MeshAxes(fsdp="a", expert="b", tensor="c")
LAYOUTS = {
  "data": ((8,), MeshAxes(data="a")),
  "fsdp": ((8,), MeshAxes(fsdp="a")),
  "tensor": ((8,), MeshAxes(tensor="a")),
  "expert": ((8,), MeshAxes(expert="a")),
  "data_expert": ((2, 4), MeshAxes(data="a", expert="b")),
  "fsdp_tensor": ((4, 2), MeshAxes(fsdp="a", tensor="b")),
  "two_axes_one_role": ((2, 4), MeshAxes(expert=("a", "b"))),
  "idle_axis": ((2, 4), MeshAxes(expert="a")),
  "fsdp_expert_tensor": ((2, 2, 2), EVERYTHING),
}


def mesh_of(shape, kind=AxisType.Auto):
  return jax.make_mesh(
    shape, tuple("abc"[: len(shape)]), axis_types=(kind,) * len(shape)
  )


def normal(seed, *shape, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.cache
def mlp_arguments(dtype):
  t, k, e, d, n, _ = CASE
  return tuple(
    normal(i, *shape, dtype=dtype)
    for i, shape in enumerate(
      ((t, d), (t, k), (e, d, 2, n), (e, n, d), (e, 2, n), (e, d))
    )
  )


@functools.partial(jax.jit, static_argnames=("axes",))
def mlp_and_gradients(expert_ids, *arguments, axes):
  def loss(x, gates, w_in, w_out, bias_in, bias_out):
    y = sharding.smoe_mlp(
      x, gates, expert_ids, w_in, w_out, axes=axes,
      bias_in=bias_in, bias_out=bias_out,
    )  # fmt: skip
    return jnp.sum(y * y), y

  grad = jax.value_and_grad(loss, argnums=tuple(range(6)), has_aux=True)
  (_, y), gradients = grad(*arguments)
  return dict(zip("y x gates w_in w_out bias_in bias_out".split(), (y, *gradients), strict=True))  # fmt: skip  # noqa: E501


@functools.cache
def on_one_device(pattern, dtype):
  return mlp_and_gradients(
    strategies.expert_ids(CASE, pattern), *mlp_arguments(dtype), axes=MeshAxes()
  )


def assert_equal(got, want, tolerance):
  for name in want:
    a, b = np.asarray(got[name]), np.asarray(want[name])
    assert a.shape == b.shape, name
    scale = np.max(np.abs(b), initial=0)
    error = np.max(np.abs(a - b), initial=0)
    assert error <= tolerance * scale, f"{name}: {error:.2e} of {scale:.2e}"


def check_mlp(layout, kind, dtype):
  shape, axes = LAYOUTS[layout]
  for pattern in PATTERNS:
    want = on_one_device(pattern, dtype)
    with jax.set_mesh(mesh_of(shape, kind)):
      got = mlp_and_gradients(
        strategies.expert_ids(CASE, pattern), *mlp_arguments(dtype), axes=axes
      )
    assert_equal(got, want, TOLERANCE[dtype])


def quick(*names):
  """All layouts; those not named are slow, since each compiles for seconds."""
  return [
    name if name in names else pytest.param(name, marks=pytest.mark.slow)
    for name in LAYOUTS
  ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_smoe_mlp_equals_one_device(layout):
  check_mlp(layout, AxisType.Auto, "float32")


@pytest.mark.parametrize("layout", quick("fsdp_expert_tensor"))
def test_smoe_mlp_equals_one_device_on_explicit_axes(layout):
  check_mlp(layout, AxisType.Explicit, "float32")


@pytest.mark.parametrize("layout", quick("fsdp_expert_tensor"))
def test_smoe_mlp_equals_one_device_in_float64(layout, x64):
  check_mlp(layout, AxisType.Auto, "float64")


def test_one_choice_a_token_equals_one_device():
  x, gates, w_in, w_out, *_ = mlp_arguments("float32")
  ids = jnp.asarray(strategies.expert_ids(CASE, "some_not_here")[:, :1])
  here = (ids >= 0) & (ids < CASE.num_experts)

  def results(layer):
    def loss(*arguments):
      y = layer(*arguments)
      return jnp.sum(y * y), y

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    # What is not here may hold anything.
    hidden = (jnp.where(here, a, jnp.nan) for a in (x, gates[:, :1]))
    (_, y), gradients = step(*hidden, w_in, w_out)
    return dict(enumerate((y, *gradients)))

  def on_one(x, gates, w_in, w_out):
    # Zeros, so that no product of NaN and zero is a gradient.
    x, gates = (jnp.where(here, a, 0) for a in (x, gates))
    w_in = w_in.reshape(*w_in.shape[:2], -1)
    return plain.smoe_mlp(x, gates, ids, w_in, w_out)

  want = results(on_one)
  with jax.set_mesh(mesh_of((2, 2, 2))):
    got = results(
      lambda x, gates, *w: sharding.smoe_mlp(x, gates, ids, *w, axes=EVERYTHING)
    )
  assert_equal(got, want, TOLERANCE["float32"])


def ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *,
  axis_name,
):  # fmt: skip
  """What jax.lax.ragged_all_to_all documents, by gathering everything."""
  here = lax.axis_index(axis_name)
  operands = lax.all_gather(operand, axis_name)
  first, size, landing = (
    lax.all_gather(a, axis_name)[:, here]
    for a in (input_offsets, send_sizes, output_offsets)
  )
  rows = jnp.arange(output.shape[0], dtype=jnp.int32)
  for source in range(operands.shape[0]):
    row = rows - landing[source]
    sent = (row >= 0) & (row < size[source])
    row = jnp.clip(row + first[source], 0, operand.shape[0] - 1)
    sent = sent.reshape(-1, *[1] * (output.ndim - 1))
    output = jnp.where(sent, operands[source][row], output)
  # Claims more rows than it has: a caller must know what it receives.
  assert recv_sizes.shape == size.shape
  return output


@pytest.mark.parametrize(
  "shape, axes",
  [
    pytest.param((8,), MeshAxes(expert="a"), marks=pytest.mark.slow),
    ((2, 2, 2), EVERYTHING),
  ],
  ids=["expert", "fsdp_expert_tensor"],
)
def test_smoe_mlp_equals_one_device_by_ragged_exchange(
  shape, axes, monkeypatch
):
  monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
  monkeypatch.setattr(mlp, "_check_exchange", lambda axes: None)
  axes = MeshAxes(
    fsdp=axes.fsdp, expert=axes.expert, tensor=axes.tensor,
    exchange="ragged_all_to_all",
  )  # fmt: skip
  for pattern in PATTERNS:
    want = on_one_device(pattern, "float32")  # Its arrays are of no mesh.
    with jax.set_mesh(mesh_of(shape)):
      got = mlp_and_gradients(
        strategies.expert_ids(CASE, pattern),
        *mlp_arguments("float32"),
        axes=axes,
      )
    assert_equal(got, want, 1e-5)


def test_capacity_drops_the_rows_of_the_last_devices(monkeypatch):
  monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
  monkeypatch.setattr(mlp, "_check_exchange", lambda axes: None)
  t, k, e, *_ = CASE
  ids = np.full((t, k), -1, np.int32)
  # Four devices, ceil(29 / 4) = 8 tokens each: 32 rows, and as many are taken.
  # Everyone chooses experts of device 1; device 0 has 28 rows for it.
  ids[:7, :] = 6 + np.arange(4)
  ids[8:20, :] = 6 + np.arange(4)
  kept = ids.copy()
  # Of the 32 rows of device 1 itself, the first 4 by expert find room.
  kept[12:] = -1
  kept[8:12, 1:] = -1
  axes = MeshAxes(
    data="a", expert="b", exchange="ragged_all_to_all", capacity_factor=1.0
  )
  with jax.set_mesh(mesh_of((1, 4))):
    got = mlp_and_gradients(ids, *mlp_arguments("float32"), axes=axes)
  want = mlp_and_gradients(kept, *mlp_arguments("float32"), axes=MeshAxes())
  assert_equal(got, want, 1e-5)


def test_smoe_mlp_takes_a_mesh_as_an_argument():
  x, gates, w_in, w_out, *_ = mlp_arguments("float32")
  ids = jnp.asarray(strategies.expert_ids(CASE, "some_not_here"))
  arguments = (x, gates, ids, w_in, w_out)
  got = sharding.smoe_mlp(
    *arguments, axes=MeshAxes(data="a"), mesh=mesh_of((8,))
  )
  want = sharding.smoe_mlp(*arguments, axes=MeshAxes(data="a"))
  assert_equal({"y": got}, {"y": want}, 1e-5)
  assert len(got.sharding.device_set) == 8


@pytest.mark.parametrize(
  "split, rows_per_token, kind",
  [
    ("columns", 1, AxisType.Explicit),
    ("rows", CASE.top_k, AxisType.Auto),
    pytest.param("columns", CASE.top_k, AxisType.Auto, marks=pytest.mark.slow),
    pytest.param("rows", 1, AxisType.Explicit, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_parallel_linear_equals_one_device(split, rows_per_token, kind, x64):
  t, k, e, d, n, _ = CASE
  arguments = (
    normal(0, t * rows_per_token, d, dtype="float64"),
    normal(1, e, d, n, dtype="float64"),
    normal(2, e, n, dtype="float64"),
  )

  @functools.partial(jax.jit, static_argnums=0)
  def run(axes, expert_ids, x, w, bias):
    def loss(x, w, bias):
      y = sharding.parallel_linear(
        x, w, expert_ids, axes=axes, split=split, bias=bias
      )
      return jnp.sum(y * y), y

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, y), (dx, dw, dbias) = grad(x, w, bias)
    return {"y": y, "dx": dx, "dw": dw, "dbias": dbias}

  for pattern in ("some_not_here", "one_expert"):
    ids = strategies.expert_ids(CASE, pattern)
    want = run(MeshAxes(), ids, *arguments)
    with jax.set_mesh(mesh_of((2, 2, 2), kind)):
      got = run(EVERYTHING, ids, *arguments)
    assert_equal(got, want, 1e-11)


def small(**changed):
  """Arguments of `sharding.smoe_mlp`, of widths that eight devices divide."""
  arguments = dict(
    x=normal(0, 8, 8),
    gates=normal(1, 8, 2),
    expert_ids=jnp.zeros((8, 2), jnp.int32),
    w_in=normal(2, 8, 8, 2, 8),
    w_out=normal(3, 8, 8, 8),
  )
  return arguments | changed


@pytest.mark.parametrize(
  "axes, changed, message",
  [
    (MeshAxes(data="z"), {}, r"mesh has axes \('a',\), not 'z'"),
    (
      MeshAxes(expert="a"),
      {"w_in": normal(0, 6, 8, 2, 8), "w_out": normal(0, 6, 8, 8)},
      r"num_experts = 6 is not a multiple of the 8 devices of \('a',\)",
    ),
    (MeshAxes(fsdp="a"), {"x": normal(0, 8, 12)}, "d = 12 is not a multiple"),
    (
      MeshAxes(tensor="a"),
      {"w_out": normal(0, 8, 4, 8)},
      "d_expert = 4 is not a multiple",
    ),
    (
      MeshAxes(tensor="a"),
      {"w_in": normal(0, 8, 8, 16)},
      r"pass \(E, d, 2, n\), as sharding.split_gate makes it",
    ),
  ],
  ids=["no_axis", "experts", "d", "d_expert", "gate"],
)
def test_smoe_mlp_says_what_a_mesh_cannot_split(
  axes, changed, message, unchecked
):
  with jax.set_mesh(mesh_of((8,))), pytest.raises(ValueError, match=message):
    sharding.smoe_mlp(**small(**changed), axes=axes)


def test_smoe_mlp_says_that_cpus_have_no_ragged_exchange():
  axes = MeshAxes(expert="a", exchange="ragged_all_to_all")
  with (
    jax.set_mesh(mesh_of((8,))),
    pytest.raises(NotImplementedError, match="use exchange='all_gather'"),
  ):
    sharding.smoe_mlp(**small(), axes=axes)


def test_smoe_mlp_says_that_an_axis_is_taken():
  mesh = mesh_of((8,))
  inside = jax.shard_map(
    lambda x: sharding.smoe_mlp(**small(x=x), axes=MeshAxes(data="a")),
    mesh=mesh,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
  )
  with pytest.raises(ValueError, match="inside one, call the ops themselves"):
    jax.jit(inside)(small()["x"])


def test_mesh_axes_play_one_role_each(unchecked):
  with pytest.raises(ValueError, match="plays two roles"):
    MeshAxes(data="a", expert=("b", "a"))
  with pytest.raises(ValueError, match="exchange must be"):
    MeshAxes(exchange="pigeons")
  with pytest.raises(ValueError, match="an all_gather brings every token"):
    MeshAxes(expert="a", capacity_factor=2.0)


def test_split_gate_is_undone_by_join_gate():
  experts = {"w_gate_up": normal(0, 2, 3, 8), "bias_in": normal(1, 2, 8)}
  plain = {"w_in": normal(2, 2, 3, 4), "bias_in": normal(3, 2, 4)}
  params = {"layer_0": {"experts": experts}, "layer_1": {"experts": plain}}
  params["shared"] = {"w_gate_up": normal(4, 3, 8)}
  split = sharding.split_gate(params)
  assert split["shared"]["w_gate_up"].shape == (3, 8)
  # The same numbers: the gate half is the first of the new axis.
  view = split["layer_0"]["experts"]["w_gate_up"]
  np.testing.assert_array_equal(view[:, :, 0], experts["w_gate_up"][..., :4])
  assert split["layer_0"]["experts"]["bias_in"].shape == (2, 2, 4)
  assert split["layer_1"]["experts"]["bias_in"].shape == (2, 4)
  jax.tree.map(np.testing.assert_array_equal, sharding.join_gate(split), params)
  jax.tree.map(np.testing.assert_array_equal, sharding.split_gate(split), split)


def test_gates_of_stacked_layers_are_split_and_joined():
  experts = {"w_gate_up": normal(0, 5, 2, 3, 8), "bias_in": normal(1, 5, 2, 8)}
  split = sharding.split_gate(experts)
  assert split["w_gate_up"].shape == (5, 2, 3, 2, 4)
  assert split["bias_in"].shape == (5, 2, 2, 4)
  joined = sharding.join_gate(split)
  for tree, same in ((joined, experts), (sharding.join_gate(joined), experts)):
    jax.tree.map(np.testing.assert_array_equal, tree, same)


@pytest.mark.parametrize("convert", [sharding.split_gate, sharding.join_gate])
def test_gates_in_boxes_are_refused(convert):
  box = nn.Partitioned(normal(0, 2, 3, 8), ("expert", None, "tensor"))
  message = "experts/w_gate_up is boxed, .* pass flax.linen.meta.unbox"
  with pytest.raises(ValueError, match=message):
    convert({"experts": {"w_gate_up": box}})


def split_tokens(x):
  return jax.device_put(x, NamedSharding(mesh_of((8,)), PartitionSpec("a")))


def test_an_op_without_a_wrapper_warns_that_the_compiler_splits_it():
  x, gates, ids, w_in, w_out = small().values()
  w_in = w_in.reshape(8, 8, 16)

  @jax.jit
  def gradient(x):
    routing = sm.route(ids, 8)
    return jax.grad(
      lambda x: sm.smoe_mlp(x, gates, routing, w_in, w_out).sum()
    )(x)

  gradient(x)  # one device: no word
  with pytest.warns(UserWarning, match="smoe_mlp: the compiler splits this"):
    gradient(split_tokens(x))


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("name", "x gates expert_ids w_in w_out".split())
def test_an_op_without_a_wrapper_refuses_what_explicit_axes_split(jit, name):
  given = small()
  given["w_in"] = given["w_in"].reshape(8, 8, 16)
  mesh = mesh_of((8,), AxisType.Explicit)
  split = NamedSharding(mesh, PartitionSpec("a"))
  given[name] = jax.device_put(given[name], split)

  def layer(x, gates, expert_ids, w_in, w_out):
    return sm.smoe_mlp(x, gates, sm.route(expert_ids, 8), w_in, w_out)

  op = "route" if name == "expert_ids" else "smoe_mlp"
  message = rf"{op}: {name} is split over \('a',\), .*jax.shard_map"
  with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match=message):
    jit(layer)(**given)


def test_a_kernel_without_a_wrapper_refuses_several_devices():
  kernel = types.ModuleType("scattermoe_jax.kernels.mosaic")

  def touch(ids):
    routing = placement.check_placement("smoe_mlp", kernel, sm.route(ids, 8))
    return routing.group_sizes

  message = "on 8 devices, 'mosaic' would run whole on each of them"
  ids = small()["expert_ids"]
  jax.jit(touch)(ids)
  jax.jit(jax.vmap(touch))(ids[None])
  with pytest.raises(NotImplementedError, match=message):
    jax.jit(touch)(split_tokens(ids))
  with pytest.raises(NotImplementedError, match=message):
    touch(split_tokens(ids))

  def on_axes(names):
    return jax.shard_map(
      touch,
      mesh=mesh_of((2, 4)),
      in_specs=PartitionSpec(),
      out_specs=PartitionSpec(),
      axis_names=names,
    )

  jax.jit(on_axes({"a", "b"}))(ids)
  with pytest.raises(NotImplementedError, match="on 4 devices"):
    jax.jit(on_axes({"a"}))(ids)
