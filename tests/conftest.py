"""Strict settings for every test: promotion, ranks, warnings, eight devices.

On a machine with a GPU, the tests marked `gpu` run with
`JAX_PLATFORMS=cuda,cpu python -m pytest -m gpu`.
"""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On a CPU, compiling is most of a test. Without LLVM's optimisations it takes
# four fifths of the time; what is computed is the same but for rounding, and
# modules that measure that are marked `optimised`.
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


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_marked(request):
  """Compiles as users do in the modules that are marked `optimised`."""
  is_optimised = request.node.get_closest_marker("optimised") is not None
  if not (_IS_QUICK and is_optimised):
    yield
    return
  # What was compiled before must not be found again, nor afterwards.
  jax.config.update("jax_disable_most_optimizations", False)
  jax.clear_caches()
  yield
  jax.config.update("jax_disable_most_optimizations", True)
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
  """Skips the GPU's tests, with a reason, where there is no GPU."""
  if not any("gpu" in item.keywords for item in items) or _has_gpu():
    return
  for item in items:
    if "gpu" in item.keywords:
      item.add_marker(pytest.mark.skip(reason="no GPU that JAX can use"))


def _has_gpu() -> bool:
  return any(device.platform == "gpu" for device in jax.devices())
