"""What is compiled for absent GPUs: a layer's products, of the right shapes."""

import functools

import jax
import pytest

from benchmarks import compile_for, layer_products


@pytest.mark.parametrize("card", compile_for.CARDS)
@pytest.mark.parametrize("shape", compile_for.SHAPES)
def test_compile_for_has_the_products_of_a_layer(card, shape):
  shape = compile_for.SHAPES[shape]
  rows, experts = shape.num_rows, shape.num_experts
  d, n = shape.d_model, shape.d_expert
  data, routing = jax.eval_shape(
    lambda: (
      layer_products.arrays(shape),
      layer_products.routing_of(shape, "even"),
    )
  )
  found = {}
  for name, product in compile_for.products(shape).items():
    backend = compile_for.backend_for(
      compile_for.CARDS[card], shape, product, "bfloat16"
    )
    function = functools.partial(layer_products.compute, backend, product)
    operands = [data[operand] for operand in product.operands]
    found[name] = jax.eval_shape(function, *operands, routing).shape
  assert found == {
    "up": (rows, 2 * n),
    "down": (rows, d),
    "dx_down": (rows, n),
    "dx_up": (rows, d),
    "dw_down": (experts, n, d),
    "dw_up": (experts, d, 2 * n),
    "up_scattered": (rows, 2 * n),
    "dw_grouped": (experts, d, 2 * n),
  }


def test_compile_for_says_what_it_needs(monkeypatch):
  def no_plugin(*args, **options):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(compile_for.topologies, "get_topology_desc", no_plugin)
  with pytest.raises(SystemExit, match="no CUDA plugin"):
    compile_for.main(["--devices", "A100", "--shapes", "odd"])
