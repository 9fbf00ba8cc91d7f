"""The README's code runs, its links lead somewhere, it stays short."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import scattermoe_jax as sm
from tests.accuracy import assert_accurate

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks(text):
  return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_code_runs_from_top_to_bottom(capsys):
  names = {}
  blocks = python_blocks(README)
  assert len(blocks) >= 2
  for block in blocks:
    exec(compile(block, "README.md", "exec"), names)
  assert names["y"].shape == (512, 64)
  assert "xla: runs" in capsys.readouterr().out


def test_the_first_example_is_twelve_lines_of_code():
  code = [line for line in python_blocks(README)[0].splitlines() if line]
  assert len(code) <= 12


def test_the_gates_of_scattermoe_weigh_the_rows_of_their_own_choice():
  [row] = [line for line in README.splitlines() if "gates=p)`" in line]
  product, weighted = re.findall(r"`([^`]*)`", row.split("|")[2])
  rng = np.random.default_rng(0)
  x, w, p = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((8, 16), (4, 16, 5), (8, 2))
  )
  ids = jnp.asarray(np.argsort(rng.random((8, 4)), axis=1)[:, :2])
  names = dict(sm=sm, x=x, w=w, p=p, routing=sm.route(ids, 4))
  exec(product, names)
  operands = (p, x, w[ids])
  form, wide = "tk,td,tkdn->tn", [np.asarray(a, np.float64) for a in operands]
  truth, plain = np.einsum(form, *wide), jnp.einsum(form, *operands)
  assert_accurate(eval(weighted, names), truth, plain)


def test_it_is_read_in_one_sitting():
  assert len(README.splitlines()) < 150


@pytest.mark.parametrize("target", ["demo", "test", "test-oldest", "check"])
def test_the_commands_exist(target):
  assert f"make {target}" in README
  assert f"\n{target}:" in (ROOT / "Makefile").read_text()
