"""Documents: links lead somewhere, docstrings' examples run."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest

import scattermoe_jax

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MODULES = sorted(
  module.name
  for module in pkgutil.walk_packages(
    scattermoe_jax.__path__, "scattermoe_jax."
  )
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
  targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
  for target in targets:
    if not target.startswith(("http://", "https://")):
      assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
  try:
    module = importlib.import_module(name)
  except ImportError as error:
    pytest.skip(str(error))
  names = {"jax": jax, "jnp": jnp, "sm": scattermoe_jax, **vars(scattermoe_jax)}
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  report = []
  for test in doctest.DocTestFinder().find(module, extraglobs=names):
    runner.run(test, out=report.append)
  assert runner.failures == 0, "".join(report)
