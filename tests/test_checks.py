"""Every message a user can meet, matched by pattern."""

import jax.numpy as jnp
import pytest

from scattermoe_jax import combine, parallel_linear, route, smoe_mlp
from scattermoe_jax.ops import linear_combine

T, k, E, d, n = 8, 2, 3, 6, 5


def ones(*shape, dtype=jnp.float32):
  return jnp.ones(shape, dtype)


def routing():
  return route(jnp.zeros((T, k), jnp.int32), E)


GOOD = {
  parallel_linear: {"x": ones(T, d), "w": ones(E, d, n)},
  smoe_mlp: {
    "x": ones(T, d),
    "gates": ones(T, k),
    "w_in": ones(E, d, 2 * n),
    "w_out": ones(E, n, d),
  },
  linear_combine: {
    "x": ones(T * k, n),
    "gates": ones(T, k),
    "w": ones(E, n, d),
  },
  combine: {"y": ones(T * k, d), "gates": ones(T, k)},
}

BAD = {
  # parallel_linear
  "x_of_three_axes": (
    parallel_linear,
    {"x": ones(2, T, d)},
    ValueError,
    r"parallel_linear: x must have shape \(rows, d\), got \(2, 8, 6\); flatten",
  ),
  "x_of_other_rows": (
    parallel_linear,
    {"x": ones(12, d)},
    ValueError,
    r"x has 12 rows; this routing needs T = 8 \(one per token\) or S = 16",
  ),
  "grouped_x_of_T_rows": (
    parallel_linear,
    {"grouped_in": True},
    ValueError,
    r"x has 8 rows; this routing needs S = 16 \(one per choice\) for a grouped",
  ),
  "w_of_two_axes": (
    parallel_linear,
    {"w": ones(d, n)},
    ValueError,
    r"parallel_linear: w must have shape \(E, d_in, d_out\), got \(6, 5\)",
  ),
  "w_of_other_experts": (
    parallel_linear,
    {"w": ones(E + 1, d, n)},
    ValueError,
    r"parallel_linear: w has 4 experts, the routing 3",
  ),
  "w_of_other_width": (
    parallel_linear,
    {"w": ones(E, n, d)},
    ValueError,
    r"w reads rows of width 5, but got rows of width 6; w is \(E, d_in, d_out",
  ),
  "bias_of_other_shape": (
    parallel_linear,
    {"bias": ones(E, d)},
    ValueError,
    r"bias must have shape \(E, d_out\) = \(3, 5\), got \(3, 6\)",
  ),
  "integer_x": (
    parallel_linear,
    {"x": ones(T, d, dtype=jnp.int32)},
    TypeError,
    r"parallel_linear: x must be of a floating-point dtype, got int32",
  ),
  "complex_x": (
    parallel_linear,
    {"x": ones(T, d, dtype=jnp.complex64)},
    TypeError,
    r"parallel_linear: x must be of a floating-point dtype, got complex64",
  ),
  "w_of_another_dtype": (
    parallel_linear,
    {"w": ones(E, d, n, dtype=jnp.bfloat16)},
    TypeError,
    r"parallel_linear: w is bfloat16 but x is float32; cast one .* dtype field",
  ),
  "unknown_implementation": (
    parallel_linear,
    {"implementation": "cuda"},
    ValueError,
    r"implementation='cuda': not one of mosaic, triton, xla",
  ),
  "implementation_that_cannot": (
    parallel_linear,
    {"implementation": "mosaic"},
    NotImplementedError,
    r"implementation='mosaic' cannot run this: \w+",
  ),
  # smoe_mlp
  "mlp_x_of_three_axes": (
    smoe_mlp,
    {"x": ones(2, T, d)},
    ValueError,
    r"smoe_mlp: x must have shape \(rows, d\), got \(2, 8, 6\); flatten",
  ),
  "mlp_x_of_S_rows": (
    smoe_mlp,
    {"x": ones(T * k, d)},
    ValueError,
    r"smoe_mlp: x has 16 rows; this routing needs T = 8 \(one per token\)",
  ),
  "gates_of_other_shape": (
    smoe_mlp,
    {"gates": ones(T, E)},
    ValueError,
    r"smoe_mlp: gates must have shape \(T, k\) = \(8, 2\), got \(8, 3\)",
  ),
  "integer_gates": (
    smoe_mlp,
    {"gates": ones(T, k, dtype=jnp.int32)},
    TypeError,
    r"smoe_mlp: gates must be of a floating-point dtype, got int32",
  ),
  "widths_that_disagree": (
    smoe_mlp,
    {"w_in": ones(E, d, 7)},
    ValueError,
    r"w_in has 7 columns and w_out reads n = 5; .* n = 5 columns, or 2n = 10",
  ),
  "w_out_of_another_d": (
    smoe_mlp,
    {"w_out": ones(E, n, d + 1)},
    ValueError,
    r"smoe_mlp: w_out writes rows of width 7, but x has width 6",
  ),
  "w_in_of_another_d": (
    smoe_mlp,
    {"w_in": ones(E, d + 1, 2 * n)},
    ValueError,
    r"smoe_mlp: w_in reads rows of width 7, but got rows of width 6",
  ),
  "bias_out_of_other_shape": (
    smoe_mlp,
    {"bias_out": ones(E, n)},
    ValueError,
    r"smoe_mlp: bias_out must have shape \(E, d_out\) = \(3, 6\), got \(3, 5\)",
  ),
  "w_out_of_another_dtype": (
    smoe_mlp,
    {"w_out": ones(E, n, d, dtype=jnp.bfloat16)},
    TypeError,
    r"smoe_mlp: w_out is bfloat16 but x is float32; cast one of them",
  ),
  "unknown_activation": (
    smoe_mlp,
    {"activation": "swiglu"},
    ValueError,
    r"smoe_mlp: activation must be one of \('silu', .* got 'swiglu'",
  ),
  "plain_weights_for_a_gated_activation": (
    smoe_mlp,
    {"activation": "clamped_swiglu", "w_in": ones(E, d, n)},
    ValueError,
    r"smoe_mlp: activation 'clamped_swiglu' needs w_in of width 2n: w_in has",
  ),
  "chunks_that_do_not_divide": (
    smoe_mlp,
    {"num_chunks": 4},
    ValueError,
    r"num_chunks must be a divisor of d = 6",
  ),
  "no_chunks": (
    smoe_mlp,
    {"num_chunks": 0},
    ValueError,
    r"smoe_mlp: num_chunks must be at least 1, got 0",
  ),
  "chunks_of_a_float": (
    smoe_mlp,
    {"num_chunks": 2.0},
    TypeError,
    r"smoe_mlp: num_chunks must be a static int, got 2.0",
  ),
  # combine
  "y_of_T_rows": (
    combine,
    {"y": ones(T, d)},
    ValueError,
    r"combine: y has 8 rows; this routing needs S = 16 \(one per choice\)",
  ),
  "combine_gates_of_other_shape": (
    combine,
    {"gates": ones(T * k)},
    ValueError,
    r"combine: gates must have shape \(T, k\) = \(8, 2\), got \(16,\)",
  ),
  "integer_y": (
    combine,
    {"y": ones(T * k, d, dtype=jnp.int32)},
    TypeError,
    r"combine: \w+ must be of a floating-point dtype, got int32",
  ),
}


