"""Retrieval ranks, against the release's numbers, hand-made matrices and a stable argsort."""

import pathlib

import jax
import numpy as np
import pytest

from crn_jax.methods.crn import join
from crn_jax.retrieval import metrics, ranking

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "recall.npz"
KS = (1, 10, 50)


@pytest.fixture(scope="module")
def golden():
  """The release's metric on random features: joined vectors, positions, expected values."""
  with np.load(GOLDENS) as data:
    data = {k.removeprefix("iq."): data[k] for k in data.files if k.startswith("iq.")}
  first = {}
  for position, image_id in enumerate(data["gallery_ids"].tolist()):
    first.setdefault(image_id, position)
  return data | {
    "queries": np.asarray(join(data["query_local"], data["query_global"])),
    "gallery": np.asarray(join(data["gallery_local"], data["gallery_global"])),
    "target": np.array([first.get(i, -1) for i in data["target_ids"].tolist()]),
    "exclude": np.array([first.get(i, -1) for i in data["source_ids"].tolist()]),
  }


def stable_ranks(scores, target, exclude):
  """The definition, by sorting: [q, g] scores -> [q] ranks."""
  scores = scores.copy()
  ranks = []
  for row, t, e in zip(scores, target, exclude, strict=True):
    if e >= 0:
      row[e] = ranking.EXCLUDED_SCORE
    order = np.argsort(-row, kind="stable")
    unranked = t < 0 or t == e
    ranks.append(metrics.UNRANKED if unranked else int(np.flatnonzero(order == t)[0]))
  return np.array(ranks)


def small_integers(rng, n, d):
  """Features whose products are exact in float32, full of equal scores."""
  return rng.integers(-2, 3, (n, d)).astype(np.float32)


class TestGoldens:
  def test_some_targets_are_absent_and_some_references_are_in_the_gallery(self, golden):
    assert (golden["target"] < 0).sum() > 0
    assert (golden["exclude"] >= 0).sum() > 0

  def test_recall_with_the_reference_excluded(self, golden):
    ranks = ranking.target_ranks(
      golden["queries"], golden["gallery"], golden["target"], golden["exclude"]
    )
    recall = list(metrics.recall_at_k(ranks, KS).values())
    np.testing.assert_allclose(recall, golden["fashioniq.values"], rtol=1e-12)
    np.testing.assert_allclose(recall, golden["shoes.values"], rtol=1e-12)

  def test_recall_with_the_reference_kept(self, golden):
    nothing = np.full(len(golden["queries"]), -1)
    ranks = ranking.target_ranks(golden["queries"], golden["gallery"], golden["target"], nothing)
    np.testing.assert_allclose(
      list(metrics.recall_at_k(ranks, KS).values()),
      golden["values_without_reference_exclusion"],
      rtol=1e-12,
    )

  def test_whole_ranking(self, golden):
    # The closest two scores are 9e-6 apart, far above float32 rounding: the order is unique.
    indices, _ = ranking.top_k(
      golden["queries"], golden["gallery"], len(golden["gallery"]), golden["exclude"]
    )
    np.testing.assert_array_equal(indices, golden["ranking"])

  def test_rank_is_the_position_in_the_ranking(self, golden):
    ranks = ranking.target_ranks(
      golden["queries"], golden["gallery"], golden["target"], golden["exclude"]
    )
    present = golden["target"] >= 0
    positions = np.argmax(golden["ranking"] == golden["target"][:, None], axis=1)
    np.testing.assert_array_equal(ranks[present], positions[present])
    assert (ranks[~present] == metrics.UNRANKED).all()


