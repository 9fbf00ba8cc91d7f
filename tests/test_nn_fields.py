"""What a module hands on: a field that is set changes what is computed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from scattermoe_jax import nn as smnn

B, L, D, N, E, K = 2, 5, 8, 4, 3, 2
ONES = jnp.ones((B, L, D))
ROWS = (ONES, jnp.ones((B, L, K)), jnp.zeros((B, L, K), jnp.int32))
NORMAL = nn.initializers.normal(0.5)

MAKE = {
  "SMoEMLP": functools.partial(smnn.SMoEMLP, E, N, use_bias=True),
  "SMoEBlock": functools.partial(
    smnn.SMoEBlock, E, K, N, num_shared_experts=1, shared_gate=True
  ),
  "MixtureOfAttention": functools.partial(smnn.MixtureOfAttention, E, K, 2, 4),
}
FIELDS = [
  ("SMoEMLP", {"num_chunks": 2}),
  ("SMoEMLP", {"precision": "highest"}),
  ("SMoEMLP", {"out_bias_init": NORMAL}),
  ("SMoEBlock", {"num_chunks": 2}),
  ("SMoEBlock", {"precision": "highest"}),
  ("SMoEBlock", {"scale": 2.0}),
  ("MixtureOfAttention", {"router_scale": 2.0}),
  ("MixtureOfAttention", {"rope_scaling": smnn.RopeScaling(4.0, 8)}),
  ("MixtureOfAttention", {"scale": 2.0}),
  ("MixtureOfAttention", {"sliding_window": 2}),
]


def program(name, **fields):
  """Returns the jaxpr of parameters and output, as text; nothing is run."""
  inputs = ROWS if name == "SMoEMLP" else (ONES,)
  init = MAKE[name](**fields).init_with_output
  return str(jax.make_jaxpr(init)(jax.random.key(0), *inputs))


@functools.cache
def default_program(name):
  return program(name)


@pytest.mark.parametrize("name", MAKE)
def test_a_program_is_the_same_each_time(name):
  # Else the next test would hold of any field.
  assert program(name) == default_program(name)


@pytest.mark.parametrize(
  ("name", "fields"),
  FIELDS,
  ids=[f"{name}-{next(iter(fields))}" for name, fields in FIELDS],
)
def test_a_field_changes_the_program(name, fields):
  assert program(name, **fields) != default_program(name)


@pytest.mark.parametrize("name", ["SMoEMLP", "SMoEBlock"])
def test_precision_is_that_of_every_product(name):
  # Of the experts, the shared experts and their gate; the router has its own.
  products = program(name, precision="highest").split("dot_general[")[1:]
  assert products
  for product in products:
    assert "HIGHEST" in product.partition("preferred_element_type")[0]


def test_biases_have_their_own_initializers():
  ones, twos = (nn.initializers.constant(value) for value in (1, 2))
  module = MAKE["SMoEMLP"](bias_init=ones, out_bias_init=twos)
  params = module.init(jax.random.key(0), *ROWS)["params"]
  assert (params["bias_in"] == 1).all()
  assert (params["bias_out"] == 2).all()
