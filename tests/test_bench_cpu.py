"""The CPU's benchmark runs, on a problem too small to mean anything."""

import jax.numpy as jnp
import pytest

from benchmarks import tables


@pytest.fixture
def bench_cpu(monkeypatch):
  # Imported, it asks for the CPU in the environment that children inherit.
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  from benchmarks import bench_cpu

  return bench_cpu


def test_bench_cpu_checks_and_records(bench_cpu):
  records = bench_cpu.main(["--tiny", "--samples", "2"])
  assert [(r["groups"], r["direction"]) for r in records] == [
    ("even", "forward"), ("even", "forward+backward"),
    ("skewed", "forward"), ("skewed", "forward+backward"),
  ]  # fmt: skip
  assert records[0]["shape"] == "S=96 k=2 E=4 d=64 n=32"
  assert len(tables.cpu(records).splitlines()) == 6


def test_bench_cpu_refuses_a_wrong_gradient(bench_cpu, monkeypatch):
  right = bench_cpu.bench_xla.results

  def wrong(product, *args):
    y, *gradients = right(product, *args)
    return y, *(jnp.flip(g, -1) for g in gradients)

  monkeypatch.setattr(bench_cpu.bench_xla, "results", wrong)
  with pytest.raises(AssertionError, match="ours: off by"):
    bench_cpu.main(["--tiny", "--samples", "2"])
