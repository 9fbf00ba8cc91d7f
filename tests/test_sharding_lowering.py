"""What a program for eight H100s sends: counted in what JAX lowers for CUDA."""

import collections
import inspect
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from scattermoe_jax import sharding
from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import Problem
from scattermoe_jax.kernels.contract import reason_against
from scattermoe_jax.sharding import MeshAxes
from scattermoe_jax.sharding.traffic import Layer, bytes_received

LAYER = Layer(d=256, n=128, num_experts=16, top_k=2)
NUM_TOKENS = 128  # per device
COLLECTIVES = (
  "all_gather",
  "reduce_scatter",
  "all_reduce",
  "all_to_all",
  "ragged_all_to_all",
  "collective_permute",
)
# JAX 0.7 describes a device without its platform, and cannot lower the index
# of a device or a ragged exchange over a mesh of described devices.
DESCRIBES_PLATFORM = "platform" in inspect.signature(AbstractDevice).parameters


def h100s(sizes):
  """Returns a mesh of described H100s; of this machine's CPUs on JAX 0.7."""
  kinds = (AxisType.Auto,) * len(sizes)
  if not DESCRIBES_PLATFORM:
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
  return AbstractMesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=kinds,
    abstract_device=AbstractDevice("NVIDIA H100", 132, "cuda"),
  )


def under(mesh):
  if isinstance(mesh, AbstractMesh):
    return jax.sharding.use_abstract_mesh(mesh)
  return jax.set_mesh(mesh)


def arguments_on(mesh, axes):
  """Returns shapes that lie as the layer stores them: nothing to reshard."""
  d, n, e, k, *_ = LAYER
  shards = math.prod(mesh.shape[name] for name in axes.tokens)
  t = NUM_TOKENS * shards

  def shape(dims, dtype, *roles):
    place = NamedSharding(mesh, axes.split(*roles))
    return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

  bf16, f32 = jnp.bfloat16, jnp.float32
  return (
    shape((t, d), bf16, "tokens", None),
    shape((t, k), f32, "tokens", None),
    shape((t, k), jnp.int32, "tokens", None),
    shape((e, d, 2, n), bf16, "expert", "fsdp", None, "tensor"),
    shape((e, n, d), bf16, "expert", "tensor", "fsdp"),
  )


def lower(sizes, axes, *, backward, policy=None, implementation="xla"):
  """Returns the StableHLO of the op, or of the op and its gradients."""

  def op(x, gates, expert_ids, w_in, w_out):
    def run(x, gates, w_in, w_out):
      return sharding.smoe_mlp(
        x, gates, expert_ids, w_in, w_out,
        axes=axes, implementation=implementation,
      )  # fmt: skip

    if policy is not None:
      run = jax.checkpoint(run, policy=policy)
    if not backward:
      return run(x, gates, w_in, w_out)
    y, pullback = jax.vjp(run, x, gates, w_in, w_out)
    return y, pullback(y)

  mesh = h100s(sizes)
  with under(mesh):
    traced = jax.jit(op).trace(*arguments_on(mesh, axes))
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def collectives(text):
  """Returns (name, operand bytes, result bytes) of each collective."""
  found = []
  pattern = "|".join(COLLECTIVES)
  for match in re.finditer(rf'(?:"stablehlo\.|@)({pattern})\b', text):
    # A reduction's own body lies between its name and its types.
    types = re.search(
      r": \(((?:tensor<[^>]*>(?:, )?)+)\) -> (tensor<[^>]*>)",
      text[match.end() :],
    )
    operands = re.findall(r"tensor<([^>]*)>", types[1])
    found.append((match[1], size(operands[0]), size(types[2][7:-1])))
  return found


def size(shape):
  """Returns the bytes of a StableHLO shape, such as 8x64xbf16."""
  *dims, dtype = shape.split("x")
  bits = int(re.search(r"\d+$", dtype)[0])
  return math.prod(map(int, dims)) * bits // 8


def count(text):
  return dict(collections.Counter(name for name, *_ in collectives(text)))


