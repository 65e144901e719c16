"""Methods of one branch: what holds for every composition, and one of them trained to its end.

Tests go over all names of the registry, so that a new composition is tested here by being named.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets
from crn_jax import parallel, state, train
from crn_jax.convert import backbone, whole
from crn_jax.input_pipeline.tokenizers import base
from crn_jax.methods import single
from crn_jax.methods.base import TrainState
from crn_jax.models.composition.registry import COMPOSITIONS
from crn_jax.models.single import Single
from crn_jax.workdir import history
from crn_jax.workdir.checkpoint import CheckpointReader
from tests import tiny
from tests import tiny_model as small

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCH = 8

# Parameters that no gradient reaches: a constant before BatchNorm is taken away by it.
_OF_TEXT = "['composition']['text_vector']['fc']['bias']"
CONSTANT = {
  "concat": {_OF_TEXT, "['composition']['hidden']['bias']"},
  "tirg": {_OF_TEXT},
  "tirg_map": {_OF_TEXT},
  "val": {"['composition']['text_bn']['bias']"},
}


def config(name: str):
  return small.config(f"{name},resnet50", depths=(1, 1, 1))


def gradient(name: str):
  """Parameters of a method -> (their gradient, on one batch in training; unused modules)."""
  c = config(name)
  method, variables = small.model(c), small.variables(c)
  batch = small.batch(c, BATCH)
  normalized = {k: method.preprocessing.normalize(batch[k]) for k in ("reference", "target")}

  class Keep:  # An optimizer that keeps the gradient.
    @staticmethod
    def update(grads, state, params):
      return jax.tree.map(jnp.zeros_like, grads), grads

  state = TrainState(0, variables["params"], variables["batch_stats"], {"single": ()}, {})
  state, metrics = jax.jit(lambda s, b: method.update(Keep, s, b))(state, batch | normalized)
  return state.opt_state["single"], metrics, method.unused_parameters()


def test_every_composition_has_a_preset():
  methods = {name: p for name, p in presets.PRESETS.items() if name in COMPOSITIONS}
  assert set(methods) == set(COMPOSITIONS)


@pytest.mark.parametrize(
  ("weights", "expected"),
  [
    ({}, {"vector_scale"}),
    ({"joint": 0.0}, {"vector_scale"}),
    ({"correction": 0.0}, {"vector_scale"}),
    ({"correction": 0.0, "joint": 0.0}, {"vector_scale", "correcting"}),
  ],
)
def test_a_network_for_pairs_rests_without_its_losses(weights, expected):
  """It would be decayed otherwise. DCNet's queries have a length of their own."""
  c = config("dcnet")
  c.loss.update(weights)
  assert small.model(c).unused_parameters() == expected


def test_only_a_network_that_learnt_to_rank_ranks_pairs():
  """An ablation without its loss is ranked by vectors alone."""
  found = {name for name in COMPOSITIONS if small.model(config(name)).scores_pairs}
  assert found == {"dcnet"}
  c = config("dcnet")
  c.loss.correction = 0.0
  assert not small.model(c).scores_pairs


def test_dcnet_learns_from_its_three_losses():
  """The sum of the terms with their weights, each of which is that of scores against the batch."""
  _, metrics, _ = gradient("dcnet")
  terms = {name.removeprefix("single/"): float(value) for name, value in metrics.items()}
  expected = terms["classification"] + terms["correction"] + 0.5 * terms["joint"]
  assert terms["total"] == pytest.approx(expected, rel=1e-6)
  assert min(terms["classification"], terms["correction"], terms["joint"]) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_gradient_reaches_every_parameter(name):
  grads, metrics, unused = gradient(name)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))
  largest = max(np.abs(x).max() for x in jax.tree.leaves(grads))
  for path, value in jax.tree_util.tree_leaves_with_path(grads):
    where = jax.tree_util.keystr(path)
    idle = path[0].key in unused or where in CONSTANT.get(name, ())
    # Rounding of what would be zero is far below a millionth of the largest.
    assert (np.abs(value).max() > 1e-6 * largest) != idle, where


