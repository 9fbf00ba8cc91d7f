"""The ops under a mesh: data, FSDP, tensor and expert parallel.

  role     splits                          moves forward   | backward
  data     tokens                          nothing         | dw summed
  fsdp     tokens; d of every weight       w gathered      | dw reduce-scattered
  tensor   d_expert of every weight        y summed        | dx, dgates summed
  expert   tokens; the experts             x gathered,     | dy gathered,
                                           y reduce-       | dx reduce-
                                           scattered       | scattered

Each role is played by any number of mesh axes, and roles multiply. On each
device an op runs as it would on one, over that device's experts: a row whose
expert is elsewhere is 'not here' (`Routing`) and costs nothing.

With x, gates, expert_ids and weights as for `scattermoe_jax.smoe_mlp`:

  axes = sharding.MeshAxes(data="data", expert="expert")
  with jax.set_mesh(jax.make_mesh((2, 4), ("data", "expert"))):
    y = sharding.smoe_mlp(x, gates, expert_ids, w_in, w_out, axes=axes)
"""

from scattermoe_jax.sharding.axes import MeshAxes
from scattermoe_jax.sharding.gates import join_gate, split_gate
from scattermoe_jax.sharding.linear import parallel_linear
from scattermoe_jax.sharding.local import GATHERED, own_parts_saveable
from scattermoe_jax.sharding.mlp import smoe_mlp

__all__ = [
  "GATHERED",
  "MeshAxes",
  "join_gate",
  "own_parts_saveable",
  "parallel_linear",
  "smoe_mlp",
  "split_gate",
]