class TestTargetRanks:
  # Scores of the one query: 1, 4, 3, 2.
  QUERY = np.array([[1.0, 0.0]])
  GALLERY = np.array([[1.0, 9.0], [4.0, 9.0], [3.0, 9.0], [2.0, 9.0]])

  def rank(self, target, exclude=-1):
    (rank,) = ranking.target_ranks(self.QUERY, self.GALLERY, [target], [exclude])
    return rank

  def test_counts_the_items_above(self):
    assert [self.rank(t) for t in range(4)] == [3, 0, 1, 2]

  def test_result_is_int64(self):
    assert ranking.target_ranks(self.QUERY, self.GALLERY, [0], [-1]).dtype == np.int64

  def test_the_excluded_item_does_not_count(self):
    assert self.rank(2, exclude=1) == 0
    assert self.rank(2, exclude=0) == 1

  @pytest.mark.parametrize(("target", "exclude"), [(1, 1), (-1, -1), (-1, 1)])
  def test_a_target_that_is_not_ranked_is_a_miss_at_every_cut_off(self, target, exclude):
    """Excluded, or outside the gallery; also where all of the gallery is asked for, and more."""
    rank = self.rank(target, exclude)
    assert rank == metrics.UNRANKED
    assert set(metrics.recall_at_k(np.array([rank]), (1, 4, 5, 10**9)).values()) == {0.0}

  def test_equal_scores_rank_in_gallery_order(self):
    gallery = np.ones((4, 2), np.float32)
    ranks = ranking.target_ranks(np.ones((4, 2)), gallery, np.arange(4), np.full(4, -1))
    np.testing.assert_array_equal(ranks, [0, 1, 2, 3])

  def test_an_excluded_tie_does_not_count(self):
    assert ranking.target_ranks(np.ones((1, 2)), np.ones((4, 2)), [3], [1]) == [2]

  def test_all_zero_queries_tie_everywhere(self):
    assert ranking.target_ranks(np.zeros((1, 2)), self.GALLERY, [2], [-1]) == [2]

  @pytest.mark.parametrize("seed", range(3))
  def test_equals_a_stable_sort(self, seed):
    rng = np.random.default_rng(seed)
    queries, gallery = small_integers(rng, 37, 4), small_integers(rng, 53, 4)
    target = rng.integers(-1, 53, 37)
    exclude = rng.integers(-1, 53, 37)
    exclude[:3] = target[:3]
    ranks = ranking.target_ranks(queries, gallery, target, exclude, block_size=16)
    np.testing.assert_array_equal(ranks, stable_ranks(queries @ gallery.T, target, exclude))

  def test_equals_a_sort_of_random_features(self):
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(40, 16)), rng.normal(size=(60, 16))
    target, exclude = rng.integers(-1, 60, (2, 40))
    ranks = ranking.target_ranks(queries, gallery, target, exclude, block_size=16)
    np.testing.assert_array_equal(ranks, stable_ranks(queries @ gallery.T, target, exclude))

  @pytest.mark.parametrize("block_size", [1, 5, 10, 64])
  def test_blocks_do_not_matter(self, block_size):
    rng = np.random.default_rng(1)
    queries, gallery = small_integers(rng, 10, 4), small_integers(rng, 20, 4)
    target, exclude = rng.integers(-1, 20, (2, 10))
    ranks = ranking.target_ranks(queries, gallery, target, exclude, block_size=block_size)
    np.testing.assert_array_equal(ranks, stable_ranks(queries @ gallery.T, target, exclude))

  def test_compiles_once_however_many_queries(self):
    gallery = np.ones((7, 3), np.float32)
    before = ranking._rank_block._cache_size()
    for n in (1, 4, 5, 11):
      ranking.target_ranks(np.ones((n, 3)), gallery, [0] * n, [-1] * n, block_size=4)
    assert ranking._rank_block._cache_size() == before + 1

  def test_no_queries_give_no_ranks(self):
    assert ranking.target_ranks(np.ones((0, 2)), self.GALLERY, [], []).shape == (0,)

  @pytest.mark.parametrize("value", [np.nan, np.inf])
  def test_names_the_features_that_are_not_finite(self, value):
    queries, gallery = np.ones((3, 2)), np.ones((4, 2))
    queries[2, 1] = value
    with pytest.raises(ValueError, match="queries: 1 of 3 rows .* first row 2"):
      ranking.target_ranks(queries, gallery, [0] * 3, [-1] * 3)
    gallery[1, 0] = value
    with pytest.raises(ValueError, match="gallery: 1 of 4 rows .* first row 1"):
      ranking.target_ranks(np.ones((3, 2)), gallery, [0] * 3, [-1] * 3)

  @pytest.mark.parametrize(
    ("kwargs", "message"),
    [
      ({"gallery": np.ones((4, 3))}, r"got \(1, 2\) and \(4, 3\)"),
      ({"gallery": np.ones((0, 2))}, "gallery is empty"),
      ({"target": [4]}, "target: .* gallery of 4, got 4 at query 0"),
      ({"exclude": [-2]}, "exclude: .* got -2 at query 0"),
      ({"target": [0, 1]}, r"target: expected shape \(1,\)"),
      ({"target": [1.0]}, "target: expected integers"),
      ({"block_size": 0}, "block_size"),
    ],
  )
  def test_refuses(self, kwargs, message):
    arguments = {"queries": self.QUERY, "gallery": self.GALLERY, "target": [0], "exclude": [-1]}
    with pytest.raises(ValueError, match=message):
      ranking.target_ranks(**(arguments | kwargs))


