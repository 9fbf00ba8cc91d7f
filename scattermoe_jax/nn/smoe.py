"""The sparse Mixture-of-Experts MLP: experts alone, and with their router."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scattermoe_jax import sharding
from scattermoe_jax.nn import checks
from scattermoe_jax.nn.dense_mlp import DenseMLP
from scattermoe_jax.nn.lora import adapted_smoe_mlp
from scattermoe_jax.nn.metrics import (
  SMoEMetrics,
  ids_with_metrics,
  route_with_metrics,
)
from scattermoe_jax.nn.parallel_linear import default_kernel_init
from scattermoe_jax.nn.partitioning import named, with_gate_axis
from scattermoe_jax.nn.router import Router, Scoring
from scattermoe_jax.ops import Activation, smoe_mlp
from scattermoe_jax.routing import Routing, route, take_rows


class SMoEMLP(nn.Module):
  """E two-layer MLPs and the weighted sum of each token's k; routing given.

  Parameters: `w_gate_up` (E, d, 2n), the gate half first, or `w_in` (E, d, n)
  if not gated; `w_out` (E, n, d); `bias_in` and `bias_out` if `use_bias`.

  Attributes:
    num_experts: E.
    d_expert: n, the hidden width of one expert.
    activation: a name in `scattermoe_jax.ACTIVATIONS`, or an `Activation`.
    gated: whether a = f(h_gate) h_up rather than f(h).
    use_bias: whether both layers of each expert have biases.
    dtype: of the computation; None for what x and the parameters promote to.
    param_dtype: of the parameters.
    precision: of the products, as `jax.lax.dot_general` takes it.
    kernel_init: of `w_gate_up` or `w_in`; scaled by the fan-in of one expert.
    out_kernel_init: of `w_out`; None for `kernel_init`.
    bias_init: of `bias_in`.
    out_bias_init: of `bias_out`; None for `bias_init`.
    num_chunks: slices of d in which the expanded output is made: less memory
      at the peak, see `scattermoe_jax.smoe_mlp`.
    mesh_axes: which axes of a mesh split what, see `scattermoe_jax.sharding`.
      Names the axes of the parameters "expert", "embed" and "mlp", and gives
      `w_gate_up` the shape (E, d, 2, n) and `bias_in` (E, 2, n).
    implementation: "mosaic", "triton" or "xla"; None for the first that can.
  """

  num_experts: int
  d_expert: int
  activation: str | Activation = "silu"
  gated: bool = True
  use_bias: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: lax.PrecisionLike = None
  kernel_init: Initializer = default_kernel_init
  out_kernel_init: Initializer | None = None
  bias_init: Initializer = nn.initializers.zeros_init()
  out_bias_init: Initializer | None = None
  num_chunks: int = 1
  mesh_axes: sharding.MeshAxes | None = None
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "*batch d"],
    gates: Float[Array, "*batch k"],
    expert_ids: Int[Array, "*batch k"] | Routing,
  ) -> Float[Array, "*batch d"]:
    """Returns the weighted sum of each token's k experts.

    Args:
      x: tokens.
      gates: the weight of each choice; kept in their own dtype.
      expert_ids: the experts of each token, outside [0, E) for none; or the
        `Routing` of the flattened tokens, where it is made already.
    """
    checks.check_ints(
      "SMoEMLP", num_experts=self.num_experts, d_expert=self.d_expert
    )
    checks.check_dtype_fields(
      "SMoEMLP", dtype=self.dtype, param_dtype=self.param_dtype
    )
    checks.check_mesh_axes("SMoEMLP", self.mesh_axes)
    checks.check_tokens("SMoEMLP", x)
    checks.check_choices("SMoEMLP", x, gates, expert_ids)
    d, top_k = x.shape[-1], gates.shape[-1]
    x, *weights = promote_dtype(x, *self._weights(d), dtype=self.dtype)
    w_in, w_out, bias_in, bias_out = weights
    rows = x.reshape(-1, d), gates.reshape(-1, top_k)
    options: dict[str, Any] = dict(
      bias_in=bias_in,
      bias_out=bias_out,
      activation=self.activation,
      num_chunks=self.num_chunks,
      precision=self.precision,
      implementation=self.implementation,
    )
    if not isinstance(expert_ids, Routing):
      expert_ids = expert_ids.reshape(-1, top_k)
    if self.mesh_axes is not None:
      if self.has_variable("params", "lora"):
        raise ValueError(
          "SMoEMLP: weights under mesh_axes cannot have adapters; merge them "
          "first (scattermoe_jax.nn.lora.merge)."
        )
      if isinstance(expert_ids, Routing):
        checks.check_routing("SMoEMLP", expert_ids, self.num_experts)
        # Each device makes its own routing, of the experts it has.
        expert_ids = take_rows(expert_ids.expert_ids, expert_ids.grouped_ids)
      y = sharding.smoe_mlp(
        *rows, expert_ids, w_in, w_out, axes=self.mesh_axes, **options
      )
    else:
      if not isinstance(expert_ids, Routing):
        expert_ids = route(expert_ids, self.num_experts)
      y = self._with_adapters()(*rows, expert_ids, w_in, w_out, **options)
    return y.reshape(x.shape)

  @nn.nowrap
  def _with_adapters(self):
    """Returns `smoe_mlp`, or its form for weights that have adapters."""
    if not self.has_variable("params", "lora"):
      return smoe_mlp
    adapters: dict[str, Any] = self.get_variable("params", "lora")
    return functools.partial(
      adapted_smoe_mlp,
      adapter_in=adapters.get("w_gate_up" if self.gated else "w_in"),
      adapter_out=adapters.get("w_out"),
    )

  @nn.nowrap
  def _weights(self, d: int):
    """Returns w_in, w_out, bias_in and bias_out (None without biases)."""
    axes, num_experts, n = self.mesh_axes, self.num_experts, self.d_expert
    hidden: tuple[int, ...] = (n,)
    gate_name: tuple[None, ...] = ()
    in_init, bias_in_init = self.kernel_init, self.bias_init
    if self.gated:
      kept: Any = self.get_variable("params", "w_gate_up")
      checks.check_gate_axis("SMoEMLP", kept, is_split=axes is not None)
      hidden = (2 * n,)
      if axes is not None:
        hidden, gate_name = (2, n), (None,)
        in_init, bias_in_init = map(with_gate_axis, (in_init, bias_in_init))
    w_in = self.param(
      "w_gate_up" if self.gated else "w_in",
      named(in_init, axes, "expert", "embed", *gate_name, "mlp"),
      (num_experts, d, *hidden),
      self.param_dtype,
    )
    w_out = self.param(
      "w_out",
      named(
        self.out_kernel_init or self.kernel_init,
        axes, "expert", "mlp", "embed",
      ),
      (num_experts, n, d),
      self.param_dtype,
    )  # fmt: skip
    if not self.use_bias:
      return w_in, w_out, None, None
    bias_in = self.param(
      "bias_in",
      named(bias_in_init, axes, "expert", *gate_name, "mlp"),
      (num_experts, *hidden),
      self.param_dtype,
    )
    bias_out = self.param(
      "bias_out",
      named(self.out_bias_init or self.bias_init, axes, "expert", "embed"),
      (num_experts, d),
      self.param_dtype,
    )
    return w_in, w_out, bias_in, bias_out


class SMoEBlock(nn.Module):
  """A router, its experts and, where wanted, shared experts for every token.

    y = sum_j gates_j expert_j(x) + shared(x)

  Submodules: `router` (`Router`), `experts` (`SMoEMLP`), `shared` (`DenseMLP`)
  and `shared_gate`, each with the initializers of the fields named after it.

  Attributes:
    num_experts: E.
    top_k: k.
    d_expert: n, the hidden width of one expert.
    activation: of the experts and the shared experts.
    gated: whether their hidden layers are.
    use_bias: whether the experts have biases.
    scoring: the router's rule, see `Router`; as are the next seven.
    router_use_bias: whether the router's logits have a bias.
    num_groups: groups of experts of scoring "sigmoid".
    top_groups: those of them that stay open to a token.
    renormalize: whether "sigmoid" divides the gates by their sum.
    scale: multiplies the gates.
    jitter: noise on the router's input, not on the experts'; training only.
    use_selection_bias: whether the choice has a bias of its own.
    num_shared_experts: shared experts of width `d_expert` each.
    d_shared: width of all shared experts together; None for
      `num_shared_experts * d_expert`.
    shared_gate: whether the shared experts are weighted by sigmoid(x w), as
      Qwen2's are.
    use_output_bias: whether one vector, the parameter `output_bias` (d,), is
      added to the sum (JetMoE).
    dtype: of the computation, except the router's; None for what x and the
      parameters promote to.
    param_dtype: of the parameters.
    precision: of the experts' products, as `jax.lax.dot_general` takes it.
    kernel_init: of the experts' first matrices (E, d, 2n) or (E, d, n).
    out_kernel_init: of their second (E, n, d); None for `kernel_init`.
    bias_init: of all biases.
    router_kernel_init: of the router's kernel (d, E).
    shared_kernel_init: of the shared experts' first matrix, and of their gate.
    shared_out_kernel_init: of their second; None for `shared_kernel_init`.
    num_chunks: slices of d in which the experts' output is made, see `SMoEMLP`.
    mesh_axes: which axes of a mesh split what, see `SMoEMLP`.
    implementation: "mosaic", "triton" or "xla"; None for the first that can.
  """

  num_experts: int
  top_k: int
  d_expert: int
  activation: str | Activation = "silu"
  gated: bool = True
  use_bias: bool = False
  scoring: Scoring = "softmax_top_k_renormalized"
  router_use_bias: bool = False
  num_groups: int = 1
  top_groups: int = 1
  renormalize: bool = True
  scale: float = 1.0
  jitter: float = 0.0
  use_selection_bias: bool = False
  num_shared_experts: int = 0
  d_shared: int | None = None
  shared_gate: bool = False
  use_output_bias: bool = False
  dtype: Dtype | None = None
  param_dtype: Dtype = jnp.float32
  precision: lax.PrecisionLike = None
  kernel_init: Initializer = default_kernel_init
  out_kernel_init: Initializer | None = None
  bias_init: Initializer = nn.initializers.zeros_init()
  router_kernel_init: Initializer = nn.initializers.lecun_normal()
  shared_kernel_init: Initializer = nn.initializers.lecun_normal()
  shared_out_kernel_init: Initializer | None = None
  num_chunks: int = 1
  mesh_axes: sharding.MeshAxes | None = None
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "*batch d"],
    *,
    mask: Bool[Array, "*batch"] | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, "*batch d"], SMoEMetrics]:
    """Returns y and the metrics of the routing.

    Args:
      x: tokens.
      mask: True where the token is real. A padding token goes to no expert:
        costs nothing, gets zero (also from shared experts and output bias) and
        counts in no loss, whatever it holds. All are real if None.
      deterministic: whether to leave out the router's jitter. `nn.remat`
        traces arguments, but a layer with jitter must know this one:
        `nn.remat(lambda block, x: block(x, deterministic=False))(block, x)`.
    """
    self._check_fields()
    checks.check_tokens("SMoEBlock", x)
    checks.check_mask("SMoEBlock", mask, x.shape[:-1])
    row_mask = None if mask is None else mask.reshape(-1)
    # The router and shared experts see padding, their gradients as well.
    rows = zero_padding(x.reshape(-1, x.shape[-1]), row_mask)
    routed = Router(
      num_experts=self.num_experts,
      top_k=self.top_k,
      scoring=self.scoring,
      use_bias=self.router_use_bias,
      num_groups=self.num_groups,
      top_groups=self.top_groups,
      renormalize=self.renormalize,
      scale=self.scale,
      jitter=self.jitter,
      use_selection_bias=self.use_selection_bias,
      param_dtype=self.param_dtype,
      kernel_init=named(self.router_kernel_init, self.mesh_axes, None, None),
      bias_init=self.bias_init,
      name="router",
    )(rows, deterministic=deterministic)
    chosen: Routing | Array
    if self.mesh_axes is None:
      chosen, metrics = route_with_metrics(routed, row_mask)
    else:
      # No sort over all devices: each routes its own tokens.
      chosen, metrics = ids_with_metrics(routed, row_mask)
    y = SMoEMLP(
      num_experts=self.num_experts,
      d_expert=self.d_expert,
      activation=self.activation,
      gated=self.gated,
      use_bias=self.use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
      kernel_init=self.kernel_init,
      out_kernel_init=self.out_kernel_init,
      bias_init=self.bias_init,
      num_chunks=self.num_chunks,
      mesh_axes=self.mesh_axes,
      implementation=self.implementation,
      name="experts",
    )(rows, routed.gates, chosen)
    if self._shared_width:
      y += self._shared(rows)
    if self.use_output_bias:
      bias = self.param(
        "output_bias", self.bias_init, (rows.shape[1],), self.param_dtype
      )
      y += bias.astype(y.dtype)[None, :]
    return zero_padding(y, row_mask).reshape(x.shape), metrics

  @nn.nowrap
  def _check_fields(self):
    checks.check_ints(
      "SMoEBlock",
      num_experts=self.num_experts,
      top_k=self.top_k,
      d_expert=self.d_expert,
    )
    checks.check_ints(
      "SMoEBlock",
      least=0,
      num_shared_experts=self.num_shared_experts,
      d_shared=0 if self.d_shared is None else self.d_shared,
    )
    checks.check_mesh_axes("SMoEBlock", self.mesh_axes)
    if self.shared_gate and not self._shared_width:
      raise ValueError(
        "SMoEBlock: shared_gate=True weighs shared experts, but "
        f"num_shared_experts = 0 and d_shared = {self.d_shared}; give one of "
        "them."
      )

  @property
  def _shared_width(self) -> int:
    if self.d_shared is not None:
      return self.d_shared
    return self.num_shared_experts * self.d_expert

  def _shared(self, rows):
    dense_fields: dict[str, Any] = dict(
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
      kernel_init=self.shared_kernel_init,
    )
    y = DenseMLP(
      mesh_axes=self.mesh_axes,
      d_hidden=self._shared_width,
      activation=self.activation,
      gated=self.gated,
      out_kernel_init=self.shared_out_kernel_init,
      name="shared",
      **dense_fields,
    )(rows)
    if self.shared_gate:
      gate = nn.Dense(1, use_bias=False, name="shared_gate", **dense_fields)
      y *= jax.nn.sigmoid(gate(rows))
    return y


def zero_padding(
  rows: Float[Array, "T d"], mask: Bool[Array, " T"] | None
) -> Float[Array, "T d"]:
  """Returns the rows, with zeros where a mask is False."""
  if mask is None:
    return rows
  # Not a product: padding may hold NaN.
  return jnp.where(mask[:, None], rows, jnp.zeros_like(rows))