@pytest.mark.parametrize(
  ("function", "change", "error", "message"), BAD.values(), ids=BAD.keys()
)
def test_a_bad_argument_is_explained(
  function, change, error, message, unchecked
):
  with pytest.raises(error, match=message):
    function(routing=routing(), **(GOOD[function] | change))


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
  ("given", "came"),
  [
    (jnp.zeros((T, k), jnp.int32), r"an array int32\[8, 2\]"),
    (tuple(routing()), "a tuple"),
    (None, "None"),
  ],
  ids=["ids", "tuple", "none"],
)
def test_what_is_no_routing_is_told_how_to_become_one(
  function, given, came, unchecked
):
  message = f"{function.__name__}: routing must be a Routing, got {came}; make"
  with pytest.raises(TypeError, match=message + r".*route\(expert_ids, num_ex"):
    function(routing=given, **GOOD[function])


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
  ("given", "came"), [([1.0], "a list"), (None, "None")], ids=["list", "none"]
)
def test_what_is_no_array_is_named(function, given, came, unchecked):
  for name in GOOD[function]:
    message = f"{function.__name__}: {name} must be an array, got {came}; jnp"
    with pytest.raises(TypeError, match=message):
      function(routing=routing(), **GOOD[function] | {name: given})


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_the_good_arguments_are_good(function):
  assert function(routing=routing(), **GOOD[function]).ndim == 2
