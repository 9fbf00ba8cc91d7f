"""The Triton kernels lower for every GPU they claim, without one here."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

from scattermoe_jax import ops
from scattermoe_jax.kernels import Columns, triton
from scattermoe_jax.kernels.triton.tiles import TritonConfig
from scattermoe_jax.routing import route

DEVICES = {
  "NVIDIA A100-SXM4-80GB": 108,
  "NVIDIA L4": 58,
  "NVIDIA H100 80GB HBM3": 132,
  "NVIDIA B200": 148,
  "NVIDIA RTX PRO 6000 Blackwell Server Edition": 188,
}
# Of a custom call that holds a kernel.
TARGET = "__gpu$xla.gpu.triton"


def described(kind):
  """Returns a context in which this JAX compiles for that device."""
  try:
    device = jax.sharding.AbstractDevice(kind, DEVICES[kind], "gpu")
  except TypeError:
    pytest.skip("this JAX cannot describe a GPU that is not here")
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def structs(*shapes):
  return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]


def lowered(f, *shapes):
  traced = jax.jit(f).trace(*structs(*shapes))
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def kernel_of(f, *shapes):
  """Returns how the one kernel of f is launched: a dict of attributes."""
  module = jax.jit(f).trace(*structs(*shapes))
  module = module.lower(lowering_platforms=("cuda",)).compiler_ir()
  found = []

  def look(op):
    if op.name == "stablehlo.custom_call" and TARGET in str(
      op.attributes["call_target_name"]
    ):
      found.append(op.attributes["mhlo.backend_config"])
    return ir.WalkResult.ADVANCE

  module.operation.walk(look)
  (kernel,) = found
  return kernel


def kernel_text(f, *shapes):
  """Returns the Triton code of the one kernel of f, which travels as bytes."""
  code = kernel_of(f, *shapes)["ir"].value_bytes
  with ir.Context() as context, ir.Location.unknown():
    triton_dialect.register_dialect(context)
    return str(ir.Module.parse(code))


def grid_of(f, *shapes):
  """Returns how many programs the one kernel of f has."""
  return kernel_of(f, *shapes)["grid_x"].value


def lowered_mlp_gradients(kind, dtype, num_tokens=256):
  """Returns the text of an MLP's gradients, lowered for that device."""
  top_k, num_experts, d, n = 4, 8, 600, 104

  def loss(x, gates, w_in, w_out, bias, ids):
    y = ops.smoe_mlp(
      x, gates, route(ids, num_experts), w_in, w_out, bias_out=bias,
      implementation="triton",
    )  # fmt: skip
    return jnp.sum(y.astype(jnp.float32))

  with described(kind):
    return lowered(
      jax.grad(loss, argnums=(0, 1, 2, 3, 4)),
      ((num_tokens, d), dtype),
      ((num_tokens, top_k), dtype),
      ((num_experts, d, 2 * n), dtype),
      ((num_experts, n, d), dtype),
      ((num_experts, d), dtype),
      ((num_tokens, top_k), jnp.int32),
    )


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mlp_and_its_gradients_lower(kind, dtype):
  # Forward: h. Backward: da', dx, dw_in, dw_out, dbias_out.
  assert lowered_mlp_gradients(kind, dtype).count(TARGET) == 6


@pytest.mark.parametrize("num_tokens", [2, 256, 2**15])
def test_mlp_and_its_gradients_lower_in_double_precision(x64, num_tokens):
  kind = "NVIDIA H100 80GB HBM3"
  text = lowered_mlp_gradients(kind, "bfloat16", num_tokens)
  assert text.count(TARGET) == 6


@pytest.mark.parametrize("layout", ["scattered", "grouped"])
def test_decode_lowers_with_a_split_contraction(layout):
  config = TritonConfig(16, 128, 64, 4, 4, split_k=4)

  def f(x, w, ids):
    return triton.scatter2scatter(
      x, w, route(ids, 128), grouped_out=layout == "grouped", config=config
    )

  with described("NVIDIA H100 80GB HBM3"):
    text = lowered(
      f,
      ((1, 4096), jnp.bfloat16),
      ((128, 4096, 2048), jnp.bfloat16),
      ((1, 8), jnp.int32),
    )
  assert text.count(TARGET) == 1


@pytest.mark.parametrize("transpose_w", [False, True])
def test_a_slice_of_columns_is_read_in_place(transpose_w):
  def f(x, w, ids, i):
    return triton.scatter2scatter(
      x, w, route(ids, 8), transpose_w=transpose_w, columns=Columns(i, 512)
    )

  w_shape = (8, 2048, 512) if transpose_w else (8, 512, 2048)
  for num_tokens in (2**4, 2**15):  # a program for each tile; one per core
    with described("NVIDIA H100 80GB HBM3"):
      text = lowered(
        f,
        ((num_tokens, 512), jnp.bfloat16),
        (w_shape, jnp.bfloat16),
        ((num_tokens, 4), jnp.int32),
        ((), jnp.int32),
      )
    assert text.count(TARGET) == 1
    assert "stablehlo.dynamic_slice" not in text


@pytest.mark.parametrize("kind", DEVICES)
def test_many_tiles_lower_with_a_program_per_core(kind):
  def grid(num_tokens):
    f = lambda x, w, bias, ids: triton.scatter2scatter(
      x, w, route(ids, 8), bias=bias
    )
    with described(kind):
      return grid_of(
        f,
        ((num_tokens, 512), jnp.bfloat16),
        ((8, 512, 1000), jnp.bfloat16),
        ((8, 1000), jnp.bfloat16),
        ((num_tokens, 4), jnp.int32),
      )

  assert grid(2**15) == DEVICES[kind]
  assert grid(2**5) != DEVICES[kind]


def test_precision_decides_tensor_float_32():
  def text_at(precision):
    f = lambda x, w, ids: triton.scatter2scatter(
      x, w, route(ids, 4), precision=precision
    )
    with described("NVIDIA A100-SXM4-80GB"):
      return lowered(
        f,
        ((64, 64), jnp.float32),
        ((4, 64, 64), jnp.float32),
        ((64, 2), jnp.int32),
      )

  default, highest = text_at(None), text_at(jax.lax.Precision.HIGHEST)
  assert default == text_at(jax.lax.Precision.DEFAULT) != highest
  with jax.default_matmul_precision("highest"):
    assert text_at(None) == highest


def test_offsets_past_two_billion_elements_are_64_bit():
  # The only difference is the size of w, and with it the width of offsets.
  def kernel(num_experts):
    f = lambda x, w, ids: triton.scatter2scatter(
      x, w, route(ids, num_experts), config=TritonConfig(16, 128, 64, 3, 4)
    )
    with described("NVIDIA H100 80GB HBM3"):
      return kernel_text(
        f,
        ((8, 4096), jnp.bfloat16),
        ((num_experts, 4096, 4096), jnp.bfloat16),
        ((8, 2), jnp.int32),
      )

  assert "i64" in kernel(129) and "i64" not in kernel(127)


def test_a_users_log_has_no_deprecation_warning():
  # JAX would speak at each lowering, and "always" shows it every time.
  def f(x, w, ids, config):
    return triton.scatter2scatter(x, w, route(ids, 4), config=config)

  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with described("NVIDIA L4"):
      for num_stages in (2, 3):
        config = TritonConfig(16, 32, 32, num_stages, 4)
        lowered(
          functools.partial(f, config=config),
          ((16, 32), jnp.bfloat16),
          ((4, 32, 32), jnp.bfloat16),
          ((16, 2), jnp.int32),
        )
  assert not [str(w.message) for w in caught]