class TestTopK:
  def test_best_first_with_scores(self):
    indices, scores = ranking.top_k(TestTargetRanks.QUERY, TestTargetRanks.GALLERY, 2, [-1])
    np.testing.assert_array_equal(indices, [[1, 2]])
    np.testing.assert_array_equal(scores, [[4.0, 3.0]])

  def test_the_excluded_item_is_left_out(self):
    indices, _ = ranking.top_k(TestTargetRanks.QUERY, TestTargetRanks.GALLERY, 2, [1])
    np.testing.assert_array_equal(indices, [[2, 3]])

  def test_k_is_cut_to_the_gallery_and_the_excluded_item_stands_last(self):
    indices, scores = ranking.top_k(TestTargetRanks.QUERY, TestTargetRanks.GALLERY, 9, [1])
    np.testing.assert_array_equal(indices, [[2, 3, 0, 1]])
    assert scores[0, -1] == np.float32(ranking.EXCLUDED_SCORE)

  def test_agrees_with_the_ranks_on_ties(self):
    rng = np.random.default_rng(2)
    queries, gallery = small_integers(rng, 30, 3), small_integers(rng, 40, 3)
    target, exclude = rng.integers(0, 40, (2, 30))
    ranks = ranking.target_ranks(queries, gallery, target, exclude, block_size=8)
    indices, _ = ranking.top_k(queries, gallery, 40, exclude, block_size=8)
    np.testing.assert_array_equal(indices[np.arange(30), ranks], target)

  def test_only_allowed_items_are_ranked(self):
    """Like a gallery of them alone, whatever the block; ties in their order."""
    rng = np.random.default_rng(3)
    queries, gallery = small_integers(rng, 20, 3), small_integers(rng, 40, 3)
    allowed = rng.random((20, 40)) < 0.5
    exclude = rng.integers(-1, 40, 20)
    indices, scores = ranking.top_k(queries, gallery, 40, exclude, allowed=allowed, block_size=8)
    for i in range(20):
      own = np.flatnonzero(allowed[i] & (np.arange(40) != exclude[i]))
      best, of_best = ranking.top_k(queries[i : i + 1], gallery[own], 40, [-1])
      np.testing.assert_array_equal(indices[i, : len(own)], own[best[0]])
      np.testing.assert_array_equal(scores[i, : len(own)], of_best[0])
      assert (scores[i, len(own) :] == np.float32(ranking.EXCLUDED_SCORE)).all()

  def test_a_gallery_that_was_prepared_is_not_checked_again(self, monkeypatch):
    gallery = ranking.Gallery.create(TestTargetRanks.GALLERY)
    expected = ranking.top_k(TestTargetRanks.QUERY, TestTargetRanks.GALLERY, 2, [1])
    checked = []
    finite = ranking._finite
    monkeypatch.setattr(ranking, "_finite", lambda name, x: checked.append(name) or finite(name, x))
    found = ranking.top_k(TestTargetRanks.QUERY, gallery, 2, [1])
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_array_equal(a, b)
    assert checked == ["queries"]

  @pytest.mark.parametrize(
    ("features", "message"),
    [
      (np.zeros((0, 2)), "expected a gallery"), (np.zeros(3), "expected a gallery"),
      (np.array([[1.0, 2.0], [np.nan, 0.0]]), "gallery: 1 of 2 rows are not finite"),
    ],
  )  # fmt: skip
  def test_a_gallery_that_cannot_be_ranked(self, features, message):
    with pytest.raises(ValueError, match=message):
      ranking.Gallery.create(features)

  @pytest.mark.parametrize("allowed", [np.ones((1, 3), bool), np.ones((1, 4)), np.ones(4, bool)])
  def test_a_mask_of_another_shape_or_type(self, allowed):
    with pytest.raises(ValueError, match=r"allowed: expected bool \[1, 4\], got"):
      ranking.top_k(TestTargetRanks.QUERY, TestTargetRanks.GALLERY, 2, [-1], allowed=allowed)

  def test_refuses_k_below_one(self):
    with pytest.raises(ValueError, match="k must be at least 1"):
      ranking.top_k(np.ones((1, 2)), np.ones((3, 2)), 0, [-1])


