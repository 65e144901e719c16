"""Captions as sentences: what is trained and asked with, and what decides it."""

import collections
import pathlib

import numpy as np
import pytest

from crn_jax.input_pipeline import sentences
from crn_jax.input_pipeline.dataset import Triplets
from crn_jax.input_pipeline.readers import fashioniq

MINI = pathlib.Path(__file__).parents[1] / "goldens" / "mini_data" / "fashioniq"


def source(n: int, captions=("is blue", "has sleeves")) -> sentences.DrawnSentences:
  rows = np.arange(n, dtype=np.int32)
  return sentences.DrawnSentences(Triplets(rows, rows[::-1].copy(), (captions,) * n))


@pytest.mark.parametrize(
  ("captions", "expected"),
  [
    (("is blue", "has sleeves"), "Is blue and has sleeves"),
    ((" is blue. ", "has sleeves?"), "Is blue and has sleeves"),
    (("has V-neck",), "Has V-neck"),
    (("",), ""),
  ],
)
def test_a_query_is_one_sentence_with_a_capital(captions, expected):
  assert sentences.query(captions) == expected


def test_training_draws_each_order_and_each_caption_a_quarter_of_the_time():
  n = 40_000
  counts = collections.Counter(source(n).draw(0, 0).texts)
  options = ("is blue and has sleeves", "has sleeves and is blue", "is blue", "has sleeves")
  assert set(counts) == {(option,) for option in options}
  # Five standard deviations of a binomial count.
  assert all(abs(c - n / 4) < 5 * np.sqrt(n * 3 / 16) for c in counts.values())


def test_a_draw_depends_on_seed_epoch_and_position_alone():
  texts = source(100).draw(1, 2).texts
  assert source(100).draw(1, 2).texts == texts
  assert source(100).draw(1, 3).texts != texts
  assert source(100).draw(2, 2).texts != texts
  assert source(80).draw(1, 2).texts == texts[:80]


def test_a_single_caption_stays():
  assert set(source(10, ("is blue",)).draw(0, 0).texts) == {("is blue",)}


def test_images_of_the_triplets_stay():
  drawn, plain = source(9).draw(0, 5), source(9).triplets
  np.testing.assert_array_equal(drawn.reference, plain.reference)
  np.testing.assert_array_equal(drawn.target, plain.target)


def test_fashioniq_trains_and_asks_with_sentences():
  joined, mixed = (fashioniq.read(MINI, "dress", use) for use in ("joined", "mixed"))
  assert len(mixed.train.triplets) == len(joined.train.triplets)
  assert mixed.train.captions == joined.train.captions
  for captions, (text,) in zip(
    joined.train.triplets.texts, mixed.train.triplets.draw(0, 0).texts, strict=True
  ):
    assert text in sentences.variants(captions)
  for captions, text in zip(
    joined.evals[0].queries.texts, mixed.evals[0].queries.texts, strict=True
  ):
    assert text == (sentences.query(captions),)
