"""What a person sees while a model trains: a live bar, or plain lines."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

# Seconds between two lines where no bar can be drawn.
_LINE_INTERVAL = 10.0


class Reporter:
  """Shows progress on a terminal as a bar, elsewhere as a line now and then.

  Attributes:
    console: where everything is printed.
  """

  def __init__(self, console: Console):
    self.console = console

  @contextlib.contextmanager
  def training(self, title: str, start: int, steps: int) -> Iterator["Meter"]:
    """Shows the steps of one model, from `start` to `steps`."""
    if not self.console.is_terminal:
      yield Meter(title, steps, None, self.console)
      return
    bar = Progress(
      TextColumn("[bold]{task.description}"),
      BarColumn(bar_width=None),
      MofNCompleteColumn(),
      TextColumn("{task.fields[status]}"),
      TimeRemainingColumn(),
      console=self.console,
    )
    with bar:
      bar.add_task(title, total=steps, completed=start, status="compiling")
      yield Meter(title, steps, bar, self.console)

  def loading(self, done: int, total: int) -> None:
    """Shows the bytes of weights that are loaded."""
    if done == total or self.console.is_terminal:
      self.console.print(
        f"loaded {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB of weights",
        end="\n" if done == total else "\r",
      )


class Meter:
  """The progress of one model; made by `Reporter.training`."""

  def __init__(self, title, steps, bar, console):
    self._title = title
    self._steps = steps
    self._bar = bar
    self._console = console
    self._last_line = -float("inf")
    self._rate = None
    self._validation = ""

  def step(self, step: int, bits: float, tokens_per_second: float) -> None:
    """Shows that a step is done, with its loss in bits."""
    status = (
      f"loss {bits:.3f}{self._validation} · {tokens_per_second:,.0f} tokens/s"
    )
    if self._bar is not None:
      self._bar.update(self._bar.task_ids[0], completed=step, status=status)
      return
    now = time.monotonic()
    if step == self._steps or now - self._last_line >= _LINE_INTERVAL:
      self._last_line = now
      left = self._time_left(step, now)
      self._console.print(
        f"{self._title}: step {step}/{self._steps} · {status}{left}",
        highlight=False,
        soft_wrap=True,
      )

  def validation(self, bits: float) -> None:
    """Shows the newest loss on held-out text, in bits."""
    self._validation = f" · held out {bits:.3f}"

  def _time_left(self, step, now):
    if self._rate is None:
      self._rate = (step, now)  # The first step compiled; start from here.
      return ""
    first_step, start = self._rate
    if step == first_step:
      return ""
    seconds = (now - start) / (step - first_step) * (self._steps - step)
    return f" · {int(seconds) // 60}:{int(seconds) % 60:02d} left"
