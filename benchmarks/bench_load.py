"""How long does a checkpoint take to load, and how much memory beside itself?

A synthetic folder of Mixtral's family, about 2 GB in bfloat16 and in shards,
loads in a process of its own, as it is and cast to float32. Memory is the peak
of the resident set during the load less what the process held before it (JAX,
its imports), over the model's size in the target dtype. Then it is saved back.

  python -m benchmarks.bench_load --write

The folder was just written, so the times are those of files in the page cache;
the processor's seconds tell how much of a wall clock others took.
Each process checks one tensor of every shard against the file, bit for bit
after the cast, before it reports. It fails if the promise, a peak of at most
1.3 times the model, is broken.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from benchmarks import timing
from scattermoe_jax import checkpoints
from scattermoe_jax.checkpoints import plan, reader, writer
from scattermoe_jax.models import Transformer

PROMISE = 1.3
SHARD_BYTES = 400 * 10**6
NUM_LAYERS = 8
# Of Mixtral-8x7B's proportions: 2.0 GB in bfloat16 with eight layers.
ENTRIES = {
  "model_type": "mixtral",
  "vocab_size": 32000,
  "hidden_size": 1024,
  "intermediate_size": 4608,
  "num_hidden_layers": NUM_LAYERS,
  "num_attention_heads": 16,
  "num_key_value_heads": 4,
  "num_local_experts": 8,
  "num_experts_per_tok": 2,
  "torch_dtype": "bfloat16",
}


def main() -> None:
  """Writes the folder, measures, prints and stores."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--samples", type=int, default=5)
  parser.add_argument("--write", action="store_true", help="store the records")
  parser.add_argument("--child", nargs=2, metavar=("DIRECTORY", "DTYPE"))
  flags = parser.parse_args()
  if flags.child:
    directory, dtype = flags.child
    print(json.dumps(load_and_save(pathlib.Path(directory), dtype)))
    return
  records = measure(flags.samples)
  for record in records:
    report(record)
    assert record["load_peak_ratio"] <= PROMISE, record
  if flags.write:
    timing.merge_records(
      timing.results_path("bench_load", "cpu"), records, key=("dtype",)
    )


def measure(samples: int, entries=None) -> list[dict]:
  """Returns one record per target dtype, of `samples` processes each."""
  with tempfile.TemporaryDirectory() as temporary:
    directory = pathlib.Path(temporary) / "model"
    num_bytes = write_folder(directory, entries or ENTRIES)
    runs: dict[str, list[dict]] = {"bfloat16": [], "float32": []}
    for _ in range(samples):
      for dtype, taken in runs.items():
        taken.append(in_new_process(directory, dtype))
    shards = len(list(directory.glob("*.safetensors")))
  return [
    summarise(dtype, taken, num_bytes, shards) for dtype, taken in runs.items()
  ]


def write_folder(directory: pathlib.Path, entries: dict) -> int:
  """Writes random weights, a tensor at a time; returns their bytes."""
  directory.mkdir()
  writer.write_json(directory / "config.json", entries)
  config = checkpoints.read_config(directory)
  input_ids = jax.ShapeDtypeStruct((1, 1), np.int32)
  variables = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), input_ids
  )
  shapes = {
    path: leaf.shape for path, leaf in flatten_dict(variables, sep="/").items()
  }
  random = np.random.default_rng(0)
  tensors = []
  for path, pieces in plan.make_plan("mixtral", shapes).items():
    for piece in pieces:
      shape = piece.file_shape(shapes[path])
      make = lambda shape=shape: random.standard_normal(
        shape, np.float32
      ).astype(ml_dtypes.bfloat16)
      dtype = np.dtype(ml_dtypes.bfloat16)
      tensors.append(writer.TensorToWrite(piece.theirs, dtype, shape, make))
  writer.write_tensors(directory, tensors, max_shard_bytes=SHARD_BYTES)
  return sum(tensor.num_bytes for tensor in tensors)


