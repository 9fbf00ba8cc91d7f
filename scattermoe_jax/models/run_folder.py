"""A run's folder: its config, metrics, checkpoints; nothing is overwritten.

config.json         what was asked for, and a fingerprint of the data
metrics.jsonl       one line a step, and one a validation
checkpoints/NAME/   the last two of each model, by orbax
loss.png  experts.png  sample.txt  summary.json
export/ or adapters/            the trained weights, see `weights`
"""

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from scattermoe_jax.models.training import TrainState


class RunError(ValueError):
  """A run folder cannot be used; the message says why and what would do."""


class RunFolder:
  """The folder of one run, locked by the process that trains in it.

  Attributes:
    path: where it is.

  Raises:
    RunError: if another process trains in it.
  """

  def __init__(self, path: Path):
    self.path = path
    self._lock = _lock(path)
    self._metrics = (path / "metrics.jsonl").open("a")

  @classmethod
  def create(cls, path: Path, config: dict[str, Any]) -> "RunFolder":
    """Returns a new folder, with config.json in it.

    Raises:
      RunError: if something is there already.
    """
    if path.exists() and not path.is_dir():
      raise RunError(f"--out {path}: there is a file of that name.")
    if path.exists() and any(path.iterdir()):
      hint = "name another"
      if (path / "config.json").exists():
        hint = f"go on with that run by --resume {path}, or " + hint
      raise RunError(f"--out {path}: the folder is in use; {hint}.")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return cls(path)

  @staticmethod
  def read_config(path: Path) -> dict[str, Any]:
    """Returns what is in config.json.

    Raises:
      RunError: if there is none, or it is damaged.
    """
    file = path / "config.json"
    if not file.exists():
      raise RunError(f"--resume {path}: no run is there (no config.json).")
    try:
      return json.loads(file.read_text())
    except json.JSONDecodeError as error:
      raise RunError(
        f"--resume {path}: config.json is damaged: {error}."
      ) from (error)

  def log(self, **values: Any) -> None:
    """Appends a line to metrics.jsonl."""
    self._metrics.write(json.dumps(values) + "\n")
    self._metrics.flush()

  def metrics(self, model: str) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl about one model."""
    lines = (self.path / "metrics.jsonl").read_text().splitlines()
    return [m for m in map(json.loads, lines) if m["model"] == model]

  def forget_after(self, model: str, step: int) -> None:
    """Drops the lines about a model past a step: they will come again.

    A run that was killed had gone further than its last checkpoint.
    """
    file = self.path / "metrics.jsonl"
    kept = [
      line
      for line in file.read_text().splitlines(keepends=True)
      if line.endswith("\n")
      and ((m := json.loads(line))["model"] != model or m["step"] <= step)
    ]
    self._metrics.close()
    new = file.with_suffix(".new")
    new.write_text("".join(kept))
    new.rename(file)
    self._metrics = file.open("a")

  def checkpoints(self, model: str, model_config: dict[str, Any]):
    """Returns the `Checkpoints` of one model."""
    return Checkpoints(
      self.path / "checkpoints" / model, json.loads(json.dumps(model_config))
    )

  def close(self) -> None:
    """Lets another process train here."""
    self._metrics.close()
    self._lock.close()


class Checkpoints:
  """The checkpoints of one model, each with the config that it belongs to."""

  def __init__(self, path: Path, model_config: dict[str, Any]):
    self._path = path
    self._config = model_config
    self._manager = ocp.CheckpointManager(
      path.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
      ),
    )

  @property
  def latest_step(self) -> int | None:
    """The step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: TrainState) -> None:
    """Writes a checkpoint; it appears whole or not at all."""
    self._manager.save(
      int(state.step),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        config=ocp.args.JsonSave(self._config),
      ),
    )

  def restore(self, like: TrainState) -> TrainState:
    """Returns the newest state, in the shapes and shardings of `like`.

    Raises:
      RunError: if it belongs to a model of another config.
    """
    step = self.latest_step
    stored = self._manager.restore(
      step, args=ocp.args.Composite(config=ocp.args.JsonRestore())
    )["config"]
    if stored != self._config:
      names = sorted(stored.keys() | self._config.keys())
      differing = ", ".join(
        f"{name} = {stored.get(name)} there and {self._config.get(name)} here"
        for name in names
        if stored.get(name) != self._config.get(name)
      )
      raise RunError(
        f"{self._path}/{step}: a checkpoint of another config: {differing}."
      )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
    )
    return TrainState(**restored["state"])

  def close(self) -> None:
    """Ends the manager's threads."""
    self._manager.close()


def fingerprint(*parts) -> str:
  """Returns a hash of some arrays' bytes."""
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part.tobytes())
  return digest.hexdigest()[:16]


def _lock(path: Path):
  file = (path / "lock").open("w")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.close()
    raise RunError(f"{path}: another process trains in this folder.") from None
  return file
