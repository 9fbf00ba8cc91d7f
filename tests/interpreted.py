"""The Triton backend in Pallas' interpreter, for machines without a GPU."""

import functools
import types

from scattermoe_jax.kernels import composed, triton
from scattermoe_jax.kernels.triton.tiles import TritonConfig

# Small, so that small problems have whole tiles, short tiles and several.
CONFIG = TritonConfig(16, 16, 16, 2, 4)


def triton_interpreted(config: TritonConfig = CONFIG) -> types.ModuleType:
  """Returns a module with the contract's functions, run in the interpreter."""
  backend = types.ModuleType("triton_interpreted")
  backend.check = lambda problem: None
  backend.scatter2scatter = functools.partial(
    triton.scatter2scatter, config=config, interpret=True
  )
  backend.group_xty = functools.partial(
    triton.group_xty, config=config, interpret=True
  )
  forms = composed.fused_forms(backend.scatter2scatter, backend.group_xty)
  vars(backend).update(forms._asdict())
  return backend
