"""Do the Triton kernels compile for GPUs that are not here?

  python -m benchmarks.compile_for [--devices A100 L4] [--dtypes bfloat16]
      [--shapes L odd decode]

XLA and ptxas compile every product of a layer to machine code for a device that
is only described, and refuse what its shared memory does not hold. Needs JAX
with its CUDA plugin; runs nothing.
"""

import argparse
import contextlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import triton
from scattermoe_jax.kernels.triton.tiles import (
  group_xty_config,
  scatter2scatter_config,
  shared_limit,
)
from scattermoe_jax.routing import Routing

CARDS = {
  "A100": Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108),
  "L4": Device("gpu", "NVIDIA L4", (8, 9), 58),
  "H200": Device("gpu", "NVIDIA H200", (9, 0), 132),
  "B200": Device("gpu", "NVIDIA B200", (10, 0), 148),
  "RTX_PRO_6000": Device(
    "gpu", "NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 188
  ),
}
# (T, d, n, E, k): large tiles; widths off every block; few rows per expert.
SHAPES = {
  "L": (32768, 4096, 2048, 128, 8),
  "odd": (3000, 600, 104, 8, 2),
  "decode": (64, 4096, 2048, 128, 8),
}


def topology(card: Device) -> topologies.TopologyDescription:
  """Returns the description of a machine with one such card.

  Raises:
    SystemExit: if this JAX cannot compile for it.
  """
  major, minor = card.capability
  shared = shared_limit(card.capability)
  config = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32
      threads_per_core_limit: 2048 fpus_per_core: 128
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared}
      shared_memory_per_core: {shared + 1024} core_count: {card.num_cores}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535 clock_rate_ghz: 1.5
      memory_bandwidth: 1000000000000 device_memory_size: 24000000000
      l2_cache_size: 40000000
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    runtime_version: {{ major: 12 minor: 8 patch: 0 }}
    dnn_version_info {{ major: 9 minor: 7 }}
    platform_name: "CUDA" device_description_str: "{card.kind}"
  """
  try:
    return topologies.get_topology_desc(
      "gpu", "cuda", target_config=config, topology="1x1x1"
    )
  except NotImplementedError as error:
    raise SystemExit(
      "compile_for: this JAX has no CUDA plugin, which is what compiles; "
      "install scattermoe_jax with '.[cuda13]' or '.[cuda12]'."
    ) from error


def products(card: Device, sizes: tuple[int, ...], dtype) -> dict:
  """Returns (function, shapes of its operands) of a layer's five, by name."""
  tokens, d, n, experts, top_k = sizes
  rows, itemsize = tokens * top_k, jnp.dtype(dtype).itemsize

  def multiply(d_in, d_out, **layout):
    config = scatter2scatter_config(
      rows,
      experts,
      d_in,
      d_out,
      itemsize,
      capability=card.capability,
      num_cores=card.num_cores,
      grouped_in=layout.get("grouped_in", False),
    )
    return lambda x, w, routing: triton.scatter2scatter(
      x, w, routing, config=config, **layout
    )

  def transpose(d_in, d_out, **layout):
    config = group_xty_config(
      d_in,
      d_out,
      itemsize,
      capability=card.capability,
      is_gathered="x_grouped" not in layout,
    )
    return lambda x, y, routing: triton.group_xty(
      x, y, routing, config=config, **layout
    )

  grouped = dict(grouped_in=True, grouped_out=True)
  return {
    "up": (multiply(d, n, grouped_out=True), (tokens, d), (experts, d, n)),
    "down": (multiply(n, d, grouped_in=True), (rows, n), (experts, n, d)),
    "dx": (
      multiply(n, d, transpose_w=True, **grouped), (rows, n), (experts, d, n)
    ),
    "dw": (transpose(d, n, y_grouped=True), (tokens, d), (rows, n)),
    "dw_grouped": (
      transpose(d, n, x_grouped=True, y_grouped=True), (rows, d), (rows, n)
    ),
  }  # fmt: skip


def compile_for(
  card: Device, sizes: tuple[int, ...], dtype
) -> dict[str, str | None]:
  """Returns why each product does not compile, None where it does."""
  devices = topology(card).devices
  mesh = jax.sharding.Mesh(devices, ("x",))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=everywhere
  )
  tokens, _, _, experts, top_k = sizes
  ids = [(tokens * top_k,), (tokens * top_k,), (tokens, top_k), (experts,)]
  routing = Routing(*(struct(shape, jnp.int32) for shape in ids))
  found: dict[str, str | None] = {}
  for name, (function, *shapes) in products(card, sizes, dtype).items():
    jitted = jax.jit(function, out_shardings=everywhere)
    operands = [struct(shape, dtype) for shape in shapes]
    try:
      with _described(card):
        traced = jitted.trace(*operands, routing)
        lowered = traced.lower(lowering_platforms=("cuda",))
      lowered.compile()
      found[name] = None
    except Exception as error:
      found[name] = str(error).splitlines()[0]
  return found


def _described(card: Device):
  try:
    device = jax.sharding.AbstractDevice(card.kind, card.num_cores, "gpu")
  except (AttributeError, TypeError):  # before JAX 0.9, lowering asks for none
    return contextlib.nullcontext()
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def main(arguments: Sequence[str] | None = None) -> int:
  """Compiles and prints; returns how many products do not compile."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--devices", nargs="+", choices=CARDS, default=[*CARDS])
  parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
  parser.add_argument(
    "--dtypes", nargs="+", default=["bfloat16", "float16", "float32"]
  )
  options = parser.parse_args(arguments)
  failures = 0
  for device in options.devices:
    for shape in options.shapes:
      for dtype in options.dtypes:
        start = time.perf_counter()
        found = compile_for(CARDS[device], SHAPES[shape], dtype)
        reasons = {name: why for name, why in found.items() if why}
        failures += len(reasons)
        print(
          f"{device:<12} {shape:<6} {dtype:<8} "
          f"{len(found) - len(reasons)} of {len(found)} compile "
          f"({time.perf_counter() - start:.1f} s) {reasons or ''}",
          flush=True,
        )
  return failures


if __name__ == "__main__":
  raise SystemExit(main() > 0)
