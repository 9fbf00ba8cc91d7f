"""Notebooks run from top to bottom, on small shapes, and carry their pictures.

A cell tagged "parameters" holds what makes a run long; here it is followed by
smaller values.
"""

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted(
  (pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb")
)
SMALL = {
  "01_quickstart": "NUM_EXPERTS, D_MODEL, NUM_POINTS, STEPS = 4, 8, 64, 3",
  "02_mixture_of_attention": "D_MODEL, BATCH, LENGTH, STEPS = 16, 2, 16, 2",
}


def pictures(notebook):
  return [
    output
    for cell in notebook.cells
    for output in cell.get("outputs", [])
    if "image/png" in output.get("data", {})
  ]


def errors(notebook):
  return [
    output
    for cell in notebook.cells
    for output in cell.get("outputs", [])
    if output["output_type"] == "error"
  ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_small_shapes(path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
  monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
  monkeypatch.delenv("XLA_FLAGS")  # one device, as at home
  notebook = nbformat.read(path, as_version=4)
  places = [
    i
    for i, cell in enumerate(notebook.cells)
    if "parameters" in cell.metadata.get("tags", [])
  ]
  assert len(places) == 1
  notebook.cells[places[0]].source += f"\n{SMALL[path.stem]}"
  client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
  client.execute(cwd=str(path.parent))
  assert pictures(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_as_it_ran(path):
  notebook = nbformat.read(path, as_version=4)
  assert pictures(notebook) and not errors(notebook)
  counts = [
    cell.execution_count for cell in notebook.cells if cell.cell_type == "code"
  ]
  assert counts == list(range(1, len(counts) + 1))
  assert str(path.parents[1]) not in path.read_text()  # nobody's folders
