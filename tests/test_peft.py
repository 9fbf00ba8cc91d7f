"""The same logits as PEFT on transformers, of adapters that either one wrote.

The reference runs in a process of its own (`peft_reference`), with the Pythons
of `test_hf_parity`.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scattermoe_jax import checkpoints
from scattermoe_jax.checkpoints.config_json import config_from_entries
from scattermoe_jax.models import Transformer
from scattermoe_jax.nn import lora
from tests.families import FAMILY_ENTRIES, random_variables

LIMIT = 1e-5  # Of float32, relative to the largest logit.
RANK = 3

_PYTHONS = os.environ.get("SCATTERMOE_JAX_HF_PYTHONS", sys.executable)
_PROGRAM = Path(__file__).with_name("peft_reference.py")
_INPUT_IDS = jnp.arange(2 * 12, dtype=jnp.int32).reshape(2, 12)


def run(python, *arguments, check=True):
  return subprocess.run(
    [python, _PROGRAM, *map(str, arguments)],
    check=check,
    env=os.environ | {"HF_HUB_OFFLINE": "1"},
    stderr=None if check else subprocess.DEVNULL,
  )


@functools.cache
def has_peft(python):
  return run(python, "has", check=False).returncode == 0


@functools.cache
def is_five(python):
  code = "import transformers; print(transformers.__version__)"
  return int(subprocess.check_output([python, "-c", code])[:1]) >= 5


@pytest.fixture(scope="module", params=_PYTHONS.split(":"))
def python(request):
  if not has_peft(request.param):
    pytest.skip(f"{request.param} has no PEFT with transformers, the reference")
  return request.param


@functools.cache
def model(family):
  entries = FAMILY_ENTRIES[family]
  config = config_from_entries(entries, "config.json")
  return config, random_variables(config)["params"]


@functools.cache
def logits_of(family):
  apply = Transformer(model(family)[0]).apply
  return jax.jit(lambda params: apply({"params": params}, _INPUT_IDS).logits)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
  directory = tmp_path_factory.mktemp("bases")
  for family in FAMILY_ENTRIES:
    config, params = model(family)
    checkpoints.save(
      directory / family, config, {"params": params}, family=family
    )
  return directory


def assert_same_logits(got, expected, plain, what):
  got, expected, plain = (
    np.asarray(a, np.float64) for a in (got, expected, plain)
  )
  scale = np.max(np.abs(expected))
  error = np.max(np.abs(got - expected)) / scale
  print(f"{what:36} relative error of the logits {error:.1e}")
  assert error <= LIMIT, (what, error)
  assert np.max(np.abs(expected - plain)) > 0.05 * scale, what


def random_adapters(params, targets):
  adapters = lora.init_adapters(
    jax.random.key(0), params, rank=RANK, targets=targets
  )
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(random.normal(0, 0.5, x.shape), x.dtype), adapters
  )


def test_peft_reads_what_we_write(python, bases, tmp_path):
  # Granite's experts have names of transformers 5 in our folders.
  old = () if is_five(python) else ("granitemoe", "granitemoeshared", "gpt_oss")
  arguments, ours = [], {}
  for family in FAMILY_ENTRIES:
    if family in old:
      continue
    _, params = model(family)
    targets = lora.EXPERT_WEIGHTS
    if family == "jetmoe":
      targets = (*targets, "kernel")  # Its mixture of attention.
    choices = {"both": targets, "out": ("w_out",)}
    for name, chosen in choices.items():
      adapters = random_adapters(params, chosen)
      folder = tmp_path / f"{family}_{name}"
      checkpoints.save_adapters(folder, adapters, family=family, base="x")
      arguments += [bases / family, folder, folder.with_suffix(".npz")]
      merged = lora.with_adapters(params, adapters)
      ours[family, name] = logits_of(family)(merged)
  run(python, "read", *arguments)
  for (family, name), logits in ours.items():
    out = np.load(tmp_path / f"{family}_{name}.npz")
    plain = logits_of(family)(model(family)[1])
    assert_same_logits(logits, out["logits"], plain, f"{family} {name}")


# What people write for PEFT, by family and version of transformers.
_PARAMETERS = {"target_modules": [], "r": RANK, "lora_alpha": 2 * RANK}
_FUSED = {
  **_PARAMETERS,
  "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
_JETMOE = {
  **_PARAMETERS,
  "target_parameters": [
    "mlp.input_linear.weight",
    "mlp.output_linear.weight",
    "self_attention.experts.input_linear.weight",
    "self_attention.experts.output_linear.weight",
  ],
}
_GRANITE_4 = {
  **_PARAMETERS,
  "use_rslora": True,
  "target_parameters": ["input_linear.weight", "output_linear.weight"],
}
_GRANITE_4_SHARED = {
  **_PARAMETERS,
  "target_parameters": [
    f"block_sparse_moe.{name}_linear.weight" for name in ("input", "output")
  ],
}


def _split(*names):
  return {"target_modules": list(names), "r": RANK, "lora_alpha": 2 * RANK}


CONFIGS = {
  5: {
    "mixtral": [
      _FUSED,
      _split("w1", "w2", "w3"),
      _FUSED | {"target_parameters": ["experts.down_proj"]},
    ],
    "olmoe": [_FUSED, _split("gate_proj", "up_proj", "down_proj")],
    "qwen3_moe": [_FUSED | {"use_rslora": True}],
    "granitemoe": [_FUSED],
    "granitemoeshared": [_FUSED],
    "jetmoe": [_JETMOE],
    "gpt_oss": [
      _FUSED,
      _FUSED | {"target_parameters": ["experts.gate_up_proj"]},
    ],
  },
  4: {
    "mixtral": [_split("w1", "w2", "w3"), _split("w1", "w2")],
    "qwen3_moe": [_split(r"experts.0.gate_proj", "experts.3.down_proj")],
    "granitemoe": [_GRANITE_4],
    "granitemoeshared": [_GRANITE_4_SHARED],
    "jetmoe": [_JETMOE],
    "gpt_oss": [_FUSED],
  },
}


def test_we_read_what_peft_writes(python, bases, tmp_path):
  entries = [
    {
      "family": family,
      "base": str(bases / family),
      "adapter": str(tmp_path / f"{family}_{i}"),
      "out": str(tmp_path / f"{family}_{i}.npz"),
      "config": config,
    }
    for family, configs in CONFIGS[5 if is_five(python) else 4].items()
    for i, config in enumerate(configs)
  ]
  (tmp_path / "configs.json").write_text(json.dumps(entries))
  run(python, "write", tmp_path / "configs.json")
  for entry in entries:
    family = entry["family"]
    _, params = model(family)
    adapters = checkpoints.load_adapters(
      entry["adapter"], params, family=family
    )
    logits = logits_of(family)
    got = logits(lora.with_adapters(params, adapters))
    expected = np.load(entry["out"])["logits"]
    what = Path(entry["adapter"]).name
    assert_same_logits(got, expected, logits(params), what)
