"""Low-rank adapters on expert weights: each expert has its own A and B.

  y = x W_e + (x A_e) B_e          A_e (d, r), B_e (r, n), W frozen

Two more grouped products of width r, of the same routing. Adapters lie in the
tree of parameters, beside the weight they adapt, under "lora":

  params["layer_0"]["ffn"]["experts"]["lora"]["w_gate_up"]["a"]   (E, d, r)

The modules use them where they are, so a model needs no change; a train step
takes gradients of the adapters alone:

  adapters = init_adapters(key, params, rank=8)
  params_of = lambda adapters: with_adapters(params, adapters)

The usual factor alpha / r is part of B.
Source: LoRA (Hu et al., 2021, arXiv 2106.09685), section 4.1.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float

from scattermoe_jax.nn import checks
from scattermoe_jax.ops import (
  Activation,
  combine,
  linear_combine,
  parallel_linear,
)
from scattermoe_jax.ops.activations import get_activation
from scattermoe_jax.routing import Routing

Tree = Any
Path = tuple[str, ...]

EXPERT_WEIGHTS = ("w_gate_up", "w_in", "w_out")


def init_adapters(
  key: Array,
  params: Tree,
  *,
  rank: int,
  targets: str | Sequence[str] = EXPERT_WEIGHTS,
  stacked_axes: int = 0,
) -> Tree:
  """Returns adapters that change nothing yet: A random, B zero.

  Args:
    key: of the random numbers.
    params: the weights to adapt.
    rank: r.
    targets: names of weights; those of three axes are adapted. Add "kernel" for
      the query and output experts of a mixture of attention.
    stacked_axes: how many axes every weight has before those: 1 where `nn.scan`
      or `nn.vmap` put layers into one array.

  Returns:
    A tree with "a" (E, d, r) and "b" (E, r, n) for each of them, after stacked
    axes, in the dtype of the weight.

  Raises:
    ValueError: if a name is that of no such weight, some experts' weights have
      another number of axes, the rank is below 1, or stacked_axes below 0.
    TypeError: if either is no static int.
  """
  checks.check_ints("init_adapters", rank=rank)
  checks.check_ints("init_adapters", least=0, stacked_axes=stacked_axes)
  weights = _targeted(params, targets, stacked_axes)
  init_a = jax.nn.initializers.lecun_normal(
    batch_axis=tuple(range(1 + stacked_axes))
  )
  keys = jax.random.split(key, len(weights))
  adapters = {}
  for (path, w), w_key in zip(weights.items(), keys, strict=True):
    *experts, d_in, d_out = w.shape
    place = (*path[:-1], "lora", path[-1])
    adapters[(*place, "a")] = init_a(w_key, (*experts, d_in, rank), w.dtype)
    adapters[(*place, "b")] = jnp.zeros((*experts, rank, d_out), w.dtype)
  return unflatten_dict(adapters)


def with_adapters(params: Tree, adapters: Tree) -> Tree:
  """Returns the parameters with adapters beside the weights, those frozen.

  Boxes (`nn.Partitioned`) stay around weights, not around adapters.

  Raises:
    ValueError: if an adapter is of no weight that there is, or does not fit it.
  """
  _pairs("with_adapters", params, adapters)
  frozen = flatten_dict(lax.stop_gradient(params))
  # Modules take adapters from the tree as they are, and boxes are no arrays.
  return unflatten_dict(frozen | flatten_dict(nn.unbox(adapters)))


def merge(params: Tree, adapters: Tree) -> tuple[Tree, Tree]:
  """Returns (merged, remainder): W + A B in place of W, rounded once.

  Args:
    params: the weights.
    adapters: of some of them.

  Returns:
    Parameters for a model without adapters, in the boxes that they had; and,
    for `unmerge`, the bits in which the adapted weights differ from the old, as
    large as they are. (The rounding of W + A B forgets bits of W, so that
    subtracting A B again would not give W.)

  Raises:
    ValueError: if an adapter is of no weight that there is, or does not fit it.
  """
  merged, remainder = flatten_dict(params), {}
  for path, (a, b) in _pairs("merge", params, adapters).items():
    w = nn.unbox(merged[path])
    w_merged = _add_product(w, a, b)
    merged[path] = nn.meta.replace_boxed(merged[path], w_merged)
    remainder[path] = _bits(w) ^ _bits(w_merged)
  return unflatten_dict(merged), unflatten_dict(remainder)


def unmerge(merged: Tree, remainder: Tree) -> Tree:
  """Returns the parameters before `merge`, bit for bit."""
  params = flatten_dict(merged)
  for path, bits in flatten_dict(remainder).items():
    w = nn.unbox(params[path])
    w_before = lax.bitcast_convert_type(_bits(w) ^ bits, w.dtype)
    params[path] = nn.meta.replace_boxed(params[path], w_before)
  return unflatten_dict(params)


def adapted_smoe_mlp(
  x: Float[Array, "T d"],
  gates: Float[Array, "T k"],
  routing: Routing,
  w_in: Float[Array, "E d m"],
  w_out: Float[Array, "E n d"],
  *,
  adapter_in: Tree | None,
  adapter_out: Tree | None,
  bias_in: Float[Array, "E m"] | None = None,
  bias_out: Float[Array, "E d"] | None = None,
  activation: str | Activation = "silu",
  num_chunks: int = 1,
  precision: lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Float[Array, "T d"]:
  """Returns `scattermoe_jax.smoe_mlp` of weights with adapters.

  Its residuals are those of the four to six products, (S, n) and (S, d): the
  fused op's algorithm has no place for a second pair of factors.

  Args:
    x: tokens.
    gates: the weight of each choice.
    routing: from `route`.
    w_in: (E, d, n), or (E, d, 2n) with the gate half first.
    w_out: (E, n, d).
    adapter_in: "a" and "b" of w_in, or None.
    adapter_out: of w_out, or None.
    bias_in: see `smoe_mlp`, as the rest.
    bias_out: see there.
    activation: see there.
    num_chunks: ignored; the expanded output is made at once.
    precision: see there.
    implementation: see there.
  """
  del num_chunks
  linear = functools.partial(
    adapted_parallel_linear,
    grouped_out=True,
    precision=precision,
    implementation=implementation,
  )
  gated = w_in.shape[2] == 2 * w_out.shape[1]
  h = linear(x, w_in, routing, adapter=adapter_in, bias=bias_in)
  activation = get_activation(activation, gated=gated, function="smoe_mlp")
  a = activation.apply(h)
  y = linear(
    a, w_out, routing, adapter=adapter_out, bias=bias_out, grouped_in=True
  )
  return combine(y, gates, routing)


def adapted_parallel_linear(
  x: Float[Array, "rows d"],
  w: Float[Array, "E d n"],
  routing: Routing,
  *,
  adapter: Tree | None,
  bias: Float[Array, "E n"] | None = None,
  grouped_in: bool = False,
  grouped_out: bool = False,
  precision: lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Float[Array, "S n"]:
  """Returns x W_e + (x A_e) B_e for each row, e its expert.

  Args:
    x: see `scattermoe_jax.parallel_linear`, as all but the adapter.
    w: see there.
    routing: see there.
    adapter: "a" (E, d, r) and "b" (E, r, n), or None.
    bias: see there.
    grouped_in: see there.
    grouped_out: see there.
    precision: see there.
    implementation: see there.
  """
  linear = functools.partial(
    parallel_linear,
    routing=routing,
    grouped_out=grouped_out,
    precision=precision,
    implementation=implementation,
  )
  y = linear(x, w, bias=bias, grouped_in=grouped_in)
  if adapter is None:
    return y
  xa = parallel_linear(
    x,
    adapter["a"].astype(x.dtype),
    routing,
    grouped_in=grouped_in,
    grouped_out=True,
    precision=precision,
    implementation=implementation,
  )
  return y + linear(xa, adapter["b"].astype(x.dtype), grouped_in=True)


def adapted_linear_combine(
  x: Float[Array, "S n"],
  gates: Float[Array, "T k"],
  routing: Routing,
  w: Float[Array, "E n d"],
  *,
  adapter: Tree | None,
  grouped_in: bool = False,
  precision: lax.PrecisionLike = None,
  implementation: str | None = None,
) -> Float[Array, "T d"]:
  """Returns sum_j gates_j (x_j W_e + (x_j A_e) B_e), e the expert of choice j.

  Args:
    x: see `linear_combine`, as all but the adapter.
    gates: see there.
    routing: see there.
    w: see there.
    adapter: "a" (E, n, r) and "b" (E, r, d), or None.
    grouped_in: see there.
    precision: see there.
    implementation: see there.
  """
  options: dict[str, Any] = dict(
    precision=precision, implementation=implementation
  )
  y = linear_combine(x, gates, routing, w, grouped_in=grouped_in, **options)
  if adapter is None:
    return y
  a, b = (adapter[name].astype(x.dtype) for name in "ab")
  xa = parallel_linear(
    x, a, routing, grouped_in=grouped_in, grouped_out=True, **options
  )
  return y + linear_combine(xa, gates, routing, b, grouped_in=True, **options)


def _targeted(
  params: Tree, targets: str | Sequence[str], stacked_axes: int
) -> dict[Path, Array]:
  """Returns the weights to adapt, or says which name is that of none."""
  num_axes = 3 + stacked_axes
  targets = (targets,) if isinstance(targets, str) else tuple(targets)
  flat = flatten_dict(nn.unbox(params))
  named = {path: w for path, w in flat.items() if path[-1] in targets}
  weights = {path: w for path, w in named.items() if w.ndim == num_axes}
  stacks = {w.shape[:stacked_axes] for w in weights.values()}
  for path, w in named.items():
    if path[-1] not in EXPERT_WEIGHTS:  # A "kernel" may be that of any layer.
      continue
    if w.ndim > num_axes:
      raise ValueError(
        f"init_adapters: {'/'.join(path)!r} of shape {w.shape} has more than "
        f"{num_axes} axes; pass stacked_axes = {w.ndim - 3} if it stacks "
        "layers, sharding.join_gate(params) if a mesh splits its gate."
      )
    if stacks and _is_less_stacked(path, w, stacks):
      raise ValueError(
        f"init_adapters: {'/'.join(path)!r} of shape {w.shape} has fewer than "
        f"{num_axes} axes, other weights of experts have as many; make the "
        "adapters of each part of the parameters by a call of its own, with "
        "its stacked_axes."
      )
  found = {path[-1] for path in weights}
  # A gated layer has w_gate_up, another one w_in: each model lacks a name.
  unknown = sorted({*targets} - found - {*EXPERT_WEIGHTS})
  if unknown or not weights:
    there = sorted({path[-1] for path, w in flat.items() if w.ndim == num_axes})
    raise ValueError(
      "init_adapters: the parameters have no expert weight named "
      f"{unknown or list(targets)}; of {num_axes} axes they have {there}."
    )
  return weights


def _is_less_stacked(
  path: Path, w: Array, stacks: Collection[tuple[int, ...]]
) -> bool:
  """Returns whether w is of experts, in fewer stacked axes than others.

  (L, d, n) may also stack the dense MLPs of the same layers: L tells, and the
  name that `SMoEBlock` gives its experts, should E be L.
  """
  (stacked_axes,) = {len(stack) for stack in stacks}
  if not 3 <= w.ndim < 3 + stacked_axes:
    return False
  return path[-2:-1] == ("experts",) or w.shape[:stacked_axes] not in stacks


def _pairs(
  function: str, params: Tree, adapters: Tree
) -> dict[Path, tuple[Array, Array]]:
  """Returns (A, B) by the path of the weight, each found to fit one."""
  weights, flat = map(flatten_dict, nn.unbox((params, adapters)))
  pairs: dict[Path, tuple[Array, Array]] = {}
  for path, leaf in flat.items():
    if leaf is None:
      raise ValueError(
        f"{function}: {'/'.join(path)!r} is None; leave out the whole adapter "
        "of a weight that has none."
      )
  for path in flat:
    weight = (*path[:-3], path[-2]) if path[-3:-2] == ("lora",) else path
    a, b = (flat.get((*path[:-1], name)) for name in "ab")
    if path == weight or path[-1] not in ("a", "b") or a is None or b is None:
      raise ValueError(
        f"{function}: {'/'.join(path)!r} is no half of an adapter; each has "
        "'../lora/NAME/a' and '../lora/NAME/b', NAME that of a weight."
      )
    if weight not in weights:
      raise ValueError(
        f"{function}: there is no weight {'/'.join(weight)!r} to adapt; there "
        f"are {_adaptable(weights, like=weight)}."
      )
    w, rank = weights[weight], a.shape[-1:]
    expected = (*w.shape[:-1], *rank), (*w.shape[:-2], *rank, *w.shape[-1:])
    if (a.shape, b.shape) != expected:
      raise ValueError(
        f"{function}: {'/'.join(weight)!r} has shape {w.shape}, its adapter "
        f"{a.shape} and {b.shape}."
      )
    pairs[weight] = a, b
  return pairs


def _adaptable(weights: Mapping[Path, Array], like: Path) -> list[str]:
  """Returns the expert weights of that name, or of any if none has it."""
  paths = [path for path, w in weights.items() if w.ndim >= 3]
  same = [path for path in paths if path[-1] == like[-1]]
  return ["/".join(path) for path in same or paths]


def _add_product(w, a, b):
  wide = jnp.float64 if w.dtype == jnp.float64 else jnp.float32
  product = jnp.einsum(
    "...dr,...rn->...dn",
    a.astype(wide),
    b.astype(wide),
    precision=lax.Precision.HIGHEST,
  )
  return (w.astype(wide) + product).astype(w.dtype)


def _bits(w: Array) -> Array:
  return lax.bitcast_convert_type(w, f"uint{8 * w.dtype.itemsize}")
