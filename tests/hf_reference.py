"""What transformers computes, written to files: a program of its own.

  python tests/hf_reference.py write OUT CONFIGS.json
      for each family: OUT/family/{model,grads}/ and OUT/family/expected.npz
  python tests/hf_reference.py logits DIR OUT.npz [DIR OUT.npz ..]
      the logits of folders that somebody else wrote

It runs in a process of its own, so that any version of transformers, of any
Python, can be the reference. `grads` has the gradients under the names of the
weights: a parameter's values are replaced by its gradient and the model saved.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

# Wider than any sliding window of the tiny models.
LENGTH = 12
IS_FIVE = int(transformers.__version__.split(".")[0]) >= 5


def main(command, *arguments):
  warnings.simplefilter("ignore")
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  torch.set_num_threads(1)
  {"write": write, "logits": logits}[command](*map(Path, arguments))


def write(out, configs):
  for family, entries in json.loads(configs.read_text()).items():
    write_family(out / family, entries)
  write_deepseek_block(out / "deepseek_v3_block.npz")


def logits(*paths):
  for directory, out in zip(paths[::2], paths[1::2], strict=True):
    model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, **options()
    ).eval()
    with torch.no_grad():
      ids = input_ids(model.config.vocab_size)
      np.savez(out, logits=model(ids).logits.numpy())


def options():
  return {"attn_implementation": "eager"} | (
    {"experts_implementation": "eager"} if IS_FIVE else {}
  )


def input_ids(vocab_size):
  generator = torch.Generator().manual_seed(1)
  return torch.randint(0, vocab_size, (2, LENGTH), generator=generator)


def fill(module):
  generator = torch.Generator().manual_seed(2)
  for _, parameter in sorted(module.named_parameters()):
    parameter.data.normal_(0, 0.2, generator=generator)


def write_family(directory, entries):
  entries = dict(entries)
  config = transformers.AutoConfig.for_model(
    entries.pop("model_type"), **entries
  )
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, **options()
  ).eval()
  fill(model)
  model.save_pretrained(directory / "model")
  expected = forward(model)
  for _, parameter in model.named_parameters():
    # A matrix that no token met has none.
    grad = parameter.grad
    parameter.data = torch.zeros_like(parameter) if grad is None else grad
  model.save_pretrained(directory / "grads")
  np.savez(directory / "expected.npz", **expected)


def forward(model):
  """Runs the model and its backward; returns what it saw, as arrays."""
  expected = {}

  def record(name):
    def hook(module, inputs, output):
      output = output[0] if isinstance(output, tuple) else output
      expected[f"{name}_in"] = inputs[0].detach().numpy()
      expected[f"{name}_out"] = output.detach().numpy()

    return hook

  for i, layer in enumerate(model.model.layers):
    block = getattr(layer, "block_sparse_moe", None) or layer.mlp
    block.register_forward_hook(record(f"ffn_{i}"))
    if hasattr(layer, "shared_mlp"):
      layer.shared_mlp.register_forward_hook(record(f"shared_{i}"))
  ids = input_ids(model.config.vocab_size)
  has_losses = model.config.model_type != "jetmoe"
  output = model(ids, labels=ids, output_router_logits=has_losses)
  if has_losses:
    expected["aux_loss"] = output.aux_loss.detach().numpy()
    # What that loss is made of: (layers, T, E).
    expected["router_logits"] = np.stack(
      [scores.detach().numpy() for scores in output.router_logits]
    )
  # The loss without the balancing, which families weigh differently.
  loss = torch.nn.functional.cross_entropy(
    output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
  )
  loss.backward()
  return expected | {
    "input_ids": ids.numpy(),
    "version": np.array(transformers.__version__),
    "logits": output.logits.detach().numpy(),
    "loss": loss.detach().numpy(),
  }


def write_deepseek_block(path):
  """A router in groups with a selection bias, and a shared expert."""
  from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

  config = transformers.DeepseekV3Config(
    hidden_size=32, moe_intermediate_size=24, n_routed_experts=16,
    num_experts_per_tok=3, n_group=4, topk_group=2, n_shared_experts=2,
    routed_scaling_factor=2.5, norm_topk_prob=True,
  )  # fmt: skip
  if IS_FIVE:
    config._experts_implementation = "eager"
  block = deepseek.DeepseekV3MoE(config).eval()
  fill(block)
  generator = torch.Generator().manual_seed(3)
  x = torch.randn((2, LENGTH, 32), generator=generator)
  arrays = {"x": x.numpy(), "masks_with_infinity": np.array(IS_FIVE)}
  for name, parameter in block.named_parameters():
    arrays[name] = parameter.detach().numpy()
  # The bias is no parameter. Below -1 it makes every s + bias negative.
  for mean in (0.0, -1.5):
    bias = mean + 0.2 * torch.randn((16,), generator=generator)
    block.gate.e_score_correction_bias.data[:] = bias
    with torch.no_grad():
      arrays[f"bias_{mean}"], arrays[f"y_{mean}"] = (
        bias.numpy(),
        block(x).numpy(),
      )
  np.savez(path, **arrays)


if __name__ == "__main__":
  main(*sys.argv[1:])
