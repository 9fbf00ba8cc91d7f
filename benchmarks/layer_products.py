"""The six products of a SwiGLU layer that are measured, tuned and compiled.

Forward and backward, named as `benchmarks.bench_ops` draws them.
"""

import functools
from typing import NamedTuple

import jax

from benchmarks.shapes import Shape, expert_ids, normal_array
from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels import Problem
from scattermoe_jax.routing import Routing, route

OPS = ("up", "down", "dx_down", "dx_up", "dw_down", "dw_up")

Data = dict[str, jax.Array]


class Product(NamedTuple):
  """One of the six: its arguments by name, and its size."""

  op: str
  operands: tuple[str, str]
  x_grouped: bool
  y_grouped: bool  # of group_xty's second operand, or of the result
  transpose_w: bool
  widths: tuple[int, int]  # contraction and columns, or columns of x and y

  @property
  def is_weight_gradient(self) -> bool:
    """Whether rows are contracted."""
    return self.op.startswith("dw")


def products(shape: Shape) -> dict[str, Product]:
  """Returns the six products of a layer, by name."""
  d, n = shape.d_model, shape.d_expert
  rows = (
    Product("up", ("x", "w_in"), False, True, False, (d, 2 * n)),
    Product("down", ("a", "w_out"), True, True, False, (n, d)),
    Product("dx_down", ("dy", "w_out"), False, True, True, (d, n)),
    Product("dx_up", ("dh", "w_in"), True, True, True, (2 * n, d)),
    Product("dw_down", ("a", "dy"), True, False, False, (n, d)),
    Product("dw_up", ("x", "dh"), False, True, False, (d, 2 * n)),
  )
  return {product.op: product for product in rows}


def arrays(shape: Shape) -> Data:
  """Returns the operands of all six by name, and `rows`, (S, d) of a dense x.

  All normal, each with a seed of its own.
  """
  num_tokens, d, n = shape.num_tokens, shape.d_model, shape.d_expert
  rows, experts = shape.num_rows, shape.num_experts
  sizes = {
    "x": (num_tokens, d),
    "dy": (num_tokens, d),
    "a": (rows, n),
    "dh": (rows, 2 * n),
    "w_in": (experts, d, 2 * n),
    "w_out": (experts, n, d),
    "rows": (rows, d),
  }
  return {
    name: normal_array(seed, *dims)
    for seed, (name, dims) in enumerate(sizes.items())
  }


def routing_of(shape: Shape, routing: str) -> Routing:
  """Returns who goes where."""
  return route(expert_ids(shape, routing), shape.num_experts)


def compute(backend, product: Product, left, right, routing: Routing):
  """Returns the product, by one backend."""
  if product.is_weight_gradient:
    return backend.group_xty(
      left,
      right,
      routing,
      x_grouped=product.x_grouped,
      y_grouped=product.y_grouped,
    )
  return backend.scatter2scatter(
    left,
    right,
    routing,
    grouped_in=product.x_grouped,
    grouped_out=product.y_grouped,
    transpose_w=product.transpose_w,
  )


class WithConfig:
  """A backend whose products are cut by one config."""

  def __init__(self, backend, config):
    self.scatter2scatter, self.group_xty = (
      functools.partial(function, config=config)
      for function in (backend.scatter2scatter, backend.group_xty)
    )


def problem_of(shape: Shape, product: Product) -> Problem:
  """Returns what a backend is chosen by."""
  return Problem(
    shape.num_rows,
    shape.num_experts,
    *product.widths,
    "bfloat16",
    current_device(),
  )
