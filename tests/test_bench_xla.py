"""The benchmark of the plain backend runs, on a CPU, on a tiny problem."""

import pytest

from benchmarks import bench_xla

ARGUMENTS = ["--tiny", "--samples", "2", "--directions"]


def test_bench_xla_checks_and_records():
  (record,) = bench_xla.main(ARGUMENTS + ["forward"])
  assert record["direction"] == "forward" and record["times_faster"] > 0


def test_bench_xla_refuses_a_wrong_gradient(monkeypatch):
  right = bench_xla.results

  def wrong(product, *args):
    y, *gradients = right(product, *args)
    if product is bench_xla.ours:
      gradients = [g * 2 for g in gradients]
    return y, *gradients

  monkeypatch.setattr(bench_xla, "results", wrong)
  with pytest.raises(AssertionError, match="ours dx: off by"):
    bench_xla.main(ARGUMENTS + ["forward+backward"])