class TestRecallAtK:
  def test_is_a_percentage_of_all_queries(self):
    assert metrics.recall_at_k(np.array([0, 1, 9, 10]), (1, 10, 50)) == {1: 25, 10: 75, 50: 100}

  def test_of_nothing_is_an_error(self):
    with pytest.raises(ValueError, match="no queries"):
      metrics.recall_at_k(np.array([]), (1,))


class TestRecallInterval:
  def test_is_the_bootstrap_over_queries(self):
    ranks = np.r_[np.zeros(150, int), np.full(50, 99)]
    rng = np.random.default_rng(1)
    resampled = [100 * np.mean(rng.choice(ranks, len(ranks)) < 10) for _ in range(4000)]
    expected = np.quantile(resampled, [0.025, 0.975])
    np.testing.assert_allclose(metrics.recall_interval([ranks], 10), expected, atol=0.6)

  def test_narrows_with_more_queries(self):
    ranks = np.arange(20)
    few = np.diff(metrics.recall_interval([ranks], 10))
    many = np.diff(metrics.recall_interval([np.tile(ranks, 100)], 10))
    np.testing.assert_allclose(few / many, 10, rtol=0.2)

  def test_of_a_mean_is_narrower_than_of_its_parts(self):
    ranks = np.arange(200)
    one = np.diff(metrics.recall_interval([ranks], 100))
    three = np.diff(metrics.recall_interval([ranks] * 3, 100))
    np.testing.assert_allclose(one / three, np.sqrt(3), rtol=0.1)

  def test_is_a_point_where_every_resample_is_the_same(self):
    assert metrics.recall_interval([np.zeros(5, int)], 1) == (100, 100)


class TestLabels:
  def test_first_item_of_a_label_counts(self):
    rng = np.random.default_rng(5)
    queries, gallery = small_integers(rng, 40, 4), small_integers(rng, 61, 4)
    labels, target = rng.integers(0, 12, 61), rng.integers(0, 14, 40)  # 12 and 13: no item.
    exclude = rng.integers(-1, 61, 40)
    expected = []
    for q, t, e in zip(queries, target, exclude, strict=True):
      positions = np.flatnonzero(labels == t)
      ranks = stable_ranks(
        np.repeat((gallery @ q)[None], len(positions), 0), positions, [e] * len(positions)
      )
      expected.append(min(ranks, default=metrics.UNRANKED))
    assert metrics.UNRANKED in expected
    ranks = ranking.target_ranks(queries, gallery, target, exclude, labels=labels, block_size=16)
    np.testing.assert_array_equal(ranks, expected)

  @pytest.mark.parametrize(
    ("target", "labels", "message"),
    [
      ([0], [0, 1], r"labels: expected shape \(3,\)"),
      ([0, 1], [0, 1, 2], r"target: expected shape \(1,\)"),
      ([0.0], [0, 1, 2], "target: expected integers"),
      ([0], [0, -1, 2], "labels: expected 0 or greater, got -1"),
    ],
  )
  def test_bad_labels_are_refused(self, target, labels, message):
    with pytest.raises(ValueError, match=message):
      ranking.target_ranks(np.ones((1, 2)), np.ones((3, 2)), target, [-1], labels=labels)


