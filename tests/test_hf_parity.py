"""The same numbers as transformers, for tiny random models of each family.

The reference runs in a process of its own (`hf_reference`): with the Python of
the tests, or with every one that SCATTERMOE_JAX_HF_PYTHONS names, separated by
colons, to compare with other versions of transformers.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from scattermoe_jax import checkpoints
from scattermoe_jax.checkpoints.reader import read_folder
from scattermoe_jax.models import Transformer
from scattermoe_jax.models.training import cross_entropy
from scattermoe_jax.nn import Router, SMoEBlock
from tests.families import FAMILY_ENTRIES

# Relative to the largest value. Float32 sums in another order gave up to 3.1e-7
# and 2.1e-6 (docs/checkpoints.md).
LOGITS, GRADS = 1e-5, 1e-4

_PYTHONS = os.environ.get("SCATTERMOE_JAX_HF_PYTHONS", sys.executable)
_PROGRAM = Path(__file__).with_name("hf_reference.py")

pytestmark = pytest.mark.skipif(
  _PYTHONS == sys.executable
  and not all(map(importlib.util.find_spec, ("torch", "transformers"))),
  reason="needs torch and transformers, the reference",
)


def relative_error(got, expected):
  got, expected = (np.asarray(a, np.float64) for a in (got, expected))
  assert got.shape == expected.shape
  return np.max(np.abs(got - expected)) / np.max(np.abs(expected))


class Reference:
  """Folders and arrays that one version of transformers wrote."""

  def __init__(self, python, directory):
    self.python, self.directory = python, directory
    (directory / "configs.json").write_text(json.dumps(FAMILY_ENTRIES))
    self.run("write", directory, directory / "configs.json")

  def run(self, *arguments):
    subprocess.run(
      [self.python, _PROGRAM, *map(str, arguments)],
      check=True,
      env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )

  def expected(self, family):
    return np.load(self.directory / family / "expected.npz")

  def load(self, family, which="model"):
    return checkpoints.load(self.directory / family / which, dtype="float32")

  def logits(self, directories):
    """Logits of folders that we wrote."""
    outs = [directory.with_suffix(".npz") for directory in directories]
    pairs = [
      str(p) for pair in zip(directories, outs, strict=True) for p in pair
    ]
    self.run("logits", *pairs)
    return [np.load(out)["logits"] for out in outs]


@pytest.fixture(scope="module", params=_PYTHONS.split(":"))
def reference(request, tmp_path_factory):
  return Reference(request.param, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("family", FAMILY_ENTRIES)
def test_logits_gradients_and_blocks_equal_transformers(
  family, reference, capsys
):
  config, variables = reference.load(family)
  expected = reference.expected(family)
  input_ids = jnp.asarray(expected["input_ids"].astype(np.int32))
  model = Transformer(config)

  def loss_fn(params):
    output = model.apply({"params": params}, input_ids)
    loss = cross_entropy(output.logits[:, :-1], input_ids[:, 1:])
    return loss, (output, loss)

  grads, (output, loss) = jax.jit(jax.grad(loss_fn, has_aux=True))(
    variables["params"]
  )
  errors = {
    "logits": relative_error(output.logits, expected["logits"]),
    "loss": relative_error(loss, expected["loss"]),
    "grads": gradient_error(grads, reference.load(family, "grads")[1]),
    "blocks": blocks_error(model, variables, input_ids, expected),
  }
  if "aux_loss" in expected:
    metrics = output.metrics.ffn
    probs = metrics.mean_probs
    if are_gates(expected["router_logits"], config.top_k):
      probs = softmax_of_gates(model, variables, input_ids)
    errors["aux_loss"] = relative_error(
      model_balance_loss(metrics.tokens_per_expert, probs), expected["aux_loss"]
    )
  with capsys.disabled():
    version = str(expected["version"])
    errors_read = (f"{name} {error:.1e}" for name, error in errors.items())
    print(f"\n{version:7} {family:16}", *errors_read)
  limits = dict.fromkeys(errors, LOGITS) | {"grads": GRADS}
  assert all(errors[name] <= limits[name] for name in errors), errors


def gradient_error(grads, expected):
  """The largest error of an array, relative to that array's largest value."""
  grads = flatten_dict(grads, sep="/")
  expected = flatten_dict(expected["params"], sep="/")
  assert grads.keys() == expected.keys()
  return max(relative_error(grads[path], expected[path]) for path in grads)


def blocks_error(model, variables, input_ids, expected):
  """Each mixture alone: given transformers' input of it, its output."""
  outputs = {}

  def swap_input(next_function, args, kwargs, context):
    is_block = isinstance(context.module, SMoEBlock)
    if not is_block or context.method_name != "__call__":
      return next_function(*args, **kwargs)
    layer = context.module.path[0].removeprefix("layer_")
    y, metrics = next_function(
      jnp.asarray(expected[f"ffn_{layer}_in"]), **kwargs
    )
    outputs[layer] = y
    return y, metrics

  with nn.intercept_methods(swap_input):
    model.apply(variables, input_ids)
  assert outputs

  def expected_output(layer, shape):
    y = expected[f"ffn_{layer}_out"].reshape(shape)
    shared = f"shared_{layer}_out"  # A module beside the block in transformers.
    return y + expected[shared] if shared in expected else y

  return max(
    relative_error(y, expected_output(layer, y.shape))
    for layer, y in outputs.items()
  )


