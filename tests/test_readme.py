"""The README's code runs, its links lead somewhere, it stays short."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks(text):
  return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_code_runs_from_top_to_bottom(capsys):
  names = {}
  blocks = python_blocks(README)
  assert len(blocks) >= 2
  for block in blocks:
    exec(compile(block, "README.md", "exec"), names)
  assert names["y"].shape == (512, 64)
  assert "xla: runs" in capsys.readouterr().out


def test_the_first_example_is_twelve_lines_of_code():
  code = [line for line in python_blocks(README)[0].splitlines() if line]
  assert len(code) <= 12


def test_it_is_read_in_one_sitting():
  assert len(README.splitlines()) < 150


@pytest.mark.parametrize("target", ["demo", "test", "test-oldest", "check"])
def test_the_commands_exist(target):
  assert f"make {target}" in README
  assert f"\n{target}:" in (ROOT / "Makefile").read_text()