class TestAdded:
  """What is added to the products of vectors."""

  @pytest.fixture
  def given(self):
    """Queries, gallery, what is added, target, exclude; small integers, with many ties."""
    rng = np.random.default_rng(8)
    queries, gallery = small_integers(rng, 37, 4), small_integers(rng, 53, 4)
    added = rng.integers(-3, 4, (37, 53)).astype(np.float32)
    return queries, gallery, added, *rng.integers(-1, 53, (2, 37))

  def test_ranks_are_those_of_the_sum(self, given):
    queries, gallery, added, target, exclude = given
    ranks = ranking.target_ranks(queries, gallery, target, exclude, added=added, block_size=16)
    scores = queries @ gallery.T + added
    np.testing.assert_array_equal(ranks, stable_ranks(scores, target, exclude))
    assert np.any(ranks != stable_ranks(queries @ gallery.T, target, exclude))

  @pytest.mark.parametrize("masked", [False, True])
  def test_the_first_are_those_of_the_sum_and_show_it(self, given, masked):
    queries, gallery, added, _, exclude = given
    allowed = np.random.default_rng(9).random(added.shape) < 0.5 if masked else None
    found, values = ranking.top_k(
      queries, gallery, 5, exclude, added=added, allowed=allowed, block_size=16
    )
    scores = queries @ gallery.T + added
    scores[np.arange(53) == exclude[:, None]] = ranking.EXCLUDED_SCORE
    if masked:
      scores[~allowed] = ranking.EXCLUDED_SCORE
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=1))

  def test_subsets_are_ordered_by_the_sum(self, given):
    queries, items, added, _, _ = given
    rng = np.random.default_rng(10)
    subsets = np.sort(rng.permuted(np.tile(np.arange(53), (37, 1)), axis=1)[:, :6], axis=1)
    subsets[::3, 0] = -1
    found = ranking.subset_order(queries, items, subsets, added)
    scores = np.where(
      np.arange(-1, 53) < 0, -np.inf, np.pad(queries @ items.T + added, ((0, 0), (1, 0)))
    )
    for query, rows, order in zip(scores, subsets, found, strict=True):
      assert order.tolist() == rows[np.argsort(-query[rows + 1], kind="stable")].tolist()

  def test_wrong_ones_are_refused(self, given):
    queries, gallery, added, target, exclude = given
    for wrong, message in (
      (added[:, 1:], r"added: expected \[37, 53\], got \[37, 52\]"),
      (np.where(added == 3, np.nan, added), "added: .* not finite"),
    ):
      with pytest.raises(ValueError, match=message):
        ranking.target_ranks(queries, gallery, target, exclude, added=wrong)
      with pytest.raises(ValueError, match=message):
        ranking.top_k(queries, gallery, 3, exclude, added=wrong)


class TestMemory:
  def test_a_block_needs_its_scores_and_little_more(self):
    # More would grow with the gallery times the block: a mask, a sorted copy, indices.
    b, g, d = 64, 40_000, 8
    args = (np.zeros((b, d), np.float32), np.zeros((g, d), np.float32))
    positions = np.zeros((b, 3), np.int32)
    compiled = ranking._rank_block.lower(*args, positions, positions[:, 0]).compile()
    memory = compiled.memory_analysis()
    assert 4 * b * g <= memory.temp_size_in_bytes < 1.1 * 4 * b * g
    assert memory.output_size_in_bytes == 4 * b

  def test_features_of_the_encoder_are_used_where_they_lie(self):
    features = ranking.empty_features(33, 7)
    assert features.shape == (33, 7)
    features[:] = 1
    on_device = jax.device_put(features)
    assert on_device.unsafe_buffer_pointer() == features.ctypes.data

  def test_count_reaches_across_pieces(self):
    rng = np.random.default_rng(6)
    queries, gallery = small_integers(rng, 9, 4), small_integers(rng, 2 * 1024 + 5, 4)
    target, exclude = rng.integers(0, len(gallery), 9), rng.integers(-1, len(gallery), 9)
    np.testing.assert_array_equal(
      ranking.target_ranks(queries, gallery, target, exclude),
      stable_ranks(queries @ gallery.T, target, exclude),
    )


class TestSubsets:
  """A few items of its own for every query."""

  def test_is_a_stable_sort_by_score(self):
    rng = np.random.default_rng(3)
    queries, items = small_integers(rng, 700, 6), small_integers(rng, 40, 6)
    subsets = np.sort(rng.permuted(np.tile(np.arange(40), (700, 1)), axis=1)[:, :5], axis=1)
    found = ranking.subset_order(queries, items, subsets)
    scores = queries @ items.T
    for query, rows, order in zip(scores, subsets, found, strict=True):
      assert order.tolist() == rows[np.argsort(-query[rows], kind="stable")].tolist()

  def test_places_without_an_item_stand_last(self):
    queries, items = np.eye(2, dtype=np.float32), -np.eye(2, dtype=np.float32)
    found = ranking.subset_order(queries, items, np.array([[-1, 0, 1], [0, -1, -1]]))
    assert found.tolist() == [[1, 0, -1], [0, -1, -1]]

  def test_equal_items_score_the_same_whatever_their_place(self):
    rng = np.random.default_rng(4)
    queries = rng.normal(size=(300, 129)).astype(np.float32)
    items = np.repeat(rng.normal(size=(1, 129)), 7, axis=0).astype(np.float32)
    found = ranking.subset_order(queries, items, np.tile(np.arange(7), (300, 1)))
    assert (found == np.arange(7)).all()
