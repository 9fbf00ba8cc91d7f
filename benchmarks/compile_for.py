"""Do the Triton kernels compile for GPUs that are not here?

  python -m benchmarks.compile_for [--devices A100 L4] [--dtypes bfloat16]
      [--shapes L odd decode]

XLA and ptxas compile every product of a layer to machine code for a device that
is only described, and refuse what its shared memory does not hold: the six of
`benchmarks.bench_ops`, and what `parallel_linear` has besides, results that are
scattered (up_scattered) and a weight gradient of rows all grouped (dw_grouped).
Needs JAX with its CUDA plugin, but no GPU; runs nothing.
"""

import argparse
import contextlib
import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import layer_products
from benchmarks.compiling import Job
from benchmarks.shapes import Shape
from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import triton
from scattermoe_jax.kernels.triton.tiles import (
  group_xty_config,
  scatter2scatter_config,
  shared_limit,
)

CARDS = {
  "A100": Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108),
  "L4": Device("gpu", "NVIDIA L4", (8, 9), 58),
  "H200": Device("gpu", "NVIDIA H200", (9, 0), 132),
  "B200": Device("gpu", "NVIDIA B200", (10, 0), 148),
  "RTX_PRO_6000": Device(
    "gpu", "NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 188
  ),
}
SHAPES = {
  shape.name: shape
  for shape in (
    Shape("L", 32768, 4096, 1024, 128, 8),  # large tiles
    Shape("odd", 3000, 600, 52, 8, 2),  # widths off every block
    Shape("decode", 64, 4096, 1024, 128, 8),  # few rows per expert
  )
}


@functools.cache
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


def products(shape: Shape) -> dict[str, layer_products.Product]:
  """Returns what is compiled, by name."""
  of_mlp = layer_products.products(shape)
  others = (
    of_mlp["up"]._replace(op="up_scattered", y_grouped=False),
    of_mlp["dw_up"]._replace(
      op="dw_grouped", operands=("rows", "dh"), x_grouped=True
    ),
  )
  return of_mlp | {product.op: product for product in others}


def backend_for(
  card: Device, shape: Shape, product: layer_products.Product, dtype
) -> layer_products.WithConfig:
  """Returns the backend with the blocks that it would choose on a card."""
  itemsize = jnp.dtype(dtype).itemsize
  if product.is_weight_gradient:
    config = group_xty_config(
      *product.widths,
      itemsize,
      capability=card.capability,
      is_gathered=not (product.x_grouped and product.y_grouped),
    )
  else:
    config = scatter2scatter_config(
      shape.num_rows,
      shape.num_experts,
      *product.widths,
      itemsize,
      capability=card.capability,
      num_cores=card.num_cores,
      grouped_in=product.x_grouped,
    )
  return layer_products.WithConfig(triton, config)


def compile_for(card: Device, shape: Shape, dtype) -> dict[str, str | None]:
  """Returns why each product does not compile, None where it does."""
  data, routing = jax.eval_shape(
    lambda: (
      layer_products.arrays(shape),
      layer_products.routing_of(shape, "even"),
    )
  )
  found: dict[str, str | None] = {}
  for name, product in products(shape).items():
    backend = backend_for(card, shape, product, dtype)
    function = functools.partial(layer_products.compute, backend, product)
    operands = [
      jax.ShapeDtypeStruct(data[operand].shape, dtype)
      for operand in product.operands
    ]
    job = Job(function, (*operands, routing))
    try:
      lower_for(card, job).compile()
      found[name] = None
    except Exception as error:
      found[name] = str(error).splitlines()[0]
  return found


def lower_for(card: Device, job: Job) -> jax.stages.Lowered:
  """Returns a call, lowered for a machine with one such card."""
  mesh = jax.sharding.Mesh(topology(card).devices, ("x",))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
    job.arguments,
  )
  jitted = jax.jit(job.function, out_shardings=everywhere)
  with _described(card):
    traced = jitted.trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",))


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