def model_balance_loss(tokens_per_expert, mean_probs):
  """E sum_e f_e P_e with f and P averaged over layers before the product."""
  shares = np.asarray(tokens_per_expert, np.float64).mean(axis=0) / (2 * 12)
  probs = np.asarray(mean_probs, np.float64).mean(axis=0)
  return len(shares) * np.sum(shares * probs)


def are_gates(router_logits, top_k):
  """Whether what transformers took for logits is gates, zero where not chosen.

  The router of gpt-oss in 4.57 returns these in the logits' place, so that the
  balancing loss there sees softmax(gates), not softmax(logits).
  """
  sums = np.asarray(router_logits, np.float64).sum(axis=-1)
  chosen = np.count_nonzero(router_logits, axis=-1)
  return bool(np.all(chosen <= top_k) and np.all(np.abs(sums - 1) < LOGITS))


def softmax_of_gates(model, variables, input_ids):
  """The means of softmax(gates) by layer: our gates, zero where not chosen."""
  means = []

  def record(next_function, args, kwargs, context):
    output = next_function(*args, **kwargs)
    if isinstance(context.module, Router) and (
      context.method_name == "__call__"
    ):
      gates = np.zeros(output.logits.shape)
      np.put_along_axis(
        gates, np.asarray(output.expert_ids), np.asarray(output.gates), axis=-1
      )
      powers = np.exp(gates)
      means.append((powers / powers.sum(axis=-1, keepdims=True)).mean(axis=0))
    return output

  with nn.intercept_methods(record):
    model.apply(variables, input_ids)
  return means


def test_transformers_loads_what_we_save(reference, tmp_path):
  folders = []
  for family in FAMILY_ENTRIES:
    source = reference.directory / family / "model"
    config, variables = checkpoints.load(source)
    # Once by the family's name alone, once like the folder, in shards.
    options = {"family": family}
    if family in ("granitemoe", "gpt_oss"):
      options = {"like": source, "max_shard_bytes": 30_000}
    folders.append(tmp_path / family)
    checkpoints.save(folders[-1], config, variables, **options)
    assert_same_tensors(folders[-1], source)
  all_logits = reference.logits(folders)
  for family, logits in zip(FAMILY_ENTRIES, all_logits, strict=True):
    error = relative_error(logits, reference.expected(family)["logits"])
    assert error <= 1e-6, family  # The same weights; threads sum differently.


def assert_same_tensors(folder, other):
  """The files hold the same names and the same bits."""
  tensors, others = read_folder(folder), read_folder(other)
  assert tensors.keys() == others.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(
      tensor.read(), others[name].read(), err_msg=name
    )


def test_deepseek_v3_blocks_equal_transformers(reference):
  arrays = np.load(reference.directory / "deepseek_v3_block.npz")
  gate_up, down = experts_of(arrays)
  shared = {
    "w_gate_up": np.concatenate(
      [arrays[f"shared_experts.{n}_proj.weight"].T for n in ("gate", "up")], -1
    ),
    "w_out": arrays["shared_experts.down_proj.weight"].T,
  }
  block = SMoEBlock(
    num_experts=16, top_k=3, d_expert=24, scoring="sigmoid", num_groups=4,
    top_groups=2, scale=2.5, use_selection_bias=True, num_shared_experts=2,
  )  # fmt: skip
  # Before version 5, closed groups were masked with 0, not with -inf: open
  # experts of a negative s + bias then lose against closed ones.
  means = [0.0, -1.5] if arrays["masks_with_infinity"] else [0.0]
  for mean in means:
    variables = {
      "params": {
        "router": {"kernel": arrays["gate.weight"].T},
        "experts": {"w_gate_up": gate_up, "w_out": down},
        "shared": shared,
      },
      "router_state": {"router": {"selection_bias": arrays[f"bias_{mean}"]}},
    }
    variables = jax.tree.map(jnp.asarray, variables)
    y, _ = block.apply(variables, jnp.asarray(arrays["x"]))
    error = relative_error(y, arrays[f"y_{mean}"])
    assert error <= LOGITS, (mean, error)


def experts_of(arrays):
  """(E, d, 2n) and (E, n, d), however transformers names its modules."""
  if "experts.gate_up_proj" in arrays:
    names = ("experts.gate_up_proj", "experts.down_proj")
    return tuple(arrays[name].transpose(0, 2, 1) for name in names)

  def stack(name):
    weights = [arrays[f"experts.{e}.{name}.weight"].T for e in range(16)]
    return np.stack(weights)

  gate_up = np.concatenate([stack("gate_proj"), stack("up_proj")], axis=-1)
  return gate_up, stack("down_proj")
