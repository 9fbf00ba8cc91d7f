"""The benchmark of first calls runs, on a CPU, on a problem of no size."""

import itertools

import pytest

from benchmarks import bench_compile


@pytest.mark.parametrize(
  "experts, ops",
  [
    ((2, 8), ("up", "dw_up")),
    ((4,), ("activation", "derivative")),
    ((4,), ("step",)),
  ],
)
def test_bench_compile_adds_up_the_parts_of_a_first_call(experts, ops):
  records = bench_compile.main(
    ["--shapes", "tiny", "--experts", *map(str, experts), "--ops", *ops]
  )
  assert [(r["num_experts"], r["op"]) for r in records] == [
    *itertools.product(experts, ops)
  ]
  for record in records:
    parts = [record[f"{part}_s"] for part in ("lower", "compile", "call")]
    assert min(parts) > 0 and record["implementation"] == "xla"
    assert record["first_call_s"] == pytest.approx(sum(parts))


def test_bench_compile_takes_what_the_backend_has():
  flags = ["--shapes", "tiny", "--experts", "4"]
  with pytest.raises(
    SystemExit, match="dw_up_sum: of mosaic alone, not of xla"
  ):
    bench_compile.main([*flags, "--ops", "dw_up_sum"])
  ops = [r["op"] for r in bench_compile.main(flags)]
  assert ops == [*bench_compile.OPS[:-2]]


@pytest.mark.parametrize(
  "flags, message",
  [
    # A first call happens once.
    ("--samples 2", "unrecognized arguments: --samples"),
    ("--ops up step --experts 4", "--ops step: takes no other op"),
    ("--ops step", "--ops step: takes no other op"),
  ],
)
def test_bench_compile_refuses_calls_that_are_not_first(flags, message, capsys):
  with pytest.raises(SystemExit):
    bench_compile.main(["--shapes", "tiny", *flags.split()])
  assert message in capsys.readouterr().err
