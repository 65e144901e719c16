"""Encoding: the device is given the next batch before the vectors of one are waited for."""

import types

import ml_collections
import numpy as np
import pytest

from crn_jax.retrieval import features
from crn_jax.retrieval.encode import Encoder

BATCH, WIDTH = 4, 3
METHOD = types.SimpleNamespace(
  config=ml_collections.ConfigDict({"eval": {"batch_size": BATCH}}), vector_dim=WIDTH
)


class Devices:
  """A device whose images are numbers and whose work is noted in its order."""

  def __init__(self):
    self.log = []

  def fetch(self, values):
    self.log.append("fetch")
    return values

  def shard(self, tree):
    return tree


def encoder(devices: Devices) -> Encoder:
  def repeated(numbers, factor):
    return np.repeat(factor * np.asarray(numbers, np.float32)[:, None], WIDTH, axis=1)

  def encode_images(variables, pictures):
    devices.log.append("images")
    return pictures, repeated(pictures, 1)

  def compose(shared, references, rows, tokens, mask):
    devices.log.append("compose")
    wanted = np.asarray(references)[rows]
    return types.SimpleNamespace(composed=repeated(wanted, 10), text_only=repeated(tokens[:, 0], 1))

  return Encoder(devices, METHOD, lambda variables: (), encode_images, compose)


class Queries:
  """The text of query q is the number 100 + q."""

  def __init__(self, references: list[int]):
    self.reference = np.asarray(references)
    self.texts = list(range(100, 100 + len(references)))

  def __len__(self) -> int:
    return len(self.texts)


def split(n_images: int, references: list[int]):
  """Image i is the number i."""
  return types.SimpleNamespace(
    name="split", image_paths=list(range(n_images)), queries=Queries(references), store=None
  )


VOCABULARY = types.SimpleNamespace(
  encode_all=lambda texts: (np.asarray(texts)[:, None], np.ones((len(texts), 1), bool))
)


@pytest.fixture
def encoded(monkeypatch):
  def pictures(self, paths, store):
    for start in range(0, len(paths), BATCH):
      yield np.resize(paths[start : start + BATCH], BATCH)

  monkeypatch.setattr(Encoder, "_pictures", pictures)
  devices = Devices()
  # 11 images; of the first batch's, more queries than fit one batch, of the second's none.
  references = [0, 1, 2, 3, 0, 1, 10, 8]
  return devices.log, references, encoder(devices).encode({}, split(11, references), VOCABULARY)


def test_every_vector_stands_at_its_row(encoded):
  _, references, found = encoded
  np.testing.assert_array_equal(found.images[:, 0], np.arange(11))
  np.testing.assert_array_equal(found.composed[:, 0], 10 * np.asarray(references))
  np.testing.assert_array_equal(found.text_only[:, 0], 100 + np.arange(8))


def test_a_batch_is_waited_for_once_the_next_one_is_under_way(encoded):
  log, _, _ = encoded
  first = ["images", "compose", "compose"]
  assert log == [
    *first, "images", *5 * ["fetch"], "images", "compose", *4 * ["fetch"],
  ]  # fmt: skip


def repeated_rows(numbers) -> np.ndarray:
  return np.repeat(np.asarray(numbers, np.float32)[:, None], WIDTH, axis=1)


# Of three batches: what is begun and what is waited for.
ONE_AHEAD = ["begin", "begin", "fetch", "begin", "fetch", "fetch"]


def test_features_of_a_batch_are_waited_for_once_the_next_one_is_under_way():
  devices = Devices()

  def encode(params, rows):
    devices.log.append("begin")
    return repeated_rows(rows[:, 0])

  kept = types.SimpleNamespace(rows=lambda kind, keys, compute, show: compute(0, len(keys)))
  frozen = features._Frozen(
    METHOD, devices, VOCABULARY, {"text": {}}, {"text": encode}, {"text": kept}
  )
  found = frozen.texts(list(range(10)), "split")
  np.testing.assert_array_equal(found, repeated_rows(range(10)))
  assert devices.log == ONE_AHEAD


def test_queries_of_features_are_waited_for_once_the_next_ones_are_under_way():
  devices = Devices()

  def compose(variables, references, texts):
    devices.log.append("begin")
    return types.SimpleNamespace(composed=10 * references, text_only=repeated_rows(texts[:, 0]))

  queries = split(3, [0, 1, 2, 0, 1, 2, 0, 1, 2])
  kept = features.SplitFeatures(repeated_rows([1, 2, 3]), None)
  encoder = features.FeatureEncoder(
    devices, METHOD, features.Features(None, {"split": kept}), compose
  )
  found = encoder.encode({}, queries, VOCABULARY)
  np.testing.assert_array_equal(found.composed, 10 * kept.images[queries.queries.reference])
  np.testing.assert_array_equal(found.text_only, repeated_rows(range(100, 109)))
  assert devices.log == ONE_AHEAD
