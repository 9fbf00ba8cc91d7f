"""What the Flax modules refuse while they are traced, and in what words."""

import re

import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax import linen as nn

import scattermoe_jax as sm
from scattermoe_jax import nn as smnn
from scattermoe_jax import sharding
from scattermoe_jax.models.config import ModelConfig

B, L, D, N, E, K = 2, 6, 16, 8, 4, 2
T = B * L
KEY = jax.random.key(0)
ONES = jnp.ones((B, L, D))
GATES = jnp.ones((B, L, K))
IDS = jnp.zeros((B, L, K), jnp.int32)
HEADS = jnp.ones((B, L, 2, 4))

pytestmark = pytest.mark.usefixtures("unchecked")


def router(**fields):
  return smnn.Router(**{"num_experts": E, "top_k": K, **fields})


def mlp(**fields):
  return smnn.SMoEMLP(**{"num_experts": E, "d_expert": N, **fields})


def block(**fields):
  fields = {"num_experts": E, "top_k": K, "d_expert": N, **fields}
  return smnn.SMoEBlock(**fields)


def linear(**fields):
  return smnn.ParallelLinear(**{"features": N, "num_experts": E, **fields})


def dense(**fields):
  return smnn.DenseMLP(**{"d_hidden": N, **fields})


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
    f"Router: x must have shape (T, d), got {shape}; flatten batch and "
    "sequence: x.reshape(-1, d).",
    router(),
    jnp.ones(shape),
  )