ROLES = {
  "data": ({"a": 8}, MeshAxes(data="a")),
  "fsdp": ({"a": 8}, MeshAxes(fsdp="a")),
  "tensor": ({"a": 8}, MeshAxes(tensor="a")),
  "expert": ({"a": 8}, MeshAxes(expert="a")),
  "fsdp_tensor": ({"a": 4, "b": 2}, MeshAxes(fsdp="a", tensor="b")),
}
FORWARD = {
  "data": {},
  # each of the two weights
  "fsdp": {"all_gather": 2},
  # y
  "tensor": {"all_reduce": 1},
  # x, gates and ids; y
  "expert": {"all_gather": 3, "reduce_scatter": 1},
  "fsdp_tensor": {"all_gather": 2, "all_reduce": 1},
}
BACKWARD = {
  # each dw
  "data": {"all_reduce": 2},
  # each dw
  "fsdp": {"reduce_scatter": 2},
  # dx and dgates, which XLA sends as one
  "tensor": {"all_reduce": 2},
  # the mirror, without ids: dy; dx and dgates
  "expert": {"all_gather": 1, "reduce_scatter": 2},
  "fsdp_tensor": {"reduce_scatter": 2, "all_reduce": 2},
}


@pytest.mark.parametrize("role", ROLES)
def test_smoe_mlp_sends_what_its_axes_need_and_nothing_more(role):
  forward = count(lower(*ROLES[role], backward=False))
  assert forward == FORWARD[role]
  both = collections.Counter(count(lower(*ROLES[role], backward=True)))
  assert both - collections.Counter(forward) == BACKWARD[role]


@pytest.mark.skipif(
  not DESCRIBES_PLATFORM, reason="JAX 0.7 cannot lower it without GPUs"
)
def test_ragged_exchange_goes_there_and_back():
  axes = MeshAxes(expert="a", exchange="ragged_all_to_all")
  forward = count(lower({"a": 8}, axes, backward=False))
  # x, gates and ids there, y back; how many rows go where is gathered
  assert forward == {"ragged_all_to_all": 4, "all_gather": 1}
  both = count(lower({"a": 8}, axes, backward=True))
  assert both == {"ragged_all_to_all": 4 + 3, "all_gather": 1}


def test_own_parts_saveable_gathers_weights_again():
  both = count(
    lower(
      {"a": 8},
      MeshAxes(fsdp="a"),
      backward=True,
      policy=sharding.own_parts_saveable,
    )
  )
  assert both == {"all_gather": 4, "reduce_scatter": 2}


@pytest.mark.parametrize(
  "sizes, axes",
  [
    ({"a": 2, "b": 2, "c": 2}, MeshAxes(data="a", fsdp="b", tensor="c")),
    ({"a": 2, "b": 4}, MeshAxes(tensor="a", expert="b")),
  ],
  ids=["data_fsdp_tensor", "tensor_expert"],
)
def test_bytes_received_are_those_of_the_collectives(sizes, axes):
  def role_of(name):
    return math.prod(sizes[a] for a in getattr(axes, name))

  expected = bytes_received(
    LAYER,
    NUM_TOKENS,
    **{name: role_of(name) for name in ("data", "fsdp", "tensor", "expert")},
  )
  text = lower(sizes, axes, backward=True)
  received = 0.0
  for name, operand, result in collectives(text):
    if name == "all_gather":
      received += result - operand
    elif name == "reduce_scatter":
      received += operand - result
    else:  # an all-reduce over two devices, here: half of it, there and back
      assert name == "all_reduce"
      received += operand
  assert received == sum(traffic.total for traffic in expected)


@pytest.mark.parametrize("implementation", ["triton", "mosaic"])
def test_kernels_lower_inside_shard_map(implementation):
  d, n, e, k, *_ = LAYER
  device = Device("gpu", "NVIDIA H100", (9, 0), 132)
  problem = Problem(NUM_TOKENS * k, e, d, 2 * n, "bfloat16", device)
  reason = reason_against(implementation, [problem])
  if not DESCRIBES_PLATFORM:
    reason = "JAX 0.7 cannot describe a GPU that is not here"
  if reason is not None:
    pytest.skip(reason)
  text = lower(
    {"a": 2, "b": 2, "c": 2},
    MeshAxes(fsdp="a", expert="b", tensor="c"),
    backward=True,
    implementation=implementation,
  )
  assert "custom_call" in text
