"""The benchmark of first calls runs, on a CPU, on a problem of no size."""

import pytest

from benchmarks import bench_compile


def test_bench_compile_adds_up_the_parts_of_a_first_call():
  records = bench_compile.main(
    ["--shapes", "tiny", "--experts", "2", "8", "--ops", "up", "dw_up"]
  )
  assert [(r["num_experts"], r["op"]) for r in records] == [
    (2, "up"), (2, "dw_up"), (8, "up"), (8, "dw_up"),
  ]  # fmt: skip
  for record in records:
    parts = [record[f"{part}_s"] for part in ("lower", "compile", "call")]
    assert min(parts) > 0 and record["implementation"] == "xla"
    assert record["first_call_s"] == pytest.approx(sum(parts))


def test_bench_compile_offers_no_samples(capsys):
  """A first call happens once."""
  with pytest.raises(SystemExit):
    bench_compile.main(["--shapes", "tiny", "--samples", "2"])
  assert "unrecognized arguments: --samples" in capsys.readouterr().err
