"""Average precision, recall within subsets, their mean and intervals; what chance scores."""

import itertools

import numpy as np
import pytest

from crn_jax.retrieval import metrics
from crn_jax.retrieval.metrics import UNRANKED, Outcome


def by_definition(hits, n_truths, k):
  """AP@k of one query, in the words of CIRCO's server."""
  total = 0.0
  for i in range(min(k, len(hits))):
    if hits[i]:
      total += sum(hits[: i + 1]) / (i + 1)
  return total / min(n_truths, k)


class TestAveragePrecision:
  @pytest.mark.parametrize(
    ("hits", "n_truths", "k", "expected"),
    [
      ("1000", 1, 5, 1.0),
      ("0100", 1, 5, 1 / 2),
      ("0100", 1, 1, 0.0),
      ("1100", 2, 5, 1.0),
      ("0011", 2, 5, (1 / 3 + 2 / 4) / 2),
      ("1010", 3, 5, (1 + 2 / 3) / 3),
      ("1010", 3, 2, 1 / 2),  # Two places: no more than two of the three can be there.
      ("1111", 9, 3, 1.0),
      ("0000", 2, 5, 0.0),
    ],
  )
  def test_by_hand(self, hits, n_truths, k, expected):
    row = np.array([[c == "1" for c in hits]])
    found = metrics.average_precision(row, np.array([n_truths]), k)
    np.testing.assert_allclose(found, [expected], rtol=1e-15)

  def test_is_its_definition(self):
    rng = np.random.default_rng(0)
    hits = rng.random((200, 50)) < 0.1
    n_truths = hits.sum(axis=1) + rng.integers(1, 4, 200)
    for k in metrics.PRECISION_CUTS:
      found = metrics.average_precision(hits, n_truths, k)
      expected = [by_definition(h.tolist(), n, k) for h, n in zip(hits, n_truths, strict=True)]
      np.testing.assert_allclose(found, expected, rtol=1e-12)

  @pytest.mark.parametrize("n", [1, 2, 4])
  @pytest.mark.parametrize("k", [1, 3, 6])
  def test_all_rankings_together_score_what_chance_does(self, n, k):
    """Exact: every order of six images once, n of them right."""
    hits = np.array(list(itertools.permutations(range(6)))) < n
    found = metrics.average_precision(hits, np.full(len(hits), n), k).mean()
    assert found == pytest.approx(chance_of_precision(n, 6, k), rel=1e-12)


def chance_of_precision(n, g, k):
  """Expected AP@k of a random order of g images of which n are right.

  Place i holds a right image with probability n / g, and then (i - 1) (n - 1) / (g - 1) of the
  others stand before it on average.
  """
  places = np.arange(1, k + 1)
  return np.sum(n / g * (1 + (places - 1) * (n - 1) / (g - 1)) / places) / min(n, k)


def random_outcome(rng, queries, gallery):
  """Rankings of `gallery` images in random order: five are the subset, one to six are right."""
  order = rng.permuted(np.tile(np.arange(gallery), (queries, 1)), axis=1)  # Image at each place.
  place = np.argsort(order, axis=1)
  n_truths = rng.integers(1, 7, queries)
  subset_ranks = (place[:, 1:5] < place[:, :1]).sum(axis=1)  # The target is image 0.
  return Outcome(place[:, 0], subset_ranks, order[:, :50] < n_truths[:, None], n_truths)


