"""Batches of rows: those of the loader, an epoch at once or one by one, from any step."""

import numpy as np
import pytest

from crn_jax.errors import UserError
from crn_jax.input_pipeline import feature_batches, loader
from crn_jax.input_pipeline.dataset import TrainSplit, Triplets
from crn_jax.input_pipeline.feature_batches import Steps
from crn_jax.input_pipeline.sentences import DrawnSentences
from crn_jax.input_pipeline.tokenizers.words import Vocabulary

N, BATCH, SEED = 22, 4, 3  # Five steps an epoch and a ragged end.


@pytest.fixture(scope="module")
def split():
  rng = np.random.default_rng(0)
  reference, target = rng.integers(0, 30, (2, N)).astype(np.int32)
  texts = tuple((f"a{i}", f"b{i}") for i in range(N))
  captions = tuple(caption for text in texts for caption in text)
  images = tuple(f"{i}.jpg" for i in range(30))
  return TrainSplit(images, DrawnSentences(Triplets(reference, target, texts)), captions)


@pytest.fixture(scope="module")
def vocabulary(split):
  return Vocabulary.build(split.captions, markers="tokens", max_words=8)


@pytest.fixture(scope="module")
def text_rows(split):
  drawn = [split.triplets.draw(SEED, epoch).texts for epoch in range(3)]
  return {text: i for i, text in enumerate(dict.fromkeys(t for texts in drawn for t in texts))}


def steps(start=0, stop=15, **processes):
  return Steps(BATCH, start, stop, SEED, **processes)


def expected(split, step):
  """Reference, target and text of a step's triplets, as the loader orders them."""
  epoch, within = divmod(step, 5)
  triplets = split.triplets.draw(SEED, epoch)
  items = loader.epoch_order(N, SEED, epoch)[within * BATCH : (within + 1) * BATCH]
  return triplets.reference[items], triplets.target[items], [triplets.texts[i] for i in items]


def test_an_epoch_holds_its_steps_in_order(split, text_rows):
  batches = list(feature_batches.by_epoch(split, text_rows, steps()))
  assert [batch["rows"].shape for batch in batches] == [(BATCH, 5, 3)] * 3
  for step in range(15):
    reference, target, texts = expected(split, step)
    found = batches[step // 5]["rows"][:, step % 5]
    np.testing.assert_array_equal(found[:, 0], reference)
    np.testing.assert_array_equal(found[:, 1], target)
    assert found[:, 2].tolist() == [text_rows[text] for text in texts]


def test_steps_one_by_one_are_the_loaders(split, vocabulary):
  batches = list(feature_batches.one_by_one(split, vocabulary, steps()))
  assert len(batches) == 15
  for step, batch in enumerate(batches):
    reference, target, texts = expected(split, step)
    np.testing.assert_array_equal(batch["reference"], reference)
    np.testing.assert_array_equal(batch["target"], target)
    np.testing.assert_array_equal(batch["tokens"], vocabulary.encode_all(texts)[0])


def test_a_continued_run_sees_the_same(split, vocabulary, text_rows):
  def same(whole, rest):
    assert rest
    for a, b in zip(whole[-len(rest) :], rest, strict=True):
      for key in a:
        np.testing.assert_array_equal(a[key], b[key])

  same(
    list(feature_batches.by_epoch(split, text_rows, steps())),
    list(feature_batches.by_epoch(split, text_rows, steps(start=10))),
  )
  same(
    list(feature_batches.one_by_one(split, vocabulary, steps())),
    list(feature_batches.one_by_one(split, vocabulary, steps(start=7))),
  )


def test_processes_share_every_batch(split, vocabulary, text_rows):
  def joined(read):
    parts = [list(read(steps(process_index=i, process_count=2))) for i in range(2)]
    return [
      {k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)
    ]  # fmt: skip

  for read in (
    lambda s: feature_batches.by_epoch(split, text_rows, s),
    lambda s: feature_batches.one_by_one(split, vocabulary, s),
  ):
    for whole, parts in zip(read(steps()), joined(read), strict=True):
      for key in whole:
        np.testing.assert_array_equal(whole[key], parts[key])


def test_texts_are_encoded_once_an_epoch(split, vocabulary, monkeypatch):
  calls = []
  monkeypatch.setattr(
    Vocabulary, "encode_all", lambda self, texts: calls.append(1) or (np.zeros((N, 8)), None)
  )
  list(feature_batches.one_by_one(split, vocabulary, steps()))
  assert len(calls) == 3


def test_what_does_not_fit_is_refused(split, text_rows):
  with pytest.raises(ValueError, match="start of an epoch of 5 steps, got 3"):
    next(feature_batches.by_epoch(split, text_rows, steps(start=3)))
  with pytest.raises(UserError, match="batch_size: expected 1 .. 22"):
    next(feature_batches.by_epoch(split, text_rows, Steps(23, 0, 15, SEED)))
