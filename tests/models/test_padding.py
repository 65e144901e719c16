"""Padding: it takes no part, except in preset `crn_released`, where it acts like words."""

import itertools

import jax
import numpy as np
import pytest

from crn_jax.models import crn
from crn_jax.models.text.lstm import max_over_words
from tests import tiny_model as tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

# Of the largest element; sums over longer rows are taken in another order.
TOLERANCE = 1e-6
LENGTHS = np.array([3, 8, 5, 2])
TOKENS = np.random.default_rng(0).integers(1, tiny.VOCAB_SIZE, (4, 8))


class Composer:
  """One branch with made-up weights and running statistics."""

  def __init__(self, preset: str, kind: str):
    config = tiny.config(preset, depths=(1, 1))
    side = 2 if config.model.keep_map else 1
    self.branch = tiny.model(config).branches[kind]
    variables = {k: v[kind] for k, v in tiny.variables(config).items()}
    self.variables = variables
    self.jitted = jax.jit(self._compose, static_argnames="train")
    self.maps = jax.random.normal(jax.random.key(1), (4, side, side, 64))

  def __call__(self, rows, words: int, train: bool = False):
    """Query vectors and text vectors of some rows padded to `words`, new running statistics."""
    mask = np.arange(words) < LENGTHS[rows][:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = TOKENS[rows][np.arange(8) < LENGTHS[rows][:, None]]

    query, text, updated = self.jitted(self.maps[np.asarray(rows)], tokens, mask, train=train)
    return np.asarray(query), np.asarray(text), updated

  def _compose(self, maps, tokens, mask, *, train):
    def method(module):
      encoded, word_mask = module.encode_text(tokens, mask)
      query = module.compose(maps, encoded, word_mask, train=train, update_stats=train)
      return query.vector, max_over_words(encoded, word_mask)

    (query, text), updated = self.branch.apply(
      self.variables, method=method, mutable=["batch_stats"]
    )
    return query, text, updated["batch_stats"]["composition"]


@pytest.fixture(scope="module", params=itertools.product(("crn", "clvc_net"), crn.BRANCHES))
def composer(request):
  return Composer(*request.param)


def distance(a, b) -> float:
  return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("row", range(4))
def test_a_query_does_not_depend_on_its_batch_mates_nor_on_the_padded_length(composer, row):
  query, text, _ = composer([row], words=8)
  queries, texts, _ = composer([0, 1, 2, 3], words=12)
  assert distance(queries[row], query[0]) < TOLERANCE
  assert distance(texts[row], text[0]) < TOLERANCE


def test_training_does_not_depend_on_the_padded_length(composer):
  """Neither BatchNorm's batch statistics, which normalise, nor the running ones."""
  short, _, short_stats = composer([0, 1, 2, 3], words=8, train=True)
  long, _, long_stats = composer([0, 1, 2, 3], words=12, train=True)
  # Batch statistics over few rows amplify rounding by the inverse of small deviations.
  assert distance(long, short) < 10 * TOLERANCE
  moved = jax.tree.map(
    lambda a, b: distance(a, b) > 0.01,
    short_stats,
    composer.variables["batch_stats"]["composition"],
  )
  assert all(jax.tree.leaves(moved))
  for a, b in zip(jax.tree.leaves(long_stats), jax.tree.leaves(short_stats), strict=True):
    assert distance(a, b) < TOLERANCE


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_as_released_a_query_depends_on_the_padded_length(kind):
  composer = Composer("crn_released", kind)
  alone, _, _ = composer([0], words=3)
  same, _, _ = composer([0, 3], words=3)
  padded, _, _ = composer([0], words=8)
  assert distance(same[0], alone[0]) < TOLERANCE
  assert distance(padded[0], alone[0]) > 0.01
