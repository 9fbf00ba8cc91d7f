"""A linear layer with one matrix per expert."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax.nn import checks
from scattermoe_jax.nn.lora import adapted_parallel_linear
from scattermoe_jax.ops import parallel_linear
from scattermoe_jax.routing import Routing

# The fan-in of one expert: the experts' axis counts as a batch of matrices.
default_kernel_init = nn.initializers.lecun_normal(batch_axis=0)


class ParallelLinear(nn.Module):
  """Multiplies each row by its expert's matrix: `nn.Dense` for routed rows.

  To name the axes of a parameter for a mesh, wrap its initializer:
  `kernel_init=nn.with_logical_partitioning(
  nn.initializers.lecun_normal(batch_axis=0), ("expert", "embed", "mlp"))`.

  Attributes:
    features: n, the width of a row written.
    num_experts: E.
    use_bias: whether each expert adds a bias.
    dtype: of the computation; None for what x and the parameters promote to.
    param_dtype: of the parameters.
    precision: of the products, as `jax.lax.dot_general` takes it.
    kernel_init: of the kernel (E, d, n); by default scaled by the fan-in d.
    bias_init: of the bias (E, n).
    implementation: "mosaic", "triton" or "xla"; None for the first that can.
  """

  features: int
  num_experts: int
  use_bias: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: lax.PrecisionLike = None
  kernel_init: Initializer = default_kernel_init
  bias_init: Initializer = nn.initializers.zeros_init()
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "rows d"],
    routing: Routing,
    *,
    grouped_in: bool = False,
    grouped_out: bool = False,
  ) -> Float[Array, "S n"]:
    """Returns `scattermoe_jax.parallel_linear` of x and the parameters.

    Args:
      x: (T, d), where the k choices of a token share a row, or (S, d).
      routing: from `route`, of `num_experts` experts.
      grouped_in: whether x is in grouped order rather than in scattered order.
      grouped_out: whether the result is to be.
    """
    checks.check_ints(
      "ParallelLinear", features=self.features, num_experts=self.num_experts
    )
    checks.check_dtype_fields(
      "ParallelLinear", dtype=self.dtype, param_dtype=self.param_dtype
    )
    checks.check_tokens(
      "ParallelLinear", x, ("rows", "d"), "flatten batch and sequence into rows"
    )
    kernel = self.param(
      "kernel",
      self.kernel_init,
      (self.num_experts, x.shape[-1], self.features),
      self.param_dtype,
    )
    bias = None
    if self.use_bias:
      bias = self.param(
        "bias",
        self.bias_init,
        (self.num_experts, self.features),
        self.param_dtype,
      )
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    linear = parallel_linear
    if self.has_variable("params", "lora"):
      adapters: dict[str, Any] = self.get_variable("params", "lora")
      linear = functools.partial(
        adapted_parallel_linear, adapter=adapters.get("kernel")
      )
    return linear(
      x,
      kernel,
      routing,
      bias=bias,
      grouped_in=grouped_in,
      grouped_out=grouped_out,
      precision=self.precision,
      implementation=self.implementation,
    )
