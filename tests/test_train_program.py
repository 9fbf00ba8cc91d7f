"""The training program, end to end on a tiny model."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from scattermoe_jax.models import data, generate, train
from scattermoe_jax.models.mesh import Placement
from scattermoe_jax.models.options import RunConfig
from scattermoe_jax.models.run_folder import RunFolder
from scattermoe_jax.models.setup import Run
from scattermoe_jax.models.tokens import BYTES
from scattermoe_jax.models.training import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
TINY = (
  "--batch-size=2 --sequence-length=16 --evaluate-every=4 --checkpoint-every=2 "
  "--validation-batches=1 --sample-tokens=5 --set=d_model=8 --set=num_heads=2 "
  "--set=num_kv_heads=2 --set=head_dim=4 --set=num_experts=4 --set=d_expert=4 "
  "--set=num_layers=1"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "text.txt"
  path.write_text("the cat sat on the mat. " * 60)
  return str(path)


def lines(folder, kind):
  """Returns (model, step, value) of each line that has that kind of value."""
  text = (folder / "metrics.jsonl").read_text()
  found = [json.loads(line) for line in text.splitlines()]
  return [(m["model"], m["step"], m[kind]) for m in found if kind in m]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
  """Returns the folder of a whole run, and what it printed: one process."""
  folder = tmp_path_factory.mktemp("work") / "runs" / "demo"
  command = [sys.executable, "-m", "scattermoe_jax.models.train"]
  result = subprocess.run(
    [*command, "--data", text, "--out", folder, "--steps=6", *TINY],
    capture_output=True,
    text=True,
    cwd=ROOT,
    env={**os.environ, "PYTHONWARNINGS": "error::UserWarning"},
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return folder, result.stdout


def test_program_trains_both_models_and_reports(finished):
  folder, printed = finished
  for name in ("moe", "dense"):
    steps = [step for model, step, _ in lines(folder, "bits") if model == name]
    assert steps == [1, 2, 3, 4, 5, 6]
    looks = [s for m, s, _ in lines(folder, "validation_bits") if m == name]
    assert looks == [4, 6]
    kept = {p.name for p in (folder / "checkpoints" / name).iterdir()}
    assert {"4", "6"} <= kept and "2" not in kept
  summary = json.loads((folder / "summary.json").read_text())
  moe, dense = summary["models"]
  assert moe["active_params"] - dense["active_params"] == 8 * 4  # The router.
  assert moe["params"] > dense["params"] == dense["active_params"]
  assert summary["baselines"]["uniform"] == 8
  assert 2 < summary["baselines"]["unigram"] < 5
  for picture in ("loss.png", "experts.png"):
    assert (folder / picture).read_bytes().startswith(b"\x89PNG")
  assert (folder / "sample.txt").read_text().startswith("def ")
  for words in ("1,350 bytes to learn from", "unigram", "6/6", "experts.png"):
    assert words in printed, printed


def test_generate_goes_on_with_what_was_trained(finished, monkeypatch, capsys):
  folder, printed = finished
  command = f"python -m scattermoe_jax.models.generate --checkpoint {folder}"
  assert f"more of it: {command}/export" in printed
  flags = ["--max-tokens", "5", "--temperature", "0"]
  monkeypatch.chdir(folder.parents[1])
  assert generate.main(flags) == 0
  newest = capsys.readouterr()
  assert newest.out.startswith("def ")
  assert "loaded runs/demo/export in" in newest.err
  # The run's folder means the same.
  assert generate.main(["--checkpoint", str(folder), *flags]) == 0
  assert capsys.readouterr().out == newest.out


def test_a_batch_is_of_the_seed_and_the_step_of_a_run(tmp_path):
  tokens = np.random.default_rng(0).integers(0, 256, 200, np.uint8)
  sizes = {"batch_size": 4, "sequence_length": 9}
  config = RunConfig(training=TrainConfig(seed=3, **sizes))
  corpus, folder = data.Corpus(tokens, tokens[:10], "text"), RunFolder(tmp_path)
  with Run(config, corpus, BYTES, {}, folder, Placement.of(None)) as run:
    got = train._batch(run, 5)
  want = data.train_batch(tokens, seed=3, step=5, **sizes)
  np.testing.assert_array_equal(got, want)


class Killed(BaseException):
  """Stands for a kill: nothing in the program catches it."""


def test_a_killed_run_resumes_to_the_same_curve(
  finished, text, tmp_path, monkeypatch
):
  whole, _ = finished
  folder = tmp_path / "run"
  count = itertools.count()
  make_batch = train._batch

  def batch_or_die(*args):
    # Past the checkpoint of step 4 of the dense twin, the second model.
    if next(count) == 6 + 5:
      raise Killed
    return make_batch(*args)

  monkeypatch.setattr(train, "_batch", batch_or_die)
  flags = ["--data", text, "--out", str(folder), "--steps=6", *TINY]
  with pytest.raises(Killed):
    train.main(flags)
  assert ("dense", 5) in {line[:2] for line in lines(folder, "bits")}
  assert ("dense", 6) not in {line[:2] for line in lines(folder, "bits")}
  # Half a line, as a kill may leave it.
  with (folder / "metrics.jsonl").open("a") as file:
    file.write('{"model": "den')

  monkeypatch.setattr(train, "_batch", make_batch)
  assert train.main(["--resume", str(folder)]) == 0
  for kind in ("bits", "validation_bits", "grad_norm"):
    assert lines(folder, kind) == lines(whole, kind), "not the same bits"
  assert (folder / "sample.txt").read_text() == (
    whole / "sample.txt"
  ).read_text()


@pytest.mark.slow
def test_a_process_killed_by_signal_resumes(finished, text, tmp_path):
  whole, _ = finished
  folder = tmp_path / "run"
  command = [sys.executable, "-m", "scattermoe_jax.models.train"]
  process = subprocess.Popen(
    [*command, "--data", text, "--out", folder, "--steps=6", *TINY],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
  )
  while not (folder / "checkpoints" / "moe" / "4").exists():
    assert process.poll() is None, "it ended before it was killed"
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  left = (folder / "metrics.jsonl").read_text().splitlines()
  assert not (folder / "summary.json").exists()
  subprocess.run([*command, "--resume", folder], cwd=ROOT, check=True)
  for kind in ("bits", "validation_bits", "grad_norm"):
    assert lines(folder, kind) == lines(whole, kind)
  # It went on from step 4: the lines up to there, with the seconds that their
  # steps took, are those of the first process.
  kept = (folder / "metrics.jsonl").read_text().splitlines()
  assert len(left) >= 5 and kept[:5] == left[:5]


def run(capsys, *flags):
  """Returns the exit code and what was said on stderr."""
  code = train.main([str(flag) for flag in flags])
  return code, capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(finished, text, capsys, tmp_path):
  folder, _ = finished
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
  code, said = run(capsys, "--data", text, "--out", folder, *TINY)
  assert code == 2
  assert f"error: --out {folder}: the folder is in use; go on with" in said
  assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
  (tmp_path / "mine.txt").write_text("mine")
  code, said = run(capsys, "--data", text, "--out", tmp_path, *TINY)
  assert code == 2 and "the folder is in use; name another" in said
  code, said = run(
    capsys, "--data", text, "--out", tmp_path / "mine.txt", *TINY
  )
  assert code == 2 and "there is a file of that name" in said


def test_resume_refuses_another_config_data_or_process(
  finished, text, capsys, tmp_path
):
  folder, _ = finished
  code, said = run(capsys, "--resume", folder, "--set", "num_experts=8")
  assert code == 2
  assert "has model.num_experts = 4, not 8. A checkpoint of another" in said
  code, said = run(capsys, "--resume", folder, "--steps", "7")
  assert code == 2 and "has training.steps = 6, not 7" in said
  code, said = run(capsys, "--resume", tmp_path)
  assert code == 2 and "no run is there (no config.json)" in said

  held = RunFolder(folder)
  code, said = run(capsys, "--resume", folder)
  held.close()
  assert code == 2 and "another process trains in this folder" in said

  file = folder / "config.json"
  good = file.read_text()
  file.write_text(good[:100])
  assert "config.json is damaged" in run(capsys, "--resume", folder)[1]
  # The file says four experts of width 4, the checkpoints another width.
  file.write_text(good.replace('"d_expert": 4', '"d_expert": 8'))
  code, said = run(capsys, "--resume", folder)
  assert code == 2
  assert "a checkpoint of another config: d_expert = 4 there and 8" in said
  file.write_text(good)
  changed = pathlib.Path(text)
  original = changed.read_text()
  changed.write_text(original + "!")
  code, said = run(capsys, "--resume", folder)
  changed.write_text(original)
  assert code == 2 and "is not what it was when that run began" in said


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--data", "/nowhere"], "--data /nowhere: no such file or folder"),
    (["--data", os.devnull], "is empty"),
    (["--sequence-length", "5000"], "a sequence of 5000 needs 5001"),
    (["--batch-size", "500"], "one batch of 500 sequences"),
    (["--set", "num_expert=3"], "unknown fields ['num_expert']"),
    (["--set", "num_experts"], "write it as FIELD=VALUE"),
    (["--set", "num_experts=abc"], "num_experts must be a static int"),
    (["--set", "activation=swish"], "activation must be one of"),
    (["--set", "vocab_size=100"], "it must be at least 256"),
    (["--set", "dtype=float99"], "float99"),
    (["--set", "implementation=mosaic"], "mosaic' cannot run this"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--learning-rate", "0"], "learning_rate must be above 0, got 0.0"),
    (["--evaluate-every", "0"], "--evaluate-every must be at least 1, got 0"),
    (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1"),
    (["--validation-batches", "0"], "--validation-batches must be at least 1"),
    (["--sample-tokens", "0"], "--sample-tokens must be at least 1, got 0"),
    (["--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
  ],
  ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_wrong_input_is_said_and_nothing_is_written(
  flags, message, text, capsys, tmp_path, unchecked
):
  out = tmp_path / "run"
  code, said = run(capsys, "--data", text, "--out", out, *TINY, *flags)
  assert code == 2
  assert said.startswith("error: ") and message in said
  assert said.count("\n") == 1
  assert not out.exists()
