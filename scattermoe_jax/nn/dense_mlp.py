"""The dense MLP: shared experts, and the dense layer of a decoder."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax import sharding
from scattermoe_jax.nn import checks
from scattermoe_jax.nn.partitioning import named
from scattermoe_jax.ops import Activation
from scattermoe_jax.ops.activations import get_activation


class DenseMLP(nn.Module):
  """One two-layer MLP for every token, with the parameters of one expert.

  Parameters: `w_gate_up` (d, 2n), the gate half first, or `w_in` (d, n) if not
  gated; `w_out` (n, d); `bias_in` and `bias_out` if `use_bias`.

  Attributes:
    d_hidden: n.
    activation: a name in `scattermoe_jax.ACTIVATIONS`, or an `Activation`.
    gated: whether a = f(h_gate) h_up rather than f(h).
    use_bias: whether both layers have biases.
    dtype: of the computation; None for what x and the parameters promote to.
    param_dtype: of the parameters.
    precision: of the products.
    kernel_init: of `w_gate_up` or `w_in`.
    out_kernel_init: of `w_out`; None for `kernel_init`.
    bias_init: of both biases.
    mesh_axes: where given, the axes of the parameters have the logical names
      "embed" and "mlp".
  """

  d_hidden: int
  activation: str | Activation = "silu"
  gated: bool = True
  use_bias: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: lax.PrecisionLike = None
  kernel_init: Initializer = nn.initializers.lecun_normal()
  out_kernel_init: Initializer | None = None
  bias_init: Initializer = nn.initializers.zeros_init()
  mesh_axes: sharding.MeshAxes | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
    """Returns f(x w_in + bias_in) w_out + bias_out."""
    checks.check_ints("DenseMLP", d_hidden=self.d_hidden)
    checks.check_dtype_fields(
      "DenseMLP", dtype=self.dtype, param_dtype=self.param_dtype
    )
    checks.check_mesh_axes("DenseMLP", self.mesh_axes)
    checks.check_tokens("DenseMLP", x)
    d = x.shape[-1]
    w_in = self.param(
      "w_gate_up" if self.gated else "w_in",
      named(self.kernel_init, self.mesh_axes, "embed", "mlp"),
      (d, self.d_hidden * (2 if self.gated else 1)),
      self.param_dtype,
    )
    w_out = self.param(
      "w_out",
      named(
        self.out_kernel_init or self.kernel_init,
        self.mesh_axes,
        "mlp",
        "embed",
      ),
      (self.d_hidden, d),
      self.param_dtype,
    )
    bias_in = bias_out = None
    if self.use_bias:
      bias_in = self.param(
        "bias_in", self.bias_init, w_in.shape[1:], self.param_dtype
      )
      bias_out = self.param("bias_out", self.bias_init, (d,), self.param_dtype)
    x, w_in, w_out, bias_in, bias_out = promote_dtype(
      x, w_in, w_out, bias_in, bias_out, dtype=self.dtype
    )
    activation = get_activation(
      self.activation, gated=self.gated, function="DenseMLP"
    )

    def compute(rows, w_in, w_out, bias_in, bias_out):
      h = jnp.matmul(rows, w_in, precision=self.precision)
      if bias_in is not None:
        h += bias_in[None, :]
      y = jnp.matmul(activation.apply(h), w_out, precision=self.precision)
      return y if bias_out is None else y + bias_out[None, :]

    rows = x.reshape(-1, d)
    mesh = jax.sharding.get_abstract_mesh()
    is_explicit = jax.sharding.AxisType.Explicit in mesh.axis_types
    if self.mesh_axes is not None and is_explicit:
      # Of split weights the compiler chooses what to gather and to add up.
      spec = jax.typeof(rows).sharding.spec
      compute = jax.sharding.auto_axes(compute, out_sharding=spec)
    return compute(rows, w_in, w_out, bias_in, bias_out).reshape(x.shape)
