"""What the Flax modules refuse while they are traced, and in what words."""

import re

import jax
import jax.numpy as jnp
import pytest

import scattermoe_jax as sm
from scattermoe_jax import nn as smnn

B, L, D, N, E, K = 2, 6, 16, 8, 4, 2
T = B * L
KEY = jax.random.key(0)
ONES = jnp.ones((B, L, D))
GATES = jnp.ones((B, L, K))
IDS = jnp.zeros((B, L, K), jnp.int32)

pytestmark = pytest.mark.usefixtures("unchecked")


def router(**fields):
  return smnn.Router(**{"num_experts": E, "top_k": K, **fields})


def mlp(**fields):
  return smnn.SMoEMLP(**{"num_experts": E, "d_expert": N, **fields})


def block(**fields):
  fields = {"num_experts": E, "top_k": K, "d_expert": N, **fields}
  return smnn.SMoEBlock(**fields)


def moa(**fields):
  fields = {"num_experts": E, "top_k": K, "num_heads": 2, **fields}
  return smnn.MixtureOfAttention(**{"head_dim": 4, **fields})


def refuses(error, message, module, *args, **given):
  """Asserts that tracing raises `error` with a message that starts so."""
  with pytest.raises(error, match=f"^{re.escape(message)}"):
    jax.eval_shape(lambda: module.init(KEY, *args, **given))


@pytest.mark.parametrize("shape", [(B, L, D), (D,)])
def test_router_refuses_what_is_not_rows(shape):
  refuses(
    ValueError,
    f"Router: x must be (T, d), got {shape}; flatten batch and sequence: "
    "x.reshape(-1, d).",
    router(),
    jnp.ones(shape),
  )


@pytest.mark.parametrize("shape", [(T, D), (B, 1, L, D)])
def test_moa_refuses_what_is_not_sequences(shape):
  refuses(
    ValueError,
    f"MixtureOfAttention: x must be (B, L, d), got {shape}; one sequence is",
    moa(),
    jnp.ones(shape),
  )


MAKE = {
  "Router": router,
  "SMoEMLP": mlp,
  "SMoEBlock": block,
  "MixtureOfAttention": moa,
}
INPUTS = {
  "Router": (jnp.ones((T, D)),),
  "SMoEMLP": (ONES, GATES, IDS),
  "SMoEBlock": (ONES,),
  "MixtureOfAttention": (ONES,),
}


@pytest.mark.parametrize("name", MAKE)
def test_token_ids_are_not_tokens(name):
  x, *rest = INPUTS[name]
  refuses(
    TypeError,
    f"{name}: x must be floating, got int32; embed token ids first.",
    MAKE[name](),
    x.astype(jnp.int32),
    *rest,
  )


@pytest.mark.parametrize("name", MAKE)
def test_a_list_is_not_an_array(name):
  x, *rest = INPUTS[name]
  message = f"{name}: x must be an array, got a list; jnp.asarray makes"
  refuses(TypeError, message, MAKE[name](), x.tolist(), *rest)


@pytest.mark.parametrize("name", ["gates", "expert_ids"])
def test_mlp_refuses_choices_in_a_list(name):
  given = {"gates": GATES, "expert_ids": IDS}
  given[name] = given[name].tolist()
  message = f"SMoEMLP: {name} must be an array, got a list"
  refuses(TypeError, message, mlp(), ONES, **given)


def test_mlp_refuses_choices_of_other_tokens():
  swapped = (L, B, K)
  refuses(
    ValueError,
    f"SMoEMLP: gates must have shape ({B}, {L}, k), one row per token of x, "
    f"got {swapped}.",
    mlp(),
    ONES,
    GATES.reshape(swapped),
    IDS.reshape(swapped),
  )
  message = f"SMoEMLP: gates must have shape ({B}, {L}, k)"
  routing = sm.route(IDS.reshape(T, K), E)
  refuses(ValueError, message, mlp(), ONES, GATES.reshape(swapped), routing)
  refuses(ValueError, message, mlp(), ONES, jnp.ones(()), IDS)


@pytest.mark.parametrize("shape", [(L, B, K), (B, L, 2 * K), (T, K)])
def test_mlp_refuses_gates_of_other_choices(shape):
  refuses(
    ValueError,
    f"SMoEMLP: expert_ids must have the shape of gates, {GATES.shape}, got "
    f"{shape}.",
    mlp(),
    ONES,
    GATES,
    jnp.zeros(shape, jnp.int32),
  )


