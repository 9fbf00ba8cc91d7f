"""Imports point down; each room keeps to what it may use."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "scattermoe_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of ours, beside itself. `_compat` knows the machine
# and imports nothing; whoever must ask the machine asks it.
MAY_IMPORT = {
  "_compat": set(),
  "_version": set(),
  "routing": {"_compat"},
  "kernels": {"routing", "_compat"},
  "ops": {"kernels", "routing", "_compat"},
  "sharding": {"ops", "routing", "_compat"},
  "nn": {"sharding", "ops", "routing", "_compat"},
  "models": {"nn", "sharding", "_compat"},
  "checkpoints": {"models", "nn", "_compat"},
}
# A program, and what only programs import, stands above its room.
PROGRAMS = {
  "models/generate.py": {"checkpoints"},
  "models/weights.py": {"checkpoints"},
}
# What each room must not touch, whoever wrote it.
MUST_NOT_IMPORT = {
  "kernels": ("flax",),
  "ops": ("flax", "jax.experimental.pallas"),
  "sharding": ("flax", "jax.experimental.pallas"),
  "nn": ("jax.experimental.pallas",),
  "models": ("jax.experimental.pallas",),
  "checkpoints": ("jax.experimental.pallas",),
}


def room(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
  """Every module, and every name of a module, that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_id(path):
  return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_imports_point_down(path):
  here = room(path)
  if here == "__init__":
    return
  assert here in MAY_IMPORT, f"{here} has no row in the table of rooms"
  for name in imports(path):
    if not name.startswith("scattermoe_jax."):
      continue
    there, *inside = name.split(".")[1:]
    allowed = MAY_IMPORT[here] | PROGRAMS.get(file_id(path), set())
    assert there == here or there in allowed, f"{file_id(path)} imports {name}"
    if here == "checkpoints" and there == "nn":
      assert len(inside) <= 1, f"{name}: the modules' public names alone"


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_rooms_keep_to_their_tools(path):
  for name in imports(path):
    for forbidden in MUST_NOT_IMPORT.get(room(path), ()):
      assert not f"{name}.".startswith(f"{forbidden}."), (
        f"{file_id(path)} imports {name}"
      )


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_calculus_and_the_machine_have_one_place_each(path):
  attributes = {
    f"{node.value.id}.{node.attr}"
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
  }
  if room(path) != "ops":
    assert not attributes & {"jax.custom_vjp", "jax.custom_jvp"}
  if room(path) != "_compat":
    assert not attributes & {"os.environ", "os.getenv", "jax.__version__"}


@pytest.mark.parametrize("path", FILES, ids=file_id)
def test_files_hold_one_idea(path):
  assert len(path.read_text().splitlines()) <= 400


def test_import_is_light():
  """No Pallas and no device: both are for whoever runs a kernel."""
  code = (
    "import sys, scattermoe_jax, jax\n"
    "assert not [m for m in sys.modules if 'experimental.pallas' in m]\n"
    "from jax._src import xla_bridge\n"
    "assert not xla_bridge._backends\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_parser_sees_an_arrow_that_points_up(tmp_path):
  file = tmp_path / "x.py"
  file.write_text("from scattermoe_jax.nn import router\nimport flax.linen\n")
  assert list(imports(file)) == ["scattermoe_jax.nn.router", "flax.linen"]
