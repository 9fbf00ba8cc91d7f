"""The data, the loss, the train step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scattermoe_jax.models import ModelConfig, Transformer, data, training
from scattermoe_jax.models.training import (
  TrainConfig,
  cross_entropy,
  init_state,
  make_optimizer,
  make_train_step,
  total_loss,
)
from scattermoe_jax.models.transformer import ModelMetrics
from scattermoe_jax.nn import SMoEMetrics

MODEL = ModelConfig(
  vocab_size=11,
  d_model=16,
  num_layers=1,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  num_experts=4,
  d_expert=16,
  scoring="sigmoid",
  selection_bias=True,
)
TRAIN = TrainConfig(
  steps=40,
  batch_size=8,
  sequence_length=12,
  warmup_steps=5,
  learning_rate=2e-2,
  # The balance loss of parts of a batch is not that of the whole.
  balance_coef=0.0,
)


@functools.cache
def start(config=TRAIN):
  model, optimizer = Transformer(MODEL), make_optimizer(config)
  init = jax.jit(functools.partial(init_state, model, optimizer))
  state = init(jax.random.key(0))
  return model, state, jax.jit(make_train_step(model, optimizer, config))


def counting_batch(step, config=TRAIN):
  """Returns sequences that count up modulo 11 from random starts."""
  starts = np.random.default_rng(step).integers(0, 11, config.batch_size)
  rows = starts[:, None] + np.arange(config.sequence_length + 1)[None]
  return jnp.asarray(rows % 11, jnp.int32)


def test_training_learns_and_balances():
  _, state, train_step = start()
  losses, balances = [], []
  for step in range(TRAIN.steps):
    state, metrics = train_step(state, counting_batch(step))
    losses.append(float(metrics.loss))
    balances.append(float(metrics.balance))
  assert abs(losses[0] - np.log(11)) < 1.2
  assert losses[-1] < 0.1
  assert int(state.step) == TRAIN.steps
  # k = 2 is perfect balance, and 4 the worst: two experts take all.
  assert balances[-1] < 2.5


def test_accumulated_parts_step_like_the_whole_batch():
  batch = counting_batch(0)
  steps = {}
  for parts in (1, 4):
    _, state, train_step = start(dataclasses.replace(TRAIN, accumulate=parts))
    steps[parts] = train_step(state, batch)[1]
  for name in ("loss", "z", "grad_norm"):
    np.testing.assert_allclose(
      getattr(steps[4], name), getattr(steps[1], name), rtol=1e-5
    )
  np.testing.assert_array_equal(
    steps[4].routers.ffn.tokens_per_expert,
    steps[1].routers.ffn.tokens_per_expert,
  )


def test_total_loss_adds_the_router_losses_by_their_coefficients():
  model, state, _ = start()
  variables = {"params": state.params, "router_state": state.router_state}
  batch = counting_batch(0)
  config = dataclasses.replace(TRAIN, balance_coef=0.5, z_coef=0.25)
  loss = jax.jit(functools.partial(total_loss, model, config=config))
  total, metrics = loss(variables, batch)
  want = metrics.loss + 0.5 * metrics.balance + 0.25 * metrics.z
  np.testing.assert_allclose(total, want, rtol=1e-6)
  logits = jax.jit(model.apply)(variables, batch[:, :-1]).logits
  logits = np.asarray(logits, np.float64)
  log_z = np.log(np.exp(logits).sum(axis=-1))
  targets = np.asarray(batch)[:, 1:, None]
  chosen = np.take_along_axis(logits, targets, axis=-1)[..., 0]
  np.testing.assert_allclose(metrics.loss, (log_z - chosen).mean(), rtol=1e-6)
  certain = 100.0 * jax.nn.one_hot(batch, 11)
  assert float(cross_entropy(certain, batch)) == 0


def test_selection_bias_moves_against_the_load():
  _, state, train_step = start()
  state, metrics = train_step(state, counting_batch(0))
  load = np.asarray(metrics.routers.ffn.tokens_per_expert[0])
  bias = state.router_state["layer_0"]["ffn"]["router"]["selection_bias"]
  want = TRAIN.selection_bias_rate * np.sign(load.mean() - load)
  np.testing.assert_allclose(bias, want, rtol=1e-6)


def test_selection_biases_move_by_the_load_of_their_own_layer():
  # Two dense layers come first; as words, layer_10 comes before layer_2.
  names = [f"layer_{i}" for i in range(2, 11)]
  state = {name: {"ffn": {"bias": jnp.zeros(4)}} for name in names}
  busiest = [i % 4 for i in range(len(names))]
  load = 8 * jax.nn.one_hot(jnp.array(busiest), 4, dtype=jnp.int32)
  one = jnp.zeros(len(names))
  routers = ModelMetrics(
    SMoEMetrics(one, one, load, load.astype(one.dtype)), None
  )
  config = dataclasses.replace(TRAIN, selection_bias_rate=0.25)
  moved = training._balance(state, routers, config)
  for name, expert in zip(names, busiest, strict=True):
    want = np.where(np.arange(4) == expert, -0.25, 0.25)
    np.testing.assert_array_equal(moved[name]["ffn"]["bias"], want)


def test_steps_and_parts_have_a_jitter_each():
  # What jitter does to an update, as the first random number of its key.
  draw = lambda params, frozen, biases, batch, key: (jax.random.uniform(key),)
  batch, key = counting_batch(0), jax.random.key(3)
  state = start()[1]
  (total,) = training._accumulate(draw, state, batch, key, 4)
  expected = jnp.mean(jax.vmap(jax.random.uniform)(jax.random.split(key, 4)))
  np.testing.assert_allclose(total, expected, rtol=1e-6)

  model = Transformer(dataclasses.replace(MODEL, router_jitter=0.5))
  train_step = jax.jit(make_train_step(model, optax.sgd(0.0), TRAIN))
  state = state._replace(opt_state=optax.sgd(0.0).init(state.params))
  state, first = train_step(state, batch)
  # The biases moved by the load; nothing but the jitter is to differ.
  state = state._replace(router_state=start()[1].router_state)
  _, second = train_step(state, batch)
  assert first.loss != second.loss


def test_the_rate_warms_up_to_its_peak_and_falls_to_a_tenth():
  optimizer = make_optimizer(TRAIN)
  params, one = {"scale": jnp.zeros(())}, {"scale": jnp.ones(())}
  state, rates = optimizer.init(params), []
  with jax.numpy_dtype_promotion("standard"):
    update = jax.jit(optimizer.update)
    for _ in range(TRAIN.steps + 1):
      # Adam's update by a gradient that stays is the rate.
      updates, state = update(one, state, params)
      rates.append(-float(updates["scale"]))
  peak = TRAIN.learning_rate
  assert rates[0] == 0
  np.testing.assert_allclose(rates[TRAIN.warmup_steps], peak, rtol=2e-6)
  np.testing.assert_allclose(rates[-1], peak / 10, rtol=2e-6)
  assert max(rates) <= peak * (1 + 2e-6)


def test_the_reported_norm_is_of_the_gradient():
  model, state, train_step = start()
  batch, biases = counting_batch(0), state.router_state
  _, metrics = train_step(state, batch)

  def loss(params):
    variables = {"params": params, "router_state": biases}
    return total_loss(model, variables, batch, TRAIN)[0]

  grads = jax.tree.leaves(jax.jit(jax.grad(loss))(state.params))
  want = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads))
  np.testing.assert_allclose(metrics.grad_norm, want, rtol=1e-6)


def test_weight_decay_and_frozen_weights():
  optimizer = make_optimizer(dataclasses.replace(TRAIN, weight_decay=1.0))
  model, state, _ = start()

  @jax.jit
  def second_update(params):
    # The schedule starts at 0: the first update changes nothing.
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, opt_state = optimizer.update(zeros, optimizer.init(params), params)
    return optimizer.update(zeros, opt_state, params)[0]

  with jax.numpy_dtype_promotion("standard"):
    updates = second_update(state.params)
  moved = {
    path[-1].key
    for path, update in jax.tree_util.tree_leaves_with_path(updates)
    if np.any(update)
  }
  assert moved == {"embedding", "kernel", "w_gate_up", "w_out"}

  # Only a scale of the frozen weights is trained.
  def params_of(scale, frozen):
    return jax.tree.map(lambda w: w * scale, frozen)

  scale = jnp.float32(1)
  state = state._replace(
    params=scale,
    opt_state=optax.sgd(0.1).init(scale),
    frozen=state.params,
  )
  train_step = make_train_step(model, optax.sgd(0.1), TRAIN, params_of)
  after, _ = jax.jit(train_step)(state, counting_batch(0))
  assert float(after.params) != 1
  jax.tree.map(np.testing.assert_array_equal, after.frozen, state.frozen)
  # The folder of what is trained has no place for a bias that moved.
  jax.tree.map(
    np.testing.assert_array_equal, after.router_state, state.router_state
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"accumulate": 3}, "accumulate = 3 must divide batch_size = 8"),
    ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ({"balance_coef": np.nan}, "balance_coef must be at least 0, got nan"),
    ({"z_coef": -1.0}, "z_coef must be at least 0, got -1.0"),
    (
      {"selection_bias_rate": -1.0},
      "selection_bias_rate must be at least 0, got -1.0",
    ),
  ],
)
def test_train_config_is_checked(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TRAIN, **fields)


def test_batches_are_windows_and_a_function_of_seed_and_step():
  tokens = np.arange(100, dtype=np.uint8)
  batch = functools.partial(
    data.train_batch, tokens, batch_size=64, sequence_length=9
  )
  first = batch(seed=3, step=5)
  np.testing.assert_array_equal(first, batch(seed=3, step=5))
  assert (first != batch(seed=3, step=6)).any()
  assert (first != batch(seed=4, step=5)).any()
  assert first.dtype == np.int32
  np.testing.assert_array_equal(np.diff(first, axis=1), 1)
  every = np.concatenate([batch(seed=0, step=s) for s in range(40)])
  # Each window, from that of the first token to that of the last, comes up.
  assert set(every[:, 0]) == set(range(91)) and every.max() == 99
  # No two steps of any seeds, and hardly two rows, are the same.
  drawn = [batch(seed=i, step=j)[:, 0] for i in range(8) for j in range(8)]
  assert len(np.unique(drawn, axis=0)) == 64
  assert min(len(np.unique(starts)) for starts in drawn) > 30


def test_validation_covers_the_held_out_text():
  tokens = np.arange(100, dtype=np.uint8)
  batches = list(
    data.validation_batches(
      tokens, num_batches=3, batch_size=4, sequence_length=9
    )
  )
  assert [b.shape for b in batches] == [(4, 10)] * 3
  assert batches[0][0, 0] == 0 and batches[-1][-1, -1] == 99
  assert len(np.unique(np.concatenate(batches))) == 100


def test_corpus_of_a_folder_holds_out_whole_files(tmp_path):
  for i in range(32):
    (tmp_path / f"{i:02}.txt").write_text(chr(65 + i) * 3)
  (tmp_path / "picture.bin").write_bytes(b"\0\1\2")
  (tmp_path / ".hidden").write_text("no")
  (tmp_path / "test").mkdir()
  (tmp_path / "test" / "skipped.txt").write_text("no")
  corpus = data.load_corpus(tmp_path)
  assert corpus.validation.tobytes() == b"PPP" + b"```"
  assert corpus.train.size == 30 * 3
  assert not set(corpus.train.tolist()) & set(corpus.validation.tolist())
  assert "32 files" in corpus.description


def test_corpus_of_a_folder_is_sorted_and_its_text_alone(tmp_path):
  names = ["z.py", "test", "b/tests.txt", "b/a.txt", "a.txt"]
  hidden = [".git/head.txt", "b/.git/a.txt", "tests/a.txt", "b/__pycache__/a"]
  for name in names + hidden:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f"<{name}>" * 9)
  (tmp_path / "empty").write_bytes(b"")
  corpus = data.load_corpus(tmp_path)
  text = corpus.train.tobytes() + corpus.validation.tobytes()
  assert text.decode() == "".join(f"<{name}>" * 9 for name in sorted(names))


def test_corpus_of_sixteen_files_holds_out_the_last(tmp_path):
  texts = [bytes([65 + i]) * (40 - i) for i in range(16)]
  for i, text in enumerate(texts):
    (tmp_path / f"{i:02}").write_bytes(text)
  corpus = data.load_corpus(tmp_path)
  assert corpus.validation.tobytes() == texts[15]
  assert corpus.train.tobytes() == b"".join(texts[:15])


def test_corpus_of_a_file_holds_out_its_end(tmp_path):
  file = tmp_path / "text"
  file.write_bytes(bytes(range(160)))
  corpus = data.load_corpus(file)
  assert corpus.train.tolist() == list(range(150))
  assert corpus.validation.tolist() == list(range(150, 160))


def test_corpus_of_the_standard_library_is_python():
  corpus = data.load_corpus()
  assert corpus.train.size > 5_000_000
  assert corpus.train.size > 8 * corpus.validation.size > 0
  assert b"import os\n" in corpus.train.tobytes()
  again = data.load_corpus()
  np.testing.assert_array_equal(corpus.train, again.train)


def test_unigram_bits_equal_a_loop(tmp_path):
  file = tmp_path / "text"
  file.write_bytes(b"abracadabra" * 20)
  corpus = data.load_corpus(file)
  train, held_out = corpus.train.tolist(), corpus.validation.tolist()
  bits = [-np.log2((train.count(b) + 1) / (len(train) + 256)) for b in held_out]
  np.testing.assert_allclose(data.unigram_bits(corpus), np.mean(bits))
  assert data.uniform_bits() == 8


def test_bytes_round_trip():
  assert data.decode(data.encode("naïve λ")) == "naïve λ"
  assert data.decode(np.array([97, 255], np.int32)) == "a\ufffd"


def write_nothing(path):
  path.write_bytes(b"")
  return path


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda p: p / "missing", "missing: no such file or folder"),
    (lambda p: write_nothing(p / "empty"), "empty: the file is empty"),
    (lambda p: write_nothing(p / "empty").parent, "its files are empty"),
    (lambda p: (p / "bare").mkdir() or p / "bare", "holds no text file"),
  ],
  ids=["missing", "empty-file", "empty-files", "empty-folder"],
)
def test_wrong_data_is_refused(tmp_path, make, message):
  with pytest.raises(data.DataError, match=message):
    data.load_corpus(make(tmp_path))


@pytest.mark.parametrize(
  ("batch_size", "sequence_length", "message"),
  [
    (1, 2000, "the train part has 938 bytes; .* needs 2001"),
    (1, 63, "the held-out part has 62 bytes; .* needs 64"),
    (20, 61, "one batch of 20 sequences needs 1240"),
  ],
)
def test_data_that_does_not_fit_is_refused(
  tmp_path, batch_size, sequence_length, message
):
  (tmp_path / "text").write_bytes(b"0123456789" * 100)
  corpus = data.load_corpus(tmp_path / "text")
  with pytest.raises(data.DataError, match=message):
    data.check_lengths(
      corpus, batch_size=batch_size, sequence_length=sequence_length
    )


def test_data_that_just_fits_is_taken():
  random = np.random.default_rng(0)
  tokens = random.integers(0, 256, 24, np.uint8)
  corpus = data.Corpus(tokens, tokens[:8], "text")
  fits = {"batch_size": 3, "sequence_length": 7}
  data.check_lengths(corpus, **fits)
  # And then all of it can be drawn.
  (only,) = data.validation_batches(corpus.validation, num_batches=1, **fits)
  np.testing.assert_array_equal(only, np.tile(tokens[:8], (3, 1)))
  one = data.train_batch(tokens[:8], seed=0, step=1, **fits)
  np.testing.assert_array_equal(one, only)
  for part in ("train", "validation"):
    short = dataclasses.replace(corpus, **{part: getattr(corpus, part)[:-1]})
    with pytest.raises(data.DataError):
      data.check_lengths(short, **fits)
