"""The names people may rely on: a change here is a change to users."""

import ast
import inspect
import pathlib

import pytest

import scattermoe_jax as sm

PUBLIC = {
  "ACTIVATIONS",
  "Activation",
  "Routing",
  "__version__",
  "clamped_swiglu",
  "combine",
  "nn",
  "parallel_linear",
  "remat_policy",
  "report",
  "route",
  "smoe_mlp",
}
PUBLIC_NN = {
  "ACTIVATIONS",
  "Activation",
  "DenseMLP",
  "KVCache",
  "MixtureOfAttention",
  "ParallelLinear",
  "RopeScaling",
  "Router",
  "RouterOutput",
  "SMoEBlock",
  "SMoEMLP",
  "SMoEMetrics",
  "attend",
  "consecutive_positions",
  "load_balancing_loss",
  "rotary_embedding",
  "route_with_metrics",
  "router_z_loss",
  "sigmoid_top_k",
  "softmax_then_top_k",
  "top_k_then_softmax",
  "update_selection_bias",
}
DOCUMENTED = [
  pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
  for module, names in ((sm, PUBLIC), (sm.nn, PUBLIC_NN))
  for name in sorted(names)
  if callable(getattr(module, name, None))
]


def exported(module):
  """The names that the module re-exports, one by one."""
  tree = ast.parse(pathlib.Path(module.__file__).read_text())
  return {
    alias.asname or alias.name
    for node in tree.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }


def test_the_package_exports_these_names():
  assert set(sm.__all__) == exported(sm) == PUBLIC


def test_nn_exports_these_names():
  assert set(sm.nn.__all__) == exported(sm.nn) == PUBLIC_NN


@pytest.mark.parametrize("thing", DOCUMENTED)
def test_every_public_name_says_what_it_is(thing):
  doc = inspect.getdoc(thing)
  assert doc, "no docstring"
  first = doc.splitlines()[0]
  assert first.endswith((".", ":")), first
  assert not first.startswith("This "), first


@pytest.mark.parametrize("thing", DOCUMENTED)
def test_every_argument_of_a_public_function_is_documented(thing):
  if not inspect.isfunction(thing):
    return
  doc = inspect.getdoc(thing)
  parameters = inspect.signature(thing).parameters
  if len(parameters) <= 2:  # the sentence that it returns names them
    return
  missing = [name for name in parameters if name not in doc]
  assert not missing, f"{thing.__name__}: {missing}"
