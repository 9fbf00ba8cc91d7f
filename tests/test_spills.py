"""How many bytes kernels spill, as read from what ptxas prints."""

import os

import pytest

from benchmarks import compile_for, spills

_REPORT = """ptxas warning : Registers are spilled to local memory in \
function 'up_projection_mosaic_gpu_kernel', 80 bytes spill stores
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'up_projection_mosaic_gpu_kernel'
ptxas info    : Function properties for up_projection_mosaic_gpu_kernel
    48 bytes stack frame, 80 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Function properties for group_xty_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_spills_in_reads_each_kernel_of_a_report():
  assert spills.spills_in(_REPORT) == [
    spills.Spill("up_projection", 80, 44),
    spills.Spill("group_xty", 0, 0),
  ]


def test_printed_lends_what_is_written_below_python(capfd):
  with spills._printed() as lines:
    os.write(1, b"from stdout\n")
    os.write(2, b"from stderr\n")
  os.write(1, b"after\n")
  assert lines == ["from stdout\n", "from stderr\n"]
  assert capfd.readouterr().out == "after\n"


def test_spills_says_what_it_needs(monkeypatch):
  def no_plugin(*args, **options):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(compile_for.topologies, "get_topology_desc", no_plugin)
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "")
  with pytest.raises(SystemExit, match="no CUDA plugin"):
    spills.main(["--shapes", "S", "--ops", "up"])
