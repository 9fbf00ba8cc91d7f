"""Strict settings for every test: promotion, ranks, warnings, eight devices.

On a machine with a GPU, the tests marked `gpu` run with
`JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu`.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On a CPU, compiling is most of a test. Without LLVM's optimisations it takes
# half to four fifths of the time; what is computed is the same but for
# rounding, and tests that measure that are marked `optimised`.
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  # What was compiled once, by whichever test or process of a test, is found
  # again. JAX does not write whole files at once: each worker has a folder.
  _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import pytest

# Modules of half a minute or so. Tests run by module: these come first, or one
# worker would still be at the last of them when the others are done.
_LONGEST = {
  f"tests.test_{name}"
  for name in (
    "attention",
    "backends",
    "benchmarks",
    "decoder",
    "finetuning",
    "generate",
    "lora",
    "mesh",
    "models",
    "mosaic",
    "mosaic_choice_sums",
    "mosaic_group_xty",
    "nn_transforms",
    "notebooks",
    "parallel_linear",
    "sharding",
    "smoe_mlp",
    "train_program",
    "training",
    "triton",
  )
}

_IS_QUICK = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run; a first call compiles, so no deadline.
hypothesis.settings.register_profile(
  "repeatable", derandomize=True, deadline=None, max_examples=40
)
hypothesis.settings.load_profile("repeatable")


def enable_x64():
  """Returns a context manager for double precision, on every JAX."""
  if hasattr(jax, "enable_x64"):
    return jax.enable_x64(True)
  return jax.experimental.enable_x64()


def on_cpu():
  """Returns a context manager: arrays made in it live on the CPU."""
  return jax.default_device(jax.devices("cpu")[0])


def poison_memory() -> None:
  """Leaves NaN where the next results will stand, on a GPU."""
  if _has_gpu():
    garbage = jnp.full((2**28,), jnp.nan, jnp.float32)
    garbage.block_until_ready()
    garbage.delete()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Compiles as users do for the tests that are marked `optimised`."""
  is_quick = _IS_QUICK and item.get_closest_marker("optimised") is None
  if is_quick != jax.config.read("jax_disable_most_optimizations"):
    jax.config.update("jax_disable_most_optimizations", is_quick)
    # What was compiled before must not be found again.
    jax.clear_caches()


@pytest.fixture
def x64():
  """Runs a test in double precision."""
  with enable_x64():
    yield


@pytest.fixture
def unchecked():
  """Switches the runtime type checker off: what a user sees without it."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", before)


def pytest_collection_modifyitems(items):
  """Begins with what takes longest; skips the GPU's tests without a GPU."""
  items.sort(key=lambda item: item.module.__name__ not in _LONGEST)
  if not any("gpu" in item.keywords for item in items) or _has_gpu():
    return
  for item in items:
    if "gpu" in item.keywords:
      item.add_marker(pytest.mark.skip(reason="no GPU that JAX can use"))


def _has_gpu() -> bool:
  return any(device.platform == "gpu" for device in jax.devices())