def in_new_process(directory: pathlib.Path, dtype: str) -> dict:
  """Returns what `load_and_save` returns, of a fresh interpreter."""
  command = [sys.executable, "-m", "benchmarks.bench_load", "--child"]
  done = subprocess.run(
    [*command, str(directory), dtype],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout)


def load_and_save(directory: pathlib.Path, dtype: str) -> dict:
  """Returns the costs of one load, and of saving the model again."""
  jax.block_until_ready(jax.numpy.zeros(1))  # JAX itself is no part of it.
  with Cost() as load:
    config, variables = checkpoints.load(directory, dtype=dtype)
    jax.block_until_ready(variables)
  check(directory, variables, dtype)
  with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
    with Cost() as save:
      checkpoints.save(f"{temporary}/again", config, variables, like=directory)
  return {
    "load": load.as_dict(),
    "save": save.as_dict(),
    "model_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(variables)),
  }


class Cost:
  """Wall clock, processor's time and growth of memory of a `with` block.

  Memory is the kernel's own peak, set back at the start: it misses nothing.
  """

  def __enter__(self):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    self._held = _status_bytes("VmRSS")
    self._start = time.perf_counter(), time.process_time()
    return self

  def __exit__(self, *_):
    wall, cpu = self._start
    self.wall_s = time.perf_counter() - wall
    self.cpu_s = time.process_time() - cpu
    self.peak_bytes = _status_bytes("VmHWM") - self._held

  def as_dict(self) -> dict:
    """Returns the three numbers."""
    return {
      "wall_s": self.wall_s,
      "cpu_s": self.cpu_s,
      "peak_bytes": self.peak_bytes,
    }


def _status_bytes(key: str) -> int:
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(f"{key}:"):
      return int(line.split()[1]) * 1024
  raise RuntimeError(f"/proc/self/status has no {key}.")


def check(directory: pathlib.Path, variables, dtype: str) -> None:
  """Raises unless a tensor of every shard is, cast, what the file holds."""
  arrays = flatten_dict(variables, sep="/")
  shapes = {path: array.shape for path, array in arrays.items()}
  stored = reader.read_folder(directory)
  seen = set()
  for path, pieces in plan.make_plan("mixtral", shapes).items():
    for piece in pieces:
      tensor = stored[piece.theirs]
      if tensor.path not in seen:
        seen.add(tensor.path)
        np.testing.assert_array_equal(
          np.asarray(piece.view(np.asarray(arrays[path]))),
          tensor.read().astype(dtype),
          err_msg=piece.theirs,
        )


def summarise(
  dtype: str, runs: list[dict], num_bytes: int, shards: int
) -> dict:
  """Returns the record of one target dtype."""
  size = runs[0]["model_bytes"]
  record = {
    "dtype": dtype,
    "file_bytes": num_bytes,
    "shards": shards,
    "model_bytes": size,
    "cores": os.cpu_count(),
    "samples": len(runs),
  }
  for part in ("load", "save"):
    for clock in ("wall_s", "cpu_s"):
      times = sorted(run[part][clock] for run in runs)
      record[f"{part}_{clock}"] = {
        "median": statistics.median(times),
        "p20": times[round(0.2 * (len(times) - 1))],
        "p80": times[round(0.8 * (len(times) - 1))],
      }
    peak = max(run[part]["peak_bytes"] for run in runs)
    record[f"{part}_peak_ratio"] = peak / size
  return record


def report(record: dict) -> None:
  """Prints one line."""
  wall, cpu = record["load_wall_s"], record["load_cpu_s"]
  print(
    f"{record['file_bytes'] / 1e9:.2f} GB in {record['shards']} shards as "
    f"{record['dtype']:8} · load {wall['median']:.2f} s "
    f"({wall['p20']:.2f}-{wall['p80']:.2f}), of a core {cpu['median']:.2f} s · "
    f"peak {record['load_peak_ratio']:.3f} of the model · save "
    f"{record['save_wall_s']['median']:.2f} s, of a core "
    f"{record['save_cpu_s']['median']:.2f} s, "
    f"{record['save_peak_ratio']:.3f} beside the model",
    flush=True,
  )


if __name__ == "__main__":
  main()
