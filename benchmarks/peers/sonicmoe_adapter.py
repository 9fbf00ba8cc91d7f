"""SonicMoE (Guo et al., 2025): its autograd functions, after the router.

Its products choose their tiles by measuring all there are when a shape comes
first: seconds, where the tiles were compiled before (QUACK_CACHE_DIR), minutes
where not. The sum of k rows would compile dozens of Triton kernels for each
shape; here it chooses among the widths of a row that one block may hold, all k
rows at once.
"""

import jax.numpy as jnp

from benchmarks.peers import Step, torch_step

_NOTE = (
  "tiles by its own tuner, among all; sums of k rows among four; replayed as a "
  "CUDA graph"
)


def build(shape, data, direction: str) -> Step:
  """Returns the step: sort of the ids, up-projection, down-projection.

  Its weights are (2n, d, E) and (d, n, E) with the expert outermost in memory;
  `concat_layout` puts the gate half first, as ours.
  """
  import torch
  from sonicmoe.enums import ActivationType
  from sonicmoe.functional import (
    TC_topk_router_metadata_triton,
    _DownProjection,
    _UpProjection,
  )

  x, gates, dy, ids = map(
    torch_step.to_torch, (data.x, data.gates, data.dy, data.expert_ids)
  )
  w_in, w_out = (
    torch_step.to_torch(jnp.swapaxes(w, 1, 2)).permute(1, 2, 0)
    for w in (data.w_in, data.w_out)
  )
  rows, experts, k = shape.num_rows, shape.num_experts, shape.top_k
  _prune_sums()

  def forward():
    empty = lambda size: torch.empty(size, dtype=torch.int32, device=x.device)
    frequency, offsets = empty(experts), empty(experts + 1)
    gather, scatter, reverse = empty(rows), empty(rows), empty(rows)
    TC_topk_router_metadata_triton(
      ids, experts, frequency, offsets, gather, scatter, reverse
    )
    orders = (gather, scatter, reverse, None, False)
    inference = direction == "forward"
    a, h = _UpProjection.apply(
      x, w_in, None, offsets, rows, k, *orders, ActivationType.SWIGLU,
      inference, True,
    )  # fmt: skip
    return _DownProjection.apply(
      a, h, w_out, None, gates, offsets, shape.num_tokens, k, *orders,
      ActivationType.SWIGLU,
    )  # fmt: skip

  given = [x, gates, w_in, w_out]
  step = torch_step.make_step(forward, given, dy, direction, as_graph=True)
  return step._replace(note=_NOTE)


def _prune_sums() -> None:
  """Leaves of the tiles of the sum of k rows those of all k rows at once."""
  from sonicmoe.functional.reduction_over_k_gather import (
    token_gather_sum_kernel,
  )

  def prune(configs, nargs, *, MAX_K, **_):
    k = 1 << (MAX_K - 1).bit_length()
    return [
      config
      for config in configs
      if config.kwargs["BLOCK_K"] == k
      and 512 <= config.kwargs["BLOCK_H"] <= 4096
      and config.num_warps == (8 if k * config.kwargs["BLOCK_H"] > 8192 else 4)
    ]

  token_gather_sum_kernel.early_config_prune = prune