@pytest.mark.parametrize("num_experts", [E // 2, 2 * E])
def test_a_routing_to_other_experts_is_refused_on_a_mesh_too(num_experts):
  routing = sm.route(IDS.reshape(T, K), num_experts)
  axes = sharding.MeshAxes(expert="e")
  with jax.set_mesh(jax.make_mesh((1,), ("e",))):
    refuses(
      ValueError,
      f"SMoEMLP: expert_ids is a Routing of {num_experts} experts, but "
      f"num_experts = {E}; route to",
      mlp(mesh_axes=axes),
      *(ONES, GATES, routing),
    )


@pytest.mark.parametrize("shape", [(T, D), (B, 1, L, D)])
def test_moa_refuses_what_is_not_sequences(shape):
  refuses(
    ValueError,
    f"MixtureOfAttention: x must have shape (B, L, d), got {shape}; one "
    "sequence is",
    moa(),
    jnp.ones(shape),
  )


MAKE = {
  "Router": router,
  "SMoEMLP": mlp,
  "SMoEBlock": block,
  "MixtureOfAttention": moa,
  "ParallelLinear": linear,
  "DenseMLP": dense,
}
INPUTS = {
  "Router": (jnp.ones((T, D)),),
  "SMoEMLP": (ONES, GATES, IDS),
  "SMoEBlock": (ONES,),
  "MixtureOfAttention": (ONES,),
  "ParallelLinear": (jnp.ones((T, D)), sm.route(IDS.reshape(T, K), E)),
  "DenseMLP": (ONES,),
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
def test_tokens_have_a_feature(name):
  x, *rest = INPUTS[name]
  message = f"{name}: x must have shape (..., d), d at least 1, got "
  refuses(ValueError, message, MAKE[name](), x[..., :0], *rest)


@pytest.mark.parametrize("name", ["SMoEMLP", "SMoEBlock", "DenseMLP"])
def test_a_number_is_no_token(name):
  x, *rest = INPUTS[name]
  message = f"{name}: x must have shape (..., d), d at least 1, got ()."
  refuses(ValueError, message, MAKE[name](), x[0, 0, 0], *rest)


@pytest.mark.parametrize("name", MAKE)
def test_a_list_is_not_an_array(name):
  x, *rest = INPUTS[name]
  message = f"{name}: x must be an array, got a list; jnp.asarray makes"
  refuses(TypeError, message, MAKE[name](), x.tolist(), *rest)
  message = f"{name}: x must be an array, got None"
  refuses(TypeError, message, MAKE[name](), None, *rest)


@pytest.mark.parametrize("field", ["dtype", "param_dtype"])
@pytest.mark.parametrize(
  "name", ["Router", "SMoEMLP", "ParallelLinear", "DenseMLP"]
)
def test_a_module_computes_and_keeps_floats(name, field):
  message = f"{name}: {field} must be floating, got int32."
  module = MAKE[name](**{field: jnp.int32})
  refuses(TypeError, message, module, *INPUTS[name])


@pytest.mark.parametrize("is_boxed", [False, True], ids=["unboxed", "boxed"])
@pytest.mark.parametrize("name", ["SMoEMLP", "SMoEBlock"])
def test_parameters_made_for_a_mesh_are_for_one(name, is_boxed):
  alone, meshed = MAKE[name](), MAKE[name](mesh_axes=sharding.MeshAxes("a"))
  message = "^SMoEMLP: w_gate_up has the shape .* made {} mesh_axes; pass .*{}"
  for made, used, words in (
    (alone, meshed, ("without", "split_gate")),
    (meshed, alone, ("with", "join_gate")),
  ):
    params = jax.eval_shape(made.init, KEY, *INPUTS[name])
    params = params if is_boxed else nn.unbox(params)
    with (
      jax.set_mesh(jax.make_mesh((1,), ("a",))),
      pytest.raises(ValueError, match=message.format(*words)),
    ):
      jax.eval_shape(used.apply, params, *INPUTS[name])


@pytest.mark.parametrize("name", ["SMoEMLP", "SMoEBlock", "DenseMLP"])
def test_mesh_axes_are_said_by_their_type(name):
  module = MAKE[name](mesh_axes="data")
  message = f"{name}: mesh_axes must be a MeshAxes, got a str; MeshAxes(data="
  refuses(TypeError, message, module, *INPUTS[name])


def test_linear_refuses_what_is_not_rows():
  _, routing = INPUTS["ParallelLinear"]
  message = (
    f"ParallelLinear: x must have shape (rows, d), got {ONES.shape}; flatten"
  )
  refuses(ValueError, message, linear(), ONES, routing)


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
    ("MixtureOfAttention", {"sliding_window": 4.0}),
    ("ParallelLinear", {"features": 8.0}),
    ("ParallelLinear", {"num_experts": 4.0}),
    ("DenseMLP", {"d_hidden": 8.0}),
  ],
)
def test_sizes_are_ints(name, fields):
  field, got = next(iter(fields.items()))
  message = f"{name}: {field} must be a static int, got {got}."
  refuses(TypeError, message, MAKE[name](**fields), *INPUTS[name])


@pytest.mark.parametrize("got", [0, -1])
@pytest.mark.parametrize(
  ("name", "field"),
  [
    ("Router", "num_experts"),
    ("Router", "top_k"),
    ("Router", "num_groups"),
    ("Router", "top_groups"),
    ("SMoEMLP", "num_experts"),
    ("SMoEMLP", "d_expert"),
    ("SMoEBlock", "num_experts"),
    ("SMoEBlock", "top_k"),
    ("SMoEBlock", "d_expert"),
    ("MixtureOfAttention", "num_experts"),
    ("MixtureOfAttention", "top_k"),
    ("MixtureOfAttention", "num_heads"),
    ("MixtureOfAttention", "head_dim"),
    ("MixtureOfAttention", "sliding_window"),
    ("ParallelLinear", "features"),
    ("ParallelLinear", "num_experts"),
    ("DenseMLP", "d_hidden"),
  ],
)
def test_sizes_are_above_zero(name, field, got):
  message = f"{name}: {field} must be at least 1, got {got}."
  refuses(ValueError, message, MAKE[name](**{field: got}), *INPUTS[name])


@pytest.mark.parametrize("field", ["num_shared_experts", "d_shared"])
def test_shared_experts_are_none_or_more(field):
  message = f"SMoEBlock: {field} must be at least 0, got -1."
  refuses(ValueError, message, block(**{field: -1}), ONES)


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan")])
def test_the_base_of_rotary_frequencies_is_above_zero(theta):
  message = f"rope_theta must be above 0, got {theta}."
  module = moa(rope_theta=theta)
  refuses(ValueError, f"MixtureOfAttention: {message}", module, ONES)
  with pytest.raises(ValueError, match=f"^ModelConfig: {message}"):
    ModelConfig(rope_theta=theta)
  with pytest.raises(ValueError, match="^rotary_embedding: theta must be abov"):
    smnn.rotary_embedding(HEADS, IDS[:, :, 0], theta=theta)


def refuses_scaling(message, theta=10000.0, **numbers):
  """Asserts that the function and a module refuse a scaling so."""
  numbers = {"factor": 4.0, "original_max_positions": 8, **numbers}
  scaling = smnn.RopeScaling(**numbers)
  message = f"rotary_embedding: {message}"
  with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
    smnn.rotary_embedding(HEADS, IDS[:, :, 0], theta=theta, scaling=scaling)
  module = moa(rope_theta=theta, rope_scaling=scaling)
  refuses(ValueError, message, module, ONES)


@pytest.mark.parametrize("got", [0, -1, float("nan")])
@pytest.mark.parametrize(
  "field", ["factor", "original_max_positions", "beta_fast", "beta_slow"]
)
def test_the_numbers_of_a_scaling_are_above_zero(field, got):
  message = f"scaling.{field} must be above 0, got {got}."
  refuses_scaling(message, **{field: got})


@pytest.mark.parametrize("theta", [1, 1.0, 0.5])
def test_a_scaling_needs_slower_and_faster_rotations(theta):
  message = f"theta must be above 1 with a scaling, got {theta}; no rotation"
  refuses_scaling(message, theta=theta)
  # Without one, all may turn at the same speed.
  smnn.rotary_embedding(HEADS, IDS[:, :, 0], theta=theta)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_holds_at_least_the_token_itself(window):
  message = f"sliding_window must be at least 1, got {window}."
  with pytest.raises(ValueError, match=f"^ModelConfig: {message}"):
    ModelConfig(sliding_window=window)
  with pytest.raises(ValueError, match=f"^ModelConfig: {message}"):
    ModelConfig.from_dict(ModelConfig().to_dict() | {"sliding_window": window})
  with pytest.raises(ValueError, match=f"^attend: {message}"):
    smnn.attend(HEADS, HEADS, HEADS, sliding_window=window)


CACHE = smnn.KVCache.empty(B, L, 2, 4)
BAD_SEQUENCES = {
  "positions_of_one_sequence": (
    {"positions": jnp.zeros((1, L), jnp.int32)},
    ValueError,
    f"positions must have shape ({B}, {L}), got (1, {L}); jnp.broadcast_to",
  ),
  "float_positions": (
    {"positions": jnp.zeros((B, L))},
    TypeError,
    "positions must be integers, got float32; cast",
  ),
  "segment_ids_transposed": (
    {"segment_ids": jnp.ones((L, B), jnp.int32)},
    ValueError,
    f"segment_ids must have shape ({B}, {L}), got ({L}, {B}); jnp.broadcast_to",
  ),
  "segment_ids_of_bool": (
    {"segment_ids": jnp.ones((B, L), bool)},
    TypeError,
    "segment_ids must be integers, got bool; cast",
  ),
  "segment_ids_of_a_list": (
    {"segment_ids": [[1] * L] * B},
    TypeError,
    "segment_ids must be an array, got a list; jnp.asarray",
  ),
  "cache_of_a_tuple": (
    {"cache": tuple(CACHE)},
    TypeError,
    "cache must be a KVCache, got a tuple; KVCache.empty makes one.",
  ),
  "cache_of_other_sequences": (
    {"cache": smnn.KVCache.empty(B + 1, L, 2, 4)},
    ValueError,
    f"cache.key must have shape ({B}, C, 2, 4), got ({B + 1}, {L}, 2, 4).",
  ),
  "cache_of_other_heads": (
    {"cache": smnn.KVCache.empty(B, L, 4, 4)},
    ValueError,
    f"cache.key must have shape ({B}, C, 2, 4), got ({B}, {L}, 4, 4).",
  ),
  "cache_of_two_capacities": (
    {"cache": CACHE._replace(positions=CACHE.positions[:, 1:])},
    ValueError,
    f"cache.positions must have shape ({B}, {L}), got ({B}, {L - 1}).",
  ),
  "cache_of_many_lengths": (
    {"cache": CACHE._replace(length=jnp.zeros((B,), jnp.int32))},
    ValueError,
    f"cache.length must have shape (), got ({B},).",
  ),
  "cache_that_is_too_short": (
    {"cache": smnn.KVCache.empty(B, L - 1, 2, 4)},
    ValueError,
    f"cache has {L - 1} slots for each sequence, too few for {L} tokens; make",
  ),
}


@pytest.mark.parametrize(
  ("given", "error", "message"),
  BAD_SEQUENCES.values(),
  ids=BAD_SEQUENCES.keys(),
)
def test_what_belongs_to_other_sequences_is_refused(given, error, message):
  refuses(error, f"MixtureOfAttention: {message}", moa(), ONES, **given)
  with pytest.raises(error, match=f"^{re.escape(f'attend: {message}')}"):
    smnn.attend(HEADS, HEADS, HEADS, **given)


BAD_HEADS = {
  "query_of_three_axes": (
    {"query": HEADS[0]},
    ValueError,
    f"query must have shape (B, L, N, d_head), got ({L}, 2, 4).",
  ),
  "key_of_other_tokens": (
    {"key": HEADS[:, 1:]},
    ValueError,
    f"key must have shape ({B}, {L}, n, 4), got ({B}, {L - 1}, 2, 4); other",
  ),
  "value_of_other_heads": (
    {"value": HEADS[:, :, :1]},
    ValueError,
    f"value must have shape ({B}, {L}, 2, 4), got ({B}, {L}, 1, 4).",
  ),
  "query_of_too_few_heads": (
    {"query": HEADS[:, :, :1]},
    ValueError,
    "query has 1 heads, no multiple of the 2 of key and value.",
  ),
  "key_of_none": (
    {"key": None},
    TypeError,
    "key must be an array, got None",
  ),
  "value_of_another_dtype": (
    {"value": HEADS.astype(jnp.bfloat16)},
    TypeError,
    "value is bfloat16 but query is float32; cast one of them",
  ),
  "sinks_of_other_heads": (
    {"sinks": jnp.ones((4,))},
    ValueError,
    "sinks must have shape (2,), got (4,).",
  ),
}


@pytest.mark.parametrize(
  ("change", "error", "message"), BAD_HEADS.values(), ids=BAD_HEADS.keys()
)
def test_attend_refuses_other_heads(change, error, message):
  given = {"query": HEADS, "key": HEADS, "value": HEADS, **change}
  with pytest.raises(error, match=f"^{re.escape(f'attend: {message}')}"):
    smnn.attend(**given)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"x": HEADS[0]}, f"x must have shape (B, L, h, d_head), got ({L}, 2, 4)."),
    ({"positions": None}, "positions must be an array, got None"),
    (
      {"positions": IDS[0]},
      f"positions must have shape ({B}, {L}), got ({L}, {K}); jnp.broadcast_to",
    ),
  ],
)
def test_rotary_embedding_turns_heads(given, message):
  error = TypeError if "array" in message else ValueError
  given = {"x": HEADS, "positions": IDS[:, :, 0], **given}
  with pytest.raises(
    error, match=f"^{re.escape(f'rotary_embedding: {message}')}"
  ):
    smnn.rotary_embedding(**given)