LOGITS = jnp.ones((T, E))
ROUTED = smnn.RouterOutput(
  GATES.reshape(T, K), IDS.reshape(T, K), LOGITS, LOGITS
)
# By name: what takes a mask, and the mask's shape.
MASKED = {
  "SMoEBlock": (lambda mask: block().init(KEY, ONES, mask=mask), (B, L)),
  "MixtureOfAttention": (
    lambda mask: moa().init(KEY, ONES, mask=mask),
    (B, L),
  ),
  "route_with_metrics": (
    lambda mask: smnn.route_with_metrics(ROUTED, mask),
    (T,),
  ),
  "load_balancing_loss": (
    lambda mask: smnn.load_balancing_loss(LOGITS, jnp.ones((E,)), mask=mask),
    (T,),
  ),
  "router_z_loss": (
    lambda mask: smnn.router_z_loss(LOGITS, mask=mask),
    (T,),
  ),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_a_mask_is_bool(name, dtype):
  call, shape = MASKED[name]
  message = f"^{name}: mask must be bool, got {jnp.dtype(dtype)}; "
  with pytest.raises(TypeError, match=message):
    jax.eval_shape(call, jnp.zeros(shape, dtype))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("change", ["split", "one"])
def test_a_mask_has_one_entry_per_token(name, change):
  call, shape = MASKED[name]
  got = (1,) if change == "one" else (*shape[::-1], 1)
  message = f"{name}: mask must have shape {shape}, one entry per token, got "
  with pytest.raises(ValueError, match=f"^{re.escape(message + str(got))}"):
    jax.eval_shape(call, jnp.ones(got, bool))


def test_a_mask_is_an_array():
  message = "SMoEBlock: mask must be an array, got a list"
  refuses(TypeError, message, block(), ONES, mask=[[True] * L] * B)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"jitter": -0.1}, "jitter must lie in [0, 1), got -0.1"),
    ({"jitter": 1}, "jitter must lie in [0, 1), got 1"),
    ({"jitter": float("nan")}, "jitter must lie in [0, 1), got nan"),
    ({"top_groups": 4}, "top_groups must lie in [1, num_groups = 1], got 4"),
    (
      {"renormalize": False, "scoring": "softmax_top_k_renormalized"},
      "renormalize=False needs scoring='sigmoid', got "
      "'softmax_top_k_renormalized'; scoring='softmax_top_k' is the softmax "
      "that is not renormalized.",
    ),
  ],
)
@pytest.mark.parametrize("name", ["Router", "SMoEBlock", "MixtureOfAttention"])
def test_router_refuses_fields_without_effect(name, fields, message):
  module = MAKE[name](**fields)
  refuses(ValueError, f"Router: {message}", module, *INPUTS[name])


def test_block_refuses_the_gate_of_no_shared_experts():
  refuses(
    ValueError,
    "SMoEBlock: shared_gate=True weighs shared experts, but num_shared_experts "
    "= 0 and d_shared = None; give one of them.",
    block(shared_gate=True),
    ONES,
  )


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("Router", {"num_experts": 4.0}),
    ("Router", {"top_k": 2.0}),
    ("Router", {"top_k": True}),
    ("Router", {"num_groups": 2.0, "scoring": "sigmoid"}),
    ("Router", {"top_groups": 1.0, "scoring": "sigmoid", "num_groups": 2}),
    ("SMoEMLP", {"num_experts": 4.0}),
    ("SMoEMLP", {"d_expert": 8.0}),
    ("SMoEBlock", {"num_experts": 4.0}),
    ("SMoEBlock", {"top_k": 2.0}),
    ("SMoEBlock", {"d_expert": 8.0}),
    ("SMoEBlock", {"num_shared_experts": 1.0}),
    ("SMoEBlock", {"d_shared": 8.0}),
    ("MixtureOfAttention", {"num_experts": 4.0}),
    ("MixtureOfAttention", {"top_k": 2.0}),
    ("MixtureOfAttention", {"num_heads": 2.0}),
    ("MixtureOfAttention", {"head_dim": 4.0}),
  ],
)
def test_sizes_are_ints(name, fields):
  field, got = next(iter(fields.items()))
  message = f"{name}: {field} must be a static int, got {got}."
  refuses(TypeError, message, MAKE[name](**fields), *INPUTS[name])


def test_attention_implementation_is_one_that_there_is():
  known = "must be one of (None, 'cudnn', 'xla'), got 'flash'."
  refuses(
    ValueError,
    f"MixtureOfAttention: attention_implementation {known}",
    moa(attention_implementation="flash"),
    ONES,
  )
  q = jnp.ones((B, L, 2, 4))
  with pytest.raises(
    ValueError, match=re.escape(f"attend: implementation {known}")
  ):
    smnn.attend(q, q, q, implementation="flash", sinks=jnp.ones((2,)))