def test_random_rankings_score_what_arithmetic_says():
  """A mean of q values in [0, 1] with expectation p deviates by sqrt(p (1 - p) / q) at most."""
  queries, gallery = 4000, 100
  outcome = random_outcome(np.random.default_rng(5), queries, gallery)
  measured = metrics.names((1, 5, 10, 50), subsets=True, truths=True)
  percent, intervals = metrics.measure([outcome], measured)
  expected = {f"R@{k}": k / gallery for k in (1, 5, 10, 50)}
  expected |= {f"Rsub@{k}": k / 5 for k in (1, 2, 3)}
  expected["mean"] = (5 / gallery + 1 / 5) / 2
  for k in metrics.PRECISION_CUTS:
    each = [chance_of_precision(n, gallery, k) for n in range(1, 7)]
    expected[f"mAP@{k}"] = np.mean(each)
  assert list(percent) == measured == list(expected)
  for name, p in expected.items():
    error = 100 * np.sqrt(p * (1 - p) / queries)
    assert abs(percent[name] - 100 * p) < 4 * error, name
    low, high = intervals[name]
    assert low < percent[name] < high
    assert high - low < 2 * 2.2 * error, name  # 1.96 of them on each side for recalls.


def test_a_query_without_its_target_is_a_miss_everywhere():
  nothing = np.array([UNRANKED])
  outcome = Outcome(nothing, nothing, np.zeros((1, 7), bool), np.array([2]))
  measured = metrics.names((1, 5), subsets=True, truths=True)
  assert set(metrics.measure([outcome], measured)[0].values()) == {0.0}


def test_several_splits_count_the_same():
  first, second = (
    Outcome(np.array([0]), np.array([0])),
    Outcome(np.array([9] * 3), np.array([4] * 3)),
  )
  percent, _ = metrics.measure([first, second], ["R@5", "Rsub@1", "mean"])
  assert percent == {"R@5": 50, "Rsub@1": 50, "mean": 50}


def test_names_are_those_that_can_be_measured():
  assert metrics.names((1, 10), subsets=False, truths=False) == ["R@1", "R@10"]
  with_subsets = metrics.names((1, 5), subsets=True, truths=False)
  assert with_subsets == ["R@1", "R@5", "Rsub@1", "Rsub@2", "Rsub@3", "mean"]
  assert "mean" not in metrics.names((1, 10), subsets=True, truths=False)  # It needs R@5.
  mixed = metrics.names((1, 5, 50), subsets=True, truths=True)
  shuffled = np.random.default_rng(0).permutation(mixed).tolist()
  assert sorted(shuffled, key=metrics.order) == mixed != shuffled


def test_the_part_of_some_queries_is_theirs():
  outcome = random_outcome(np.random.default_rng(0), 30, 60)
  rows = np.arange(30) % 3 == 0
  some = outcome.of(rows)
  assert len(some) == 10
  for name in ("R@5", "Rsub@2", "mean", "mAP@10"):
    np.testing.assert_array_equal(some.values(name), outcome.values(name)[rows])


class TestInterval:
  def test_of_hits_is_that_of_recall(self):
    """The same distribution, from other random numbers.

    A quantile of 10,000 draws deviates by sqrt(q (1 - q) / 10,000) / density, 0.03 standard errors
    of the mean at 2.5 %; the distribution itself has steps of 1 / n.
    """
    ranks = np.random.default_rng(1).integers(0, 20, 500)
    hits = (ranks < 5).astype(float)
    error = 100 * hits.std() / np.sqrt(500)
    found = metrics.mean_interval([hits])
    expected = metrics.recall_interval([ranks], 5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=5 * 0.03 * error + 100 / 500)

  def test_is_the_bootstrap_over_queries(self):
    rng = np.random.default_rng(2)
    values = rng.random(80)
    resampled = 100 * values[rng.integers(0, 80, (20_000, 80))].mean(axis=1)
    expected = np.quantile(resampled, [0.025, 0.975])
    error = 100 * values.std() / np.sqrt(80)
    np.testing.assert_allclose(
      metrics.mean_interval([values]), expected, rtol=0, atol=5 * 0.04 * error
    )

  def test_is_reproducible_and_of_equal_values_a_point(self):
    values = [np.full(10, 0.5), np.full(3, 0.25)]
    np.testing.assert_allclose(metrics.mean_interval(values), (37.5, 37.5), rtol=1e-12)
    spread = [np.array([0.0, 1.0, 1.0])]
    assert metrics.mean_interval(spread) == metrics.mean_interval(spread)
