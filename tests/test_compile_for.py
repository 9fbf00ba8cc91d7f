"""What is compiled for absent GPUs: a layer's products, of the right shapes."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compile_for
from scattermoe_jax.routing import Routing


@pytest.mark.parametrize("card", compile_for.CARDS)
@pytest.mark.parametrize("shape", compile_for.SHAPES)
def test_compile_for_has_the_five_products_of_a_layer(card, shape):
  sizes = compile_for.SHAPES[shape]
  tokens, d, n, experts, top_k = sizes
  rows = tokens * top_k
  ids = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int32)
  routing = Routing(ids(rows), ids(rows), ids(tokens, top_k), ids(experts))
  found = {}
  products = compile_for.products(
    compile_for.CARDS[card], sizes, jnp.dtype("bfloat16")
  )
  for name, (function, *shapes) in products.items():
    operands = [jax.ShapeDtypeStruct(dims, jnp.bfloat16) for dims in shapes]
    found[name] = jax.eval_shape(function, *operands, routing).shape
  assert found == {
    "up": (rows, n),
    "down": (rows, d),
    "dx": (rows, d),
    "dw": (experts, d, n),
    "dw_grouped": (experts, d, n),
  }


def test_compile_for_says_what_it_needs(monkeypatch):
  def no_plugin(*args, **options):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(compile_for.topologies, "get_topology_desc", no_plugin)
  with pytest.raises(SystemExit, match="no CUDA plugin"):
    compile_for.main(["--devices", "A100", "--shapes", "odd"])
