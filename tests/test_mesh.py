"""A program trains on a mesh as it does on one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from scattermoe_jax.models.config import ModelConfig
from scattermoe_jax.models.mesh import Placement, parse_mesh
from scattermoe_jax.models.training import (
  TrainConfig,
  init_state,
  make_optimizer,
  make_train_step,
)
from scattermoe_jax.models.transformer import Transformer

CONFIG = ModelConfig(
  d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
  num_experts=8, d_expert=8, d_shared=8,
)  # fmt: skip
TRAINING = TrainConfig(steps=8, batch_size=8, sequence_length=12)


def batch(step):
  rng = np.random.default_rng(step)
  return rng.integers(0, 256, (8, 13)).astype(np.int32)


def train(mesh, steps, restored=None):
  """Returns the state to store and (loss, balance, loads) of each step."""
  placement = Placement.of(mesh)
  with placement.context():
    model = Transformer(CONFIG, mesh_axes=placement.axes)
    optimizer = make_optimizer(TRAINING)
    state = placement.init(
      model,
      functools.partial(init_state, model, optimizer),
      jax.random.key(0),
    )
    if restored is not None:
      state = placement.from_store(
        restored(placement.to_store(state)), like=state
      )
    step = placement.jit_step(
      make_train_step(model, optimizer, TRAINING), state
    )
    seen = []
    for i in steps:
      state, metrics = step(state, placement.put(batch(i)))
      loads = metrics.routers.ffn.tokens_per_expert
      seen.append((metrics.loss, metrics.balance, np.asarray(loads)))
    experts = state.params["layer_0"]["ffn"]["experts"]
    places = {name: leaf.sharding for name, leaf in experts.items()}
    return placement.to_store(state), seen, places


def test_training_goes_on_from_mesh_to_mesh_as_on_one_device(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  alone, want, _ = train(None, range(4))
  half, first, places = train("data=2,expert=4", range(2))
  assert places["w_out"].shard_shape((8, 8, 16)) == (2, 8, 16)

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "half", half._asdict())
    checkpointer.wait_until_finished()

    def restored(like):
      like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
      tree = checkpointer.restore(tmp_path / "half", like._asdict())
      return type(like)(**tree)

    end, second, places = train(
      "fsdp=2,expert=2,tensor=2", range(2, 4), restored
    )
  assert places["w_gate_up"].shard_shape((8, 16, 2, 8)) == (4, 8, 2, 4)

  for (loss, balance, loads), expected in zip(
    first + second, want, strict=True
  ):
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(balance, expected[1], rtol=1e-5)
    np.testing.assert_array_equal(loads, expected[2])
  # Adam divides by the root of the second moment: near-zero gradients turn
  # rounding into whole steps, so parameters agree to a step's fraction.
  for got, expected in zip(
    jax.tree.leaves(end.params), jax.tree.leaves(alone.params), strict=True
  ):
    assert got.shape == expected.shape
    got, expected = np.asarray(got), np.asarray(expected)
    scale = np.max(np.abs(expected))
    assert np.max(np.abs(got - expected)) <= 1e-3 * scale


def test_parse_mesh_reads_roles_and_sizes():
  assert parse_mesh("data=2, expert=4") == {"data": 2, "expert": 4}


@pytest.mark.parametrize(
  "text", ["expert", "expert=0", "expert=two", "pipe=2", "data=2,data=2"]
)
def test_parse_mesh_says_what_it_wants(text):
  with pytest.raises(
    ValueError, match="should be ROLE=DEVICES, each role once"
  ):
    parse_mesh(text)


def test_placement_says_what_a_mesh_lacks():
  with pytest.raises(ValueError, match="needs 16 devices; JAX has 8"):
    Placement.of("expert=16")


@pytest.mark.parametrize(
  "batch_size, fields, message",
  [
    (6, {}, "batch_size = 6 is not a multiple of the 4 devices"),
    (8, {"num_experts": 7}, "num_experts = 7 is not a multiple of expert=2"),
    (8, {"d_model": 15}, "d_model = 15 is not a multiple of fsdp=2"),
    (8, {"d_expert": 9}, "d_expert = 9 is not a multiple of tensor=2"),
    (8, {"attention": "moa", "attention_top_k": 1}, "runs on one device"),
  ],
)
def test_placement_says_what_it_cannot_split(batch_size, fields, message):
  config = dataclasses.replace(CONFIG, **fields)
  placement = Placement.of("fsdp=2,expert=2,tensor=2")
  placement.check(8, [CONFIG, CONFIG.dense_twin()])
  with pytest.raises(ValueError, match=message):
    placement.check(batch_size, [config])
