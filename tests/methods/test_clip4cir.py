"""CLIP4Cir's two trainings and that against a bank: losses by hand, what is trained, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crn_jax.methods.base import TrainState
from crn_jax.models.dual_encoder import DualEncoder
from tests import tiny_towers

BATCH, D, IMAGES, TEXTS = 8, 16, 23, 11

# With it an update moves every parameter by minus its gradient.
DOWN = optax.sgd(1.0)

pytestmark = pytest.mark.usefixtures("quick_compile")


def started(name: str, axis_name: str | None = None):
  """A method and its first state."""
  method = tiny_towers.method(name, axis_name)
  return method, TrainState.create(method.init(jax.random.key(0)), DOWN)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(logits, targets) -> float:
  return float(np.mean([
    np.log(np.sum(np.exp(row - row[t]))) for row, t in zip(logits, targets, strict=True)
  ]))  # fmt: skip


def moved(before, after) -> list[bool]:
  """Whether each parameter changed."""
  return jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after))


def of_towers(method, params, pictures=None, ids=None) -> np.ndarray:
  """Features in float64."""
  module = method.encoder
  if ids is not None:
    found = module.apply({"params": params}, ids, method=DualEncoder.encode_texts)
  else:
    found = module.apply(
      {"params": params}, method.preprocessing.normalize(pictures),
      method=DualEncoder.encode_images,
    )  # fmt: skip
  return np.asarray(found.vectors, np.float64)


def pictured(n: int = BATCH) -> dict:
  return {
    "reference": tiny_towers.pictures(n, 1),
    "target": tiny_towers.pictures(n, 2),
    "tokens": tiny_towers.ids(n),
    "token_mask": tiny_towers.ids(n) > 0,
  }


class TestFineTuning:
  def test_the_sum_of_the_features_picks_its_target_in_the_batch(self):
    method, state = started("fine_tuning")
    batch = pictured()
    _, metrics = jax.jit(lambda s, b: method.train_step(DOWN, s, b))(state, batch)
    params = state.params["towers"]["encoder"]
    query = unit(
      of_towers(method, params, batch["reference"]) + of_towers(method, params, ids=batch["tokens"])
    )
    target = unit(of_towers(method, params, batch["target"]))
    expected = cross_entropy(100 * query @ target.T, range(BATCH))
    # Cosines of float32, times a hundred.
    assert float(metrics["towers/total"]) == pytest.approx(expected, abs=1e-4)

  def test_every_parameter_of_both_towers_is_trained(self):
    method, state = started("fine_tuning")
    after, _ = jax.jit(lambda s, b: method.train_step(DOWN, s, b))(state, pictured())
    assert all(moved(state.params, after.params))
    assert after.step == 1

  def test_it_answers_with_what_it_is_trained_for(self):
    method, state = started("fine_tuning")
    batch = pictured()
    variables = state.eval_variables()
    references, vectors = method.encode_images(
      variables, method.preprocessing.normalize(batch["reference"])
    )
    found = method.compose(variables, (), references, batch["tokens"], batch["token_mask"])
    params = state.params["towers"]["encoder"]
    image = of_towers(method, params, batch["reference"])
    text = of_towers(method, params, ids=batch["tokens"])
    for array, expected in (
      (vectors, unit(image)),
      (found.composed, unit(image + text)),
      (found.text_only, unit(text)),
    ):
      np.testing.assert_allclose(array, expected, atol=1e-6)
    assert found.attention == {}


@pytest.fixture(scope="module")
def tables():
  """Features of images and texts, not of unit length."""
  rng = np.random.default_rng(0)
  return {
    "images": rng.normal(size=(24, D)).astype(np.float32),  # The last fills up.
    "counts": np.arange(24) < IMAGES,
    "texts": rng.normal(size=(12, D)).astype(np.float32),
  }


def rows(steps: int, batch: int = BATCH) -> np.ndarray:
  rng = np.random.default_rng(1)
  shape = (batch, steps)
  return np.stack(
    [rng.integers(0, n, shape) for n in (IMAGES, IMAGES, TEXTS)], axis=-1
  ).astype(np.int32)  # fmt: skip


class TestCombiner:
  def test_an_epoch_at_once_is_its_updates_one_after_another(self, tables):
    method, state = started("clip4cir")
    table = rows(steps=3)
    whole, metrics = jax.jit(lambda s, b: method.train_step(DOWN, s, b))(
      state, tables | {"rows": table}
    )
    totals = []
    for i in range(3):
      reference, target, text = table[:, i].T
      features = {
        "reference": tables["images"][reference],
        "target": tables["images"][target],
        "text": tables["texts"][text],
      }
      state, one = method.update(DOWN, state, features)
      totals.append(one["combiner/total"])
    assert whole.step == state.step == 3
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, state.params
    )
    np.testing.assert_allclose(metrics["combiner/total"], np.mean(totals), rtol=1e-5)

  def test_the_loss_without_dropout_is_classification_times_a_hundred(self, tables):
    method, _ = started("clip4cir")
    method.config.clip4cir.dropout = 0.0
    state = TrainState.create(method.init(jax.random.key(0)), DOWN)
    reference, target, text = rows(1)[:, 0].T
    features = {
      "reference": tables["images"][reference],
      "target": tables["images"][target],
      "text": tables["texts"][text],
    }
    _, metrics = method.update(DOWN, state, features)
    query = method.combiner.apply(
      {"params": state.params["combiner"]}, features["reference"], features["text"], train=False
    )
    logits = 100 * unit(np.asarray(query, np.float64)) @ unit(features["target"]).T
    expected = cross_entropy(logits, range(BATCH))
    assert float(metrics["combiner/total"]) == pytest.approx(expected, abs=1e-4)

  def test_dropout_differs_from_step_to_step_and_repeats(self, tables):
    method, state = started("clip4cir")
    batch = tables | {"rows": rows(1)}
    step = jax.jit(lambda s: method.train_step(DOWN, s, batch)[1]["combiner/total"])
    assert step(state) == step(state)
    assert step(state) != step(state.replace(step=jnp.int32(1)))

  def test_towers_are_no_part_of_its_state(self):
    _, state = started("clip4cir")
    assert set(state.params["combiner"]) == {
      "text_projection", "image_projection", "mixture_hidden", "mixture", "gate_hidden", "gate"
    }  # fmt: skip

  def test_devices_change_nothing(self, tables):
    compare_devices("clip4cir", tables, {"rows": rows(2)})


def banked(n: int = BATCH) -> dict:
  table = rows(1, n)[:, 0]
  return {"reference": table[:, 0], "target": table[:, 1], "tokens": tiny_towers.ids(n)}


class TestBank:
  def test_all_training_images_are_negatives(self, tables):
    method, state = started("bank")
    batch = banked()
    images = {k: tables[k] for k in ("images", "counts")}
    _, metrics = jax.jit(lambda s, b: method.train_step(DOWN, s, b))(state, images | batch)
    text = of_towers(method, state.params["text"]["encoder"], ids=batch["tokens"])
    query = unit(tables["images"][batch["reference"]] + text)
    expected = cross_entropy(query @ unit(tables["images"][:IMAGES]).T / 0.02, batch["target"])
    assert float(metrics["text/total"]) == pytest.approx(expected, abs=1e-4)

  def test_the_text_tower_alone_is_trained_and_all_of_it(self, tables):
    method, state = started("bank")
    assert set(state.params["text"]["encoder"]) == {"text", "text_projection"}
    images = {k: tables[k] for k in ("images", "counts")}
    after, _ = jax.jit(lambda s, b: method.train_step(DOWN, s, b))(state, images | banked())
    changed = jax.tree_util.tree_leaves_with_path(
      jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, after.params)
    )
    assert all(value for _, value in changed), [p for p, value in changed if not value]

  def test_devices_change_nothing(self, tables):
    images = {k: tables[k] for k in ("images", "counts")}
    compare_devices("bank", images, banked())


def compare_devices(name: str, tables: dict, batch: dict) -> None:
  """One training step on four devices against one on one."""
  method, state = started(name)
  expected, expected_metrics = jax.jit(lambda s, b: method.train_step(DOWN, s, b))(
    state, tables | batch
  )
  split, _ = started(name, "data")
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
  found, metrics = jax.jit(jax.shard_map(
    lambda s, b: split.train_step(DOWN, s, b), mesh=mesh, in_specs=(P(), P("data")),
    out_specs=P(), check_vma=False,
  ))(state, tables | batch)  # fmt: skip
  for key, value in expected_metrics.items():
    np.testing.assert_allclose(metrics[key], value, rtol=1e-4)
  # Updates as large as the gradients, of losses around ten.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found.params, expected.params
  )