@pytest.mark.parametrize(
  ("field", "least"),
  [("batch", 0), ("capacity", 1), ("num_heads", 1), ("head_dim", 1)],
)
def test_a_cache_has_slots(field, least):
  sizes = {"batch": B, "capacity": L, "num_heads": 2, "head_dim": 4}
  sizes |= {field: least - 1}
  message = f"^KVCache.empty: {field} must be at least {least}, got {least - 1}"
  with pytest.raises(ValueError, match=message):
    smnn.KVCache.empty(**sizes)


def test_a_choice_is_one_at_least():
  message = r"route: expert_ids has shape \(12, 0\); k must be at least 1"
  with pytest.raises(ValueError, match=message):
    sm.route(jnp.zeros((T, 0), jnp.int32), E)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["SMoEBlock", "MixtureOfAttention"])
def test_a_symbolic_batch_is_refused_in_words(name, dtype):
  module = MAKE[name]()
  variables = jax.jit(module.init)(KEY, ONES)
  shape = jax.export.symbolic_shape(f"b, {L}, {D}")
  apply = jax.jit(lambda x: module.apply(variables, x)[0])
  with pytest.raises(
    ValueError, match="route: .*symbolic shape, .* each batch"
  ):
    jax.export.export(apply)(jax.ShapeDtypeStruct(shape, dtype))


def test_jitter_needs_a_static_deterministic():
  layer = nn.remat(smnn.SMoEBlock)(
    num_experts=E, top_k=K, d_expert=N, jitter=0.1
  )
  message = "Router: deterministic must be a static bool, got a traced one; nn."
  refuses(TypeError, message, layer, ONES, deterministic=False)


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
  with pytest.raises(ValueError, match="'cudnn' has no sinks; use None or"):
    smnn.attend(q, q, q, implementation="cudnn", sinks=jnp.ones((2,)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="GPUs have cuDNN")
def test_cudnn_without_a_gpu_is_refused_in_words():
  q = jnp.ones((B, L, 2, 4))
  message = "^attend: implementation='cudnn' needs a GPU, this is cpu; use None"
  with pytest.raises(NotImplementedError, match=message):
    smnn.attend(q, q, q, implementation="cudnn")
