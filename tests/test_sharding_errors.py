"""What `sharding` says of arguments that belong to other tokens or layouts."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import scattermoe_jax as sm
from scattermoe_jax import sharding
from scattermoe_jax.sharding import MeshAxes

T, k, E, d, n = 16, 2, 8, 8, 8
IDS = jnp.zeros((T, k), jnp.int32)
AXES = {
  "no_mesh": MeshAxes(),
  "data": MeshAxes(data="a"),
  "fsdp": MeshAxes(fsdp="a"),
  "tensor": MeshAxes(tensor="a"),
  "expert": MeshAxes(expert="a"),
}


def ones(*shape):
  return jnp.ones(shape, jnp.float32)


GOOD = {
  sharding.smoe_mlp: {
    "x": ones(T, d),
    "gates": ones(T, k),
    "expert_ids": IDS,
    "w_in": ones(E, d, 2, n),
    "w_out": ones(E, n, d),
  },
  sharding.parallel_linear: {
    "x": ones(T, d),
    "expert_ids": IDS,
    "w": ones(E, d, n),
  },
}


def bad_biases(function, name, width):
  """Returns cases of a bias that is not of its matrices."""
  message = rf"{function}: {name} must have shape \(E, d_out\) = \(8, 8\), got"
  return {
    f"{name}_of_fewer_experts": (
      {name: ones(E // 2, width)},
      ValueError,
      message,
    ),
    f"{name}_of_another_width": (
      {name: ones(E, width + 8)},
      ValueError,
      message,
    ),
  }


# What is wrong with the ids, whatever the function.
BAD_IDS = {
  "float_ids": (
    {"expert_ids": IDS.astype(jnp.float32)},
    TypeError,
    "expert_ids must be integers, got float32; pass the ids",
  ),
  "ids_of_one_axis": (
    {"expert_ids": IDS[:, 0]},
    ValueError,
    r"expert_ids must have shape \(T, k\), got \(16,\); flatten",
  ),
  "ids_of_a_list": (
    {"expert_ids": IDS.tolist()},
    TypeError,
    "expert_ids must be an array of integers, got a list; jnp.asarray",
  ),
}
BAD_MLP = {
  "w_in_of_fewer_experts": (
    {"w_in": ones(E // 2, d, 2 * n)},
    ValueError,
    rf"smoe_mlp: w_in \({E // 2}, .*\) is of {E // 2} experts, w_out .* of {E}",
  ),
  **bad_biases("smoe_mlp", "bias_out", d),
  "8_gates": (
    {"gates": ones(8, k)},
    ValueError,
    r"smoe_mlp: gates must have shape \(T, k\) = \(16, 2\), got \(8, 2\)",
  ),
  "15_gates": (
    {"gates": ones(15, k)},
    ValueError,
    r"smoe_mlp: gates must have shape \(T, k\) = \(16, 2\), got \(15, 2\)",
  ),
  "8_ids": (
    {"expert_ids": IDS[:8]},
    ValueError,
    r"smoe_mlp: x has 16 rows; this routing needs T = 8 \(one per token\)",
  ),
  "15_ids_and_gates": (
    {"expert_ids": IDS[:15], "gates": ones(15, k)},
    ValueError,
    r"smoe_mlp: x has 16 rows; this routing needs T = 15 \(one per token\)",
  ),
  "8_rows": (
    {"x": ones(8, d)},
    ValueError,
    r"smoe_mlp: x has 8 rows; this routing needs T = 16 \(one per token\)",
  ),
  "17_rows": (
    {"x": ones(17, d)},
    ValueError,
    r"smoe_mlp: x has 17 rows; this routing needs T = 16 \(one per token\)",
  ),
  "x_of_three_axes": (
    {"x": ones(T, 2, d)},
    ValueError,
    r"smoe_mlp: x must have shape \(rows, d\), got \(16, 2, 8\); flatten",
  ),
  "x_of_a_list": (
    {"x": ones(T, d).tolist()},
    TypeError,
    "smoe_mlp: x must be an array, got a list; jnp.asarray",
  ),
  "w_out_of_a_list": (
    {"w_out": ones(E, n, d).tolist()},
    TypeError,
    "smoe_mlp: w_out must be an array, got a list; jnp.asarray",
  ),
  "w_out_of_none": (
    {"w_out": None},
    TypeError,
    "smoe_mlp: w_out must be an array, got None",
  ),
  "gates_of_none": (
    {"gates": None},
    TypeError,
    "smoe_mlp: gates must be an array, got None",
  ),
  "mesh_of_a_list": (
    {"mesh": ["a"]},
    TypeError,
    "smoe_mlp: mesh must be a jax.sharding.Mesh, got a list; jax.make_mesh",
  ),
  "w_out_of_two_axes": (
    {"w_out": ones(E, d)},
    ValueError,
    r"smoe_mlp: w_out must have shape \(E, d_in, d_out\), got \(8, 8\)",
  ),
  "gate_axis_last": (
    {"w_in": ones(E, d, n, 2)},
    ValueError,
    r"smoe_mlp: w_in has columns of shape \(8, 2\); .* they are \(2, n\)",
  ),
  "gate_axis_of_bias_last": (
    {"bias_in": ones(E, n, 2)},
    ValueError,
    r"smoe_mlp: bias_in has columns of shape \(8, 2\); .* they are \(2, n\)",
  ),
}
BAD_LINEAR = {
  "7_ids": (
    {"expert_ids": IDS[:7]},
    ValueError,
    r"x has 16 rows; this routing needs T = 7 \(one per token\) or S = 14",
  ),
  "rows_up_to_the_padding": (
    {"expert_ids": IDS[:13], "x": ones(14, d)},
    ValueError,
    r"x has 14 rows; this routing needs T = 13 \(one per token\) or S = 26",
  ),
  "15_rows": (
    {"x": ones(15, d)},
    ValueError,
    r"parallel_linear: x has 15 rows; this routing needs T = 16 \(one per",
  ),
  "33_rows": (
    {"x": ones(33, d)},
    ValueError,
    r"parallel_linear: x has 33 rows; this routing needs T = 16 .* S = 32",
  ),
  "w_of_two_axes": (
    {"w": ones(E, d)},
    ValueError,
    r"parallel_linear: w must have shape \(E, d_in, d_out\), got \(8, 8\)",
  ),
  "w_of_none": (
    {"w": None},
    TypeError,
    "parallel_linear: w must be an array, got None",
  ),
  **bad_biases("parallel_linear", "bias", n),
  "mesh_of_a_list": (
    {"mesh": ["a"]},
    TypeError,
    "parallel_linear: mesh must be a jax.sharding.Mesh, got a list; jax.make_",
  ),
  "unknown_split": (
    {"split": "column"},
    ValueError,
    r"parallel_linear: split must be one of \('columns', 'rows'\), got 'col",
  ),
  "grouped_in": (
    {"x": ones(T * k, d), "grouped_in": True},
    ValueError,
    "parallel_linear: got grouped_in or grouped_out, and a mesh has no",
  ),
  "grouped_out": (
    {"grouped_out": True},
    ValueError,
    "parallel_linear: got grouped_in or grouped_out, and a mesh has no",
  ),
}
BAD = {
  f"{function.__name__}-{name}": (function, *case)
  for function, cases in (
    (sharding.smoe_mlp, BAD_MLP | BAD_IDS),
    (sharding.parallel_linear, BAD_LINEAR | BAD_IDS),
  )
  for name, case in cases.items()
}


def mesh_of(kind):
  return jax.make_mesh((8,), ("a",), axis_types=(kind,))


def run(function, axes, change, kind=AxisType.Auto):
  with jax.set_mesh(mesh_of(kind)):
    return function(**GOOD[function] | change, axes=axes)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
@pytest.mark.parametrize(
  ("function", "change", "error", "message"), BAD.values(), ids=BAD.keys()
)
def test_a_bad_argument_is_explained(
  function, change, error, message, axes, unchecked
):
  with pytest.raises(error, match=message):
    run(function, axes, change)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_a_routing_is_told_to_be_ids(function, axes, unchecked):
  message = f"{function.__name__}: expert_ids must be .* got a Routing; pass"
  with pytest.raises(TypeError, match=message):
    run(function, axes, {"expert_ids": sm.route(IDS, E)})


@pytest.mark.parametrize(
  ("axes", "came"),
  [("a", "a str"), ({"data": "a"}, "a dict"), (None, "a NoneType")],
)
@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_what_are_no_axes_is_told_how_to_become_some(
  function, axes, came, unchecked
):
  message = f"{function.__name__}: axes must be a MeshAxes, got {came}; MeshA"
  with pytest.raises(TypeError, match=message):
    run(function, axes, {})


@pytest.mark.parametrize(
  ("fields", "error", "message"),
  [
    ({"data": 1}, TypeError, "data must be the name .* got 1"),
    ({"fsdp": ("a", 1)}, TypeError, r"fsdp must be the name .* \('a', 1\)"),
    ({"expert": None}, TypeError, "expert must be the name .* got None"),
    ({"capacity_factor": 0}, ValueError, "capacity_factor must be .* got 0;"),
    ({"capacity_factor": -1.0}, ValueError, "must be above 0 .* got -1.0;"),
    ({"capacity_factor": jnp.inf}, ValueError, "and finite, got inf;"),
    ({"capacity_factor": jnp.nan}, ValueError, "and finite, got nan;"),
  ],
)
def test_axes_refuse_fields_that_cannot_be(fields, error, message, unchecked):
  with pytest.raises(error, match=f"MeshAxes: .*{message}"):
    MeshAxes(exchange="ragged_all_to_all", **fields)


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_arrays_that_explicit_axes_split_are_checked_too(function, unchecked):
  split = jax.sharding.NamedSharding(
    mesh_of(AxisType.Explicit), jax.sharding.PartitionSpec("a")
  )
  ids = jax.device_put(IDS[:8], split)
  x = jax.device_put(ones(T + 8, d), split)
  with pytest.raises(ValueError, match="x has 24 rows; this routing needs T"):
    change = {"expert_ids": ids, "x": x}
    run(function, MeshAxes(data="a"), change, AxisType.Explicit)


def test_a_routing_of_split_ids_says_what_a_module_takes():
  mesh = mesh_of(AxisType.Explicit)
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
  ids = jax.device_put(IDS[:8], split)
  message = r"route: expert_ids is split over .* \(Flax modules: mesh_axes="
  with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match=message):
    sm.route(ids, E)


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_the_good_arguments_are_good(function):
  y = run(function, MeshAxes(data="a"), {})
  assert len(y.sharding.device_set) == 8
