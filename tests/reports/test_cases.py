"""Which queries are shown, and what is said of them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from crn_jax.input_pipeline import images
from crn_jax.methods.crn import CRN
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.reports import cases
from crn_jax.reports.pictures.attention import Word
from crn_jax.retrieval.encode import Encoder
from crn_jax.retrieval.metrics import UNRANKED
from tests import made_up, tiny_model


class TestChoice:
  RANKS = np.array([50, 3, 9, 10, 0, 700, 11, 4])

  def test_spread_takes_the_first_the_last_and_between_evenly(self):
    assert cases.spread(range(9), 3).tolist() == [0, 4, 8]
    assert cases.spread(range(2), 5).tolist() == [0, 1]
    assert cases.spread([], 5).tolist() == []

  def test_found_are_those_with_the_target_in_the_top_ten(self):
    assert cases.found(self.RANKS, 9).tolist() == [1, 2, 4, 7]
    assert cases.found(self.RANKS, 2).tolist() == [1, 7]

  def test_missed_go_from_the_nearest_to_the_farthest(self):
    assert cases.missed(self.RANKS, 9).tolist() == [3, 6, 0, 5]
    assert cases.missed(self.RANKS, 2).tolist() == [3, 5]

  def test_a_perfect_model_misses_nothing_and_a_useless_one_finds_nothing(self):
    assert not len(cases.missed(np.zeros(5, int), 3))
    assert not len(cases.found(np.full(5, 99), 3))


@pytest.fixture
def shown(tmp_path):
  """A configuration, a split of it and what was found on the split."""
  config = made_up.config()
  split = made_up.split(tmp_path)
  found = made_up.evaluation(config, made_up.dataset(split))
  return config, split, found


def all_rows(config, split, found):
  """Grid rows of every query."""
  (of_split,) = made_up.cases(config, made_up.dataset(split), found)
  every = np.arange(len(split.queries))
  of_all = dataclasses.replace(of_split, groups={"all": every})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cases.Cases, "choose", classmethod(lambda cls, *_: of_all))
    (of_all,) = made_up.cases(config, made_up.dataset(split), found)
  return of_all.grid_rows("all")


class TestGridRows:
  @pytest.mark.parametrize("protocol", ["val_split", "original_split"])
  def test_the_row_agrees_with_the_rank(self, shown, protocol):
    config, split, found = shown
    config.eval.best_metric = f"{protocol}/R@10"
    ranks = found.outcomes["dress"][protocol]["composed"].ranks
    rows = all_rows(config, split, found)
    assert {row.target_position is None for row in rows} == {True, False}
    for row, rank in zip(rows, ranks, strict=True):
      assert row.rank == rank
      assert row.target_position == (rank if rank < cases.TOP else None)
      if row.target_position is not None:
        assert row.top[row.target_position][0] == row.target
      scores = [score for _, score in row.top]
      assert scores == sorted(scores, reverse=True)

  def test_the_reference_is_shown_only_if_it_is_ranked(self, shown):
    config, split, found = shown
    encoded = found.encoded["dress"]
    # Queries that are their own reference image.
    own = type(encoded)(encoded.images, encoded.images[split.queries.reference], encoded.text_only)
    found = dataclasses.replace(found, encoded={"dress": own})

    def first(exclude):
      config.eval.exclude_reference = exclude
      row = all_rows(config, split, found)[4]
      return [path for path, _ in row.top], row.reference

    top, reference = first(exclude=False)
    assert top[0] == reference
    top, reference = first(exclude=True)
    assert reference not in top

  def test_a_gallery_smaller_than_the_top_is_shown_without_the_reference(self, shown):
    config, split, _ = shown
    split.galleries["val_split"] = np.arange(5)
    found = made_up.evaluation(config, made_up.dataset(split))
    first = all_rows(config, split, found)[0]
    assert len(first.top) == 4
    assert first.reference not in [path for path, _ in first.top]

  def test_a_target_outside_the_gallery_has_no_rank(self, shown):
    config, split, _ = shown
    split.galleries["val_split"] = np.arange(10)  # The targets of the last queries are beyond.
    found = made_up.evaluation(config, made_up.dataset(split))
    row = all_rows(config, split, found)[-1]
    assert (row.rank, row.target_position) == (None, None)


class TestWords:
  def words(self, texts, preset="crn", max_words=8):
    config = made_up.config(preset)
    config.data.max_words = max_words
    return cases.shown_words(texts, made_up.vocabulary(config))

  def test_markers_and_unknown_words_are_named(self):
    assert self.words(("is red", "is blue")) == [
      Word("BOS", "marker"), Word("is", "stop word"), Word("red", "unknown"),
      Word("AND", "marker"), Word("is", "stop word"), Word("blue"), Word("EOS", "marker"),
    ]  # fmt: skip

  def test_a_long_text_is_shown_as_it_is_cut(self):
    assert self.words(("is blue is blue",), max_words=4) == [
      Word("BOS", "marker"), Word("is", "stop word"), Word("blue"), Word("EOS", "marker")
    ]  # fmt: skip

  def test_the_release_reads_its_markers_as_words(self):
    assert self.words(("is blue", "is long"), "crn_released") == [
      Word("bos", "unknown"), Word("is", "stop word"), Word("blue"), Word("and", "unknown"),
      Word("is", "stop word"), Word("long"), Word("eos", "unknown"),
    ]  # fmt: skip

  @pytest.mark.parametrize("preset", ["crn", "crn_released"])
  def test_as_many_as_the_model_counts(self, preset):
    table = made_up.vocabulary(made_up.config(preset))
    for texts in (("is blue",), ("",), ("!!!", "is blue " * 9)):
      assert len(self.words(texts, preset)) == table.encode(texts)[1].sum()


# As of `made_up.config`.
SIZING = images.Sizing(32, 32, "bilinear")


def attended(split, ranks, chosen, attention, sizing=SIZING) -> cases.Cases:
  shown = cases.Cases.choose(split, "val_split", ranks, sizing)
  return dataclasses.replace(
    shown, attended=np.asarray(chosen), attention=attention, attention_notes=CRN.attention_notes
  )


class TestAttentionRows:
  def rows(self, tmp_path, config, chosen=(0, 1), last=40):
    split = made_up.split(tmp_path)
    table = made_up.vocabulary(config)
    weights = made_up.Encoder(config).attention(None, split, chosen, table)
    ranks = np.full(len(split.queries), 3)
    ranks[1] = last
    shown = attended(split, ranks, chosen, weights)
    return weights, shown.attention_rows(table, config)

  def test_padding_that_takes_no_part_is_left_out(self, tmp_path):
    weights, (first, second) = self.rows(tmp_path, made_up.config())
    assert [w.text for w in second.words] == ["BOS", "is", "red", "EOS"]
    for part in ("local", "global"):
      np.testing.assert_array_equal(second.attention[part], weights[part][1, :4])
    assert len(first.words) == 8

  def test_padding_that_acts_like_words_is_among_them(self, tmp_path):
    weights, (_, second) = self.rows(tmp_path, made_up.config("crn_released"))
    assert second.words == (
      Word("is", "stop word"), Word("red", "unknown"), *[Word("PAD", "padding")] * 6
    )  # fmt: skip
    for part in ("local", "global"):
      np.testing.assert_array_equal(second.attention[part], weights[part][1])

  def test_it_says_over_what_a_part_sums(self, tmp_path):
    _, (first, _) = self.rows(tmp_path, made_up.config())
    assert first.sums_over == {"local": "words", "global": "positions"}
    assert all(first.notes[part].endswith(".") for part in first.attention)

  def test_the_outcome_counts_from_one(self, tmp_path):
    _, (first, second) = self.rows(tmp_path, made_up.config())
    assert first.outcome == "found: target at rank 4"
    assert second.outcome == "missed: target at rank 41"
    assert second.text == "is red"

  def test_a_target_that_is_not_ranked_is_said_to_be(self, tmp_path):
    _, rows = self.rows(tmp_path, made_up.config(), chosen=(1,), last=UNRANKED)
    assert rows[0].outcome == "missed: target not ranked"

  def test_the_picture_is_the_crop_that_the_model_sees(self, tmp_path):
    _, rows = self.rows(tmp_path, made_up.config())
    assert rows[0].reference.shape == (32, 32, 3)

  @pytest.mark.parametrize("squeeze", [False, True])
  def test_the_picture_is_prepared_as_the_models(self, tmp_path, squeeze):
    split, sizing = made_up.split(tmp_path), dataclasses.replace(SIZING, squeeze=squeeze)
    path = split.image_paths[split.queries.reference[0]]
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    config = made_up.config()
    table = made_up.vocabulary(config)
    weights = made_up.Encoder(config).attention(None, split, [0], table)
    shown = attended(split, np.zeros(20, int), [0], weights, sizing)
    (row,) = shown.attention_rows(table, config)
    size = (32, 32) if squeeze else (38, 32)
    expected = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(row.reference, expected[:, (size[0] - 32) // 2 :][:, :32])


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("preset", "grid"), [("crn", (4, 4)), ("crn_released", (1, 1))])
def test_attention_of_a_model_sums_to_one_and_belongs_to_its_query(tmp_path, preset, grid):
  config = tiny_model.config(preset)
  config.data.resize = 32
  config.eval.batch_size = 8
  parallel = DataParallel.create("shard_map")
  encoder = Encoder.create(tiny_model.model(config, AXIS), parallel)
  variables = parallel.replicate(tiny_model.variables(config))
  table, split = made_up.vocabulary(config), made_up.split(tmp_path)
  chosen = np.array([3, 12, 0, 5, 6, 7, 8, 9, 18])  # More than a batch; first and last differ.
  found = encoder.attention(variables, split, chosen, table)
  words = config.data.max_words
  counted = np.ones((len(chosen), words), bool)
  if config.model.mask_padding:
    counted = table.encode_all([split.queries.texts[q] for q in chosen])[1]
  assert found["local"].shape == found["global"].shape == (9, words, *grid)
  np.testing.assert_allclose(found["local"].sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(found["global"].sum(axis=(2, 3)), 1, rtol=1e-5)
  assert (found["local"][~counted] == 0).all()
  alone = encoder.attention(variables, split, chosen[-1:], table)
  for branch in ("local", "global"):
    np.testing.assert_allclose(found[branch][-1], alone[branch][0], rtol=1e-4)
  rows = attended(split, np.zeros(20, int), chosen, found).attention_rows(table, config)
  assert [row.grid for row in rows] == [grid] * 9
