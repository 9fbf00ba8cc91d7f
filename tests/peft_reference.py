"""What PEFT on transformers does with adapters: a program of its own.

  python tests/peft_reference.py has
      succeeds where PEFT can be imported
  python tests/peft_reference.py read BASE ADAPTER OUT.npz [BASE ..]
      the logits of models with adapters that somebody else wrote
  python tests/peft_reference.py write CONFIGS.json
      for each {"base", "adapter", "out", "config"}: an adapter with random
      factors, its folder, and the logits of the model with it

See `hf_reference` for why it is a process of its own.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np


def main(command, *arguments):
  import peft  # noqa: F401

  if command == "has":
    return
  warnings.simplefilter("ignore")
  {"read": read, "write": write}[command](*map(Path, arguments))


def base_model(directory):
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  torch.set_num_threads(1)
  is_five = int(transformers.__version__.split(".")[0]) >= 5
  experts = {"experts_implementation": "eager"} if is_five else {}
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, attn_implementation="eager", **experts
  ).eval()


def save_logits(model, out):
  import torch

  ids = torch.arange(2 * 12).reshape(2, 12)
  with torch.no_grad():
    np.savez(out, logits=model(ids).logits.numpy())


def read(*paths):
  import peft

  for base, adapter, out in zip(*[iter(paths)] * 3, strict=True):
    model = peft.PeftModel.from_pretrained(base_model(base), adapter)
    check_all_read(model, adapter)
    save_logits(model, out)


def check_all_read(model, adapter):
  """PEFT only warns of tensors for which it finds no place."""
  import peft

  file = adapter / "adapter_model.safetensors"
  state = peft.utils.load_peft_weights(str(adapter), device="cpu")
  result = peft.set_peft_model_state_dict(model, state)
  unexpected = list(result.unexpected_keys)
  assert not unexpected, f"{file}: PEFT has no place for {unexpected}"
  # What the file did not give stays at PEFT's start, where B is zero.
  given = [b for n, b in model.named_parameters() if "lora_B" in n]
  assert given and all((b != 0).any() for b in given), file


def write(configs):
  import peft
  import torch

  for entry in json.loads(configs.read_text()):
    config = peft.LoraConfig(task_type="CAUSAL_LM", **entry["config"])
    model = peft.get_peft_model(base_model(entry["base"]), config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
      if "lora_" in name:
        parameter.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(entry["adapter"])
    save_logits(model, entry["out"])


if __name__ == "__main__":
  main(*sys.argv[1:])
