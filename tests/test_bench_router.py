"""The benchmark of the router runs, on a CPU, on a tiny problem."""

import jax.numpy as jnp
import pytest

from benchmarks import bench_router, tables
from benchmarks.shapes import SHAPES

SAMPLING = {"bandwidth": 1e9, "samples": 2, "sample_ms": 1.0}


def test_bench_router_checks_and_records():
  [records] = bench_router.run(SHAPES["tiny"], **SAMPLING)
  assert [r["implementation"] for r in records] == ["split", "float32"]
  for r in records:
    bound_ms = 3 * 48 * 64 * 2 / 1e9 * 1e3
    assert r["of_bytes_bound"] == pytest.approx(bound_ms / r["ms_median"])
  table = tables.router(records)
  assert "T=48 d=64 n=32 E=4 k=2" in table and len(table.splitlines()) == 3


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda logits, ids: (logits + 1e-3, ids), "split: logits off by 1.0e-03"),
    (lambda logits, ids: (logits, (ids + 1) % 4), "of tokens go the same way"),
  ],
)
def test_bench_router_refuses_other_choices(monkeypatch, change, message):
  right = bench_router.step

  def wrong(router, dtype, *given):
    logits, ids, *gradients = right(router, dtype, *given)
    if dtype == jnp.bfloat16:
      logits, ids = change(logits, ids)
    return logits, ids, *gradients

  monkeypatch.setattr(bench_router, "step", wrong)
  with pytest.raises(AssertionError, match=message):
    list(bench_router.run(SHAPES["tiny"], **SAMPLING))
