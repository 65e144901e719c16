"""Features of frozen towers, and evaluation on them."""

import dataclasses

import jax
import numpy as np
import pytest

from crn_jax.input_pipeline.registry import open_dataset
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods.base import Method
from crn_jax.models.dual_encoder import DualEncoder
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.retrieval import features, kept_features
from crn_jax.retrieval.encode import Encoder
from crn_jax.retrieval.features import FeatureEncoder
from tests import tiny, tiny_towers

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Configuration, data, words and towers."""
  config = tiny_towers.config(tiny.draw(tmp_path_factory.mktemp("drawn")), "clip4cir")
  dataset = open_dataset(config.data, train=True)
  words = Vocabulary.build(dataset.train.captions, markers="tokens", max_words=20)
  towers = tiny_towers.method("fine_tuning").init_encoder(jax.random.key(0))
  return config, dataset, words, jax.device_get(towers)


def method(config, name: str = "clip4cir", folder=None):
  config = config.copy_and_resolve_references()
  config.method = name
  if folder is not None:
    config.data.features = str(folder)
  return tiny_towers.registry.create(config, tiny_towers.VOCAB_SIZE, AXIS)


def compute(made, folder, name="clip4cir", towers=None, mode="shard_map", squeeze=False, **changes):
  config, dataset, words, own = made
  config = config.copy_and_resolve_references()
  if squeeze:
    config.model.encoder.squeeze = True
  config.data.update(changes)
  own_method, towers = method(config, name, folder), towers or own
  weights = features.digests(own_method, towers)
  return features.compute(
    own_method, towers, weights, DataParallel.create(mode), dataset, words
  )  # fmt: skip


@pytest.fixture(scope="module")
def computed(made, quick_compile, tmp_path_factory):
  del quick_compile
  return compute(made, tmp_path_factory.mktemp("features"))


@pytest.fixture
def encoded(monkeypatch):
  """Counts the features that are computed."""
  counts = []
  original = kept_features.KeptFeatures.rows

  def rows(self, kind, keys, compute, show):
    def counting(first, last):
      counts.append((kind, last - first))
      return compute(first, last)

    return original(self, kind, keys, counting, show)

  monkeypatch.setattr(kept_features.KeptFeatures, "rows", rows)
  return counts


def test_there_is_a_feature_of_every_image_and_every_text_that_is_drawn(made, computed):
  config, dataset, words, towers = made
  train = computed.train
  assert train.images.shape == (len(dataset.train.image_paths), 16)
  drawn = {
    text for epoch in range(config.num_epochs)
    for text in dataset.train.triplets.draw(config.seed, epoch).texts
  }  # fmt: skip
  assert set(train.text_rows) == drawn
  assert sorted(train.text_rows.values()) == list(range(len(train.texts)))
  split = dataset.evals[0]
  assert computed.evals[split.name].texts.shape == (len(split.queries), 16)
  # One text alone, by the module itself.
  text, row = next(iter(train.text_rows.items()))
  alone = DualEncoder.encode_texts
  found = method(config).encoder.apply(
    {"params": towers}, words.encode(text)[0][None], method=alone
  )
  np.testing.assert_allclose(train.texts[row], found.vectors[0], atol=1e-6)
  query = split.queries.texts[7]
  found = method(config).encoder.apply(
    {"params": towers}, words.encode(query)[0][None], method=alone
  )
  np.testing.assert_allclose(computed.evals[split.name].texts[7], found.vectors[0], atol=1e-6)


def test_they_are_computed_once_and_again_for_other_weights(made, tmp_path, encoded):
  first = compute(made, tmp_path)
  n = len(encoded)
  assert {kind for kind, _ in encoded} == {"image", "text"}
  again = compute(made, tmp_path)
  assert len(encoded) == n
  np.testing.assert_array_equal(again.train.images, first.train.images)
  np.testing.assert_array_equal(again.train.texts, first.train.texts)
  _, _, _, towers = made
  other = jax.tree.map(np.copy, towers)
  other["text_projection"]["kernel"][0, 0] += 1e-3  # One weight of one tower.
  compute(made, tmp_path, towers=other)
  assert {kind for kind, _ in encoded[n:]} == {"text"}


@pytest.mark.parametrize("changed", [{"max_ratio": None}, {"resize": 40}, {"squeeze": True}])
def test_pictures_prepared_in_another_way_are_encoded_again(made, tmp_path, encoded, changed):
  compute(made, tmp_path)
  n = len(encoded)
  compute(made, tmp_path, **changed)
  assert {kind for kind, _ in encoded[n:]} == {"image"}


def test_what_a_tower_computes_otherwise_is_computed_again(made, tmp_path, encoded, monkeypatch):
  compute(made, tmp_path)
  n = len(encoded)
  monkeypatch.setattr(Method, "numerics", "bfloat16, otherwise")
  compute(made, tmp_path)
  assert {kind for kind, _ in encoded[n:]} == {"image", "text"}


def test_a_tower_that_is_trained_has_no_features(made, tmp_path, encoded):
  found = compute(made, tmp_path, name="bank")
  assert found.train.texts is None
  assert found.train.text_rows == {}
  assert {kind for kind, _ in encoded} == {"image"}


def test_what_there_is_of_them_does_not_depend_on_the_devices(made, computed, tmp_path):
  one = dataclasses.replace(DataParallel.create("shard_map"), devices=tuple(jax.devices()[:1]))
  config, dataset, words, towers = made
  own = method(config, folder=tmp_path)
  found = features.compute(own, towers, features.digests(own, towers), one, dataset, words)
  np.testing.assert_allclose(found.train.images, computed.train.images, atol=1e-6)
  by_pmap = compute(made, tmp_path / "pmap", mode="pmap")
  np.testing.assert_allclose(by_pmap.train.images, computed.train.images, atol=1e-6)


def test_tables_are_spread_over_the_devices_and_filled_up(computed):
  parallel = DataParallel.create("shard_map")
  placed = features.place(computed.train, parallel)
  n = len(computed.train.images)
  assert placed["images"].shape[0] % 8 == 0
  np.testing.assert_array_equal(placed["images"][:n], computed.train.images)
  np.testing.assert_array_equal(placed["counts"], np.arange(len(placed["counts"])) < n)


@pytest.mark.parametrize("name", ["clip4cir", "bank"])
def test_with_its_towers_a_method_answers_about_pictures_as_about_their_features(
  name, made, quick_compile, tmp_path
):
  config, dataset, words, towers = made
  parallel, own = DataParallel.create("shard_map"), method(config, name, tmp_path)
  weights = features.digests(own, towers)
  found = features.compute(own, towers, weights, parallel, dataset, words)
  trained = own.init(jax.random.key(1))
  whole = own.with_towers(trained, towers)
  assert set(whole["params"]) == {*own.parts, "frozen"}
  split = dataset.evals[0]
  kept = FeatureEncoder.create(own, parallel, found).encode(
    parallel.replicate(trained), split, words
  )
  asked = Encoder.create(own, parallel).encode(parallel.replicate(whole), split, words)
  for kind in ("images", "composed", "text_only"):
    np.testing.assert_allclose(getattr(asked, kind), getattr(kept, kind), atol=1e-6)


def test_evaluation_is_that_of_the_pictures(made, quick_compile, tmp_path):
  """A bank whose text tower is that of the towers answers as these do themselves."""
  config, dataset, words, towers = made
  parallel = DataParallel.create("shard_map")
  bank, summed = method(config, "bank", tmp_path), method(config, "fine_tuning")
  weights = features.digests(bank, towers)
  found = features.compute(bank, towers, weights, parallel, dataset, words)
  text = {k: towers[k] for k in ("text", "text_projection")}

  def variables(part, params):
    return parallel.replicate(
      {"params": {part: {"encoder": params}}, "batch_stats": {part: {}}}
    )  # fmt: skip

  split = dataset.evals[0]
  kept = FeatureEncoder.create(bank, parallel, found).encode(variables("text", text), split, words)
  plain = Encoder.create(summed, parallel).encode(variables("towers", towers), split, words)
  for name in ("images", "composed", "text_only"):
    np.testing.assert_allclose(getattr(kept, name), getattr(plain, name), atol=1e-6)