def answers(name: str, tokens, mask):
  c = config(name)
  method, variables = small.model(c), small.variables(c)
  pictures = method.preprocessing.normalize(small.batch(c, BATCH)["reference"])

  @jax.jit
  def ask(variables, pictures, tokens, mask):
    references, vectors = method.encode_images(variables, pictures)
    constants = method.constants(variables)
    return vectors, method.compose(variables, constants, references, tokens, mask)

  return (method.vector_dim, *ask(variables, pictures, tokens, mask))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_vectors_have_unit_length_and_padding_takes_no_part(name):
  batch = small.batch(config(name), BATCH)
  width, vectors, queries = answers(name, batch["tokens"], batch["token_mask"])
  for found in (vectors, queries.composed, queries.text_only):
    assert found.shape == (BATCH, width)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
  other = np.where(batch["token_mask"], batch["tokens"], 7)
  _, _, padded = answers(name, other, batch["token_mask"])
  np.testing.assert_allclose(padded.composed, queries.composed, atol=1e-6)
  reads = np.abs(answers(name, other[::-1], batch["token_mask"][::-1])[2].composed
                 - queries.composed).max() > 1e-3  # fmt: skip
  assert reads == COMPOSITIONS[name].uses_text


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_an_update_does_not_depend_on_the_number_of_devices(name):
  """Losses and moved statistics on one device and four, dropout included: 1e-5 of the largest."""
  c = config(name)
  found = []
  for devices in (1, 4):
    dp = parallel.DataParallel.create("shard_map", jax.devices()[:devices])
    method = small.model(c, parallel.AXIS)
    tx = method.optimizer(1, 1)
    step = dp.map(
      functools.partial(method.train_step, tx), outputs=(parallel.REPLICATED, parallel.REPLICATED)
    )
    start = jax.tree.map(np.asarray, small.state(c, tx))
    state, metrics = step(dp.replicate(start), dp.shard(small.batch(c, BATCH)))
    found.append(dp.fetch((state.batch_stats, metrics)))
  for path, one in jax.tree_util.tree_leaves_with_path(found[0]):
    several = functools.reduce(lambda tree, key: tree[key.idx if hasattr(key, "idx") else key.key],
                               path, found[1])  # fmt: skip
    # BatchNorm's gradient is a difference of sums over the batch: digits cancel.
    tolerance = 1e-4 if "grad_norm" in jax.tree_util.keystr(path) else 1e-5
    assert np.abs(one - several).max() <= tolerance * np.abs(one).max(), path


def test_vectors_of_levels_weigh_the_same():
  found = single.join((np.array([[3.0, 4.0]]), np.array([[0.0, 0.1, 0.0]])))
  np.testing.assert_allclose(found, np.array([[0.6, 0.8, 0.0, 1.0, 0.0]]) / np.sqrt(2), rtol=1e-6)


def test_logits_are_cosines_times_the_square_of_the_vectors_length():
  """Vo et al. normalise both vectors to a learned length: 4 at first."""
  c = config("image_only")
  method, variables = small.model(c), small.variables(c)
  queries, targets = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
  length = variables["params"]["single"]["vector_scale"]
  terms = method._terms((queries,), (targets,), {}, length)
  unit = [4 * x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, targets)]
  logits = (unit[0] @ unit[1].T).astype(np.float64)
  expected = np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
  assert float(terms["classification"]) == pytest.approx(expected, rel=1e-6)


def test_the_initial_length_is_four():
  c = config("tirg")
  batch = small.batch(c, 2)
  model = Single(small.model(c).model.config, small.VOCAB_SIZE)
  variables = jax.jit(lambda: model.init(
    jax.random.key(0), batch["reference"], batch["target"], batch["tokens"], batch["token_mask"],
    train=False,
  ))()  # fmt: skip
  assert variables["params"]["vector_scale"].tolist() == [4.0]
  assert variables["params"]["composition"]["weights"].tolist() == [1.0, 10.0]


@pytest.mark.slow
def test_a_training_is_continued_and_evaluated(tmp_path):
  c = tiny.config(tiny.draw(tmp_path), "tirg,resnet18")
  c.num_epochs = 1
  train.train(c, tmp_path / "run")
  c.num_epochs = 2
  train.train(c, tmp_path / "run")
  totals = history.read(tmp_path / "run").series("train/single/total")
  assert totals[0].tolist() == [2, 4]
  results = json.loads((tmp_path / "run" / "eval.json").read_text())
  assert results["checkpoint_step"] == 4
  once = tmp_path / "once"
  train.train(c, once)
  assert json.loads((once / "eval.json").read_text()) == results
  # Its backbone goes out with torchvision's names, and comes back.
  whole.export(once, tmp_path / "out")
  backbone.convert(tmp_path / "out" / "backbone.safetensors", tmp_path / "back")
  method = small.registry.create(c, 10)
  with CheckpointReader(once / "checkpoints") as checkpoints:
    abstract = state.abstract(small.registry.create(c, len(base.load(once / "vocab.json"))))
    trained = checkpoints.restore_fields(checkpoints.best_step(), abstract, ("params",))
  found = state.initial_variables(method, str(tmp_path / "back"))
  jax.tree.map(
    np.testing.assert_array_equal,
    found["params"]["single"]["backbone"],
    trained["params"]["single"]["backbone"],
  )
