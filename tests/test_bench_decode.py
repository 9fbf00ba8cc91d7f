"""The decode benchmark runs, on a CPU, on a batch that means nothing."""

import pytest

from benchmarks import bench_decode


def test_bench_decode_checks_and_records():
  (record,) = bench_decode.main(["tiny", "--others"])
  assert record["implementation"] == "xla"
  assert record["ms_median"] > 0 and record["layer_ms"] > 0
  assert 0 < record["touched_experts"] <= 6
  assert (record["bench"], record["samples"]) == ("bench_decode", 20)


def test_bench_decode_names_the_shapes_that_it_knows(capsys):
  with pytest.raises(SystemExit):
    bench_decode.main(["T8", "T9"])
  assert "unknown shapes ['T9']; known are T1, T8" in capsys.readouterr().err


def test_bench_decode_refuses_a_wrong_layer(monkeypatch):
  right = bench_decode.layer

  def wrong(*args, **options):
    return right(*args, **options).at[1].multiply(2)

  monkeypatch.setattr(bench_decode, "layer", wrong)
  with pytest.raises(AssertionError, match="tiny xla: off by"):
    bench_decode.main(["tiny"])
