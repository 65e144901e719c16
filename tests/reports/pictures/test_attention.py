"""Pictures of attention: what is drawn where, for maps and for a single position."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from crn_jax.reports.pictures import attention, discs, palette
from crn_jax.reports.pictures.attention import POSITIONS, WORDS, AttentionRow, Word


def row(n_words=3, grid=(4, 4), **changes):
  rng = np.random.default_rng(0)
  weights = rng.random((n_words, *grid))
  values = {
    "reference": np.full((32, 32, 3), 128, np.uint8),
    "text": "is blue",
    "outcome": "found: target at rank 1",
    "words": tuple(Word(f"word{i}") for i in range(n_words)),
    "attention": {
      "fusion": weights / weights.sum(axis=0),
      "look": weights / weights.sum(axis=(1, 2), keepdims=True),
    },
    "sums_over": {"fusion": WORDS, "look": POSITIONS},
    "notes": {"fusion": "Which words are fused.", "look": "Where a word looks."},
  }
  return AttentionRow(**(values | changes))


def one_part(weights, sums_over, **changes):
  """A row with a single part, of words w0, w1, ..."""
  values = {"attention": {"part": np.asarray(weights, float)}, "sums_over": {"part": sums_over},
            "notes": {"part": "A part."}}  # fmt: skip
  return row(n_words=len(weights), **(values | changes))


def draw(rows, folder, title="demo") -> np.ndarray:
  path = folder / "attention.png"
  attention.attention_maps(rows, path, title=title)
  with Image.open(path) as picture:
    return np.asarray(picture)


@pytest.fixture
def drawn(monkeypatch):
  """The values of every map with the end of their scale, in the order of drawing; every text."""
  maps, texts = [], []
  overlay, text = discs.overlay, attention.ImageDraw.ImageDraw.text

  def recording_overlay(picture, values, end, side):
    if side == attention._TILE:  # The others are the legend's.
      maps.append((values, end))
    return overlay(picture, values, end, side)

  def recording_text(self, xy, string, *args, **kwargs):
    texts.append(string)
    return text(self, xy, string, *args, **kwargs)

  monkeypatch.setattr(discs, "overlay", recording_overlay)
  monkeypatch.setattr(attention.ImageDraw.ImageDraw, "text", recording_text)
  return maps, texts


class TestColumns:
  WORDS = (Word("BOS", "marker"), Word("is", "stop word"), Word("blue"), Word("qqq", "unknown"),
           Word("now"))  # fmt: skip

  def test_words_of_content_come_first_and_the_rest_together(self):
    columns = attention.columns(row(n_words=5, words=self.WORDS))
    assert [(c.label, c.n_words) for c in columns] == [("blue", 1), ("now", 1),
                                                       ("all other words", 3)]  # fmt: skip

  def test_a_text_of_content_alone_has_no_rest_and_one_without_any_nothing_else(self):
    assert [c.label for c in attention.columns(row(n_words=2))] == ["word0", "word1"]
    (column,) = attention.columns(row(n_words=1, words=(Word("BOS", "marker"),)))
    assert column.label == "all other words"

  def test_uniform_attention_is_one(self):
    uniform = {"fusion": np.full((5, 2, 3), 1 / 5), "look": np.full((5, 2, 3), 1 / 6)}
    for column in attention.columns(row(n_words=5, words=self.WORDS, attention=uniform)):
      for part in uniform:
        np.testing.assert_allclose(column.multiples[part], 1, rtol=1e-15)

  def test_what_sums_over_words_is_compared_with_the_same_share_of_every_word(self):
    weights = np.array([0.1, 0.1, 0.5, 0.2, 0.1])[:, None, None]
    blue, now, others = attention.columns(one_part(weights, WORDS, words=self.WORDS))
    shares = [c.weights["part"].item() for c in (blue, now, others)]
    np.testing.assert_allclose(shares, [0.5, 0.1, 0.4])  # All of it.
    multiples = [c.multiples["part"].item() for c in (blue, now, others)]
    np.testing.assert_allclose(multiples, [2.5, 0.5, 0.4 / (3 / 5)])

  def test_what_sums_over_positions_is_compared_with_the_same_share_of_every_position(self):
    weights = np.array([[[0.3, 0.7]], [[0.9, 0.1]], [[0.5, 0.5]]])
    words = (Word("blue"), Word("is", "stop word"), Word("BOS", "marker"))
    blue, others = attention.columns(one_part(weights, POSITIONS, words=words))
    np.testing.assert_allclose(blue.weights["part"], [[0.3, 0.7]])
    np.testing.assert_allclose(blue.multiples["part"], [[0.6, 1.4]])
    np.testing.assert_allclose(others.weights["part"], [[0.7, 0.3]])
    np.testing.assert_allclose(others.multiples["part"], [[1.4, 0.6]])


class TestMaps:
  def test_every_column_has_a_map_a_part_in_the_order_of_the_parts(self, drawn, tmp_path):
    maps, texts = drawn
    one = row(n_words=3)
    draw([one], tmp_path)
    expected = [c.multiples[p] for c in attention.columns(one) for p in ("fusion", "look")]
    assert len(maps) == 6
    for (values, _), wanted in zip(maps, expected, strict=True):
      np.testing.assert_array_equal(values, wanted)
    assert {"word0", "word1", "word2", "fusion", "look"} <= set(texts)

  def test_a_model_of_one_part_under_any_name(self, drawn, tmp_path):
    maps, texts = drawn
    draw([one_part(np.full((2, 3, 3), 1 / 9), POSITIONS)], tmp_path)
    assert len(maps) == 2
    assert "part" in texts
    assert any(
      t.startswith("A part. Each word's weights sum to 100 % over the 3 x 3") for t in texts
    )

  def test_below_a_map_stands_the_mean_over_positions_or_the_largest(self, drawn, tmp_path):
    _, texts = drawn
    over_words = np.array([[[0.1, 0.3]], [[0.9, 0.7]]])
    over_positions = np.array([[[0.35, 0.65]], [[0.75, 0.25]]])
    draw([row(2, attention={"fusion": over_words, "look": over_positions})], tmp_path)
    assert [t for t in texts if t.endswith(" %)")] == [
      "mean 0.4 x (20 %)", "largest 1.3 x (65 %)", "mean 1.6 x (80 %)", "largest 1.5 x (75 %)"
    ]  # fmt: skip

  def test_all_queries_share_the_scale_of_a_part(self, drawn, tmp_path):
    maps, _ = drawn
    even = one_part(np.full((4, 2, 2), 0.25), WORDS)
    uneven = one_part(np.array([0.7, 0.1, 0.1, 0.1])[:, None, None] * np.ones((2, 2)), WORDS)
    draw([even, uneven], tmp_path)
    assert [end for _, end in maps] == [2.0] * 8  # 0.7 is 2.8 times uniform: 1.8, rounded up.

  def test_the_legend_says_what_a_part_means_and_what_is_uniform(self, drawn, tmp_path):
    _, texts = drawn
    draw([row()], tmp_path)
    text = " ".join(texts)
    assert "Which words are fused. At each position the words' weights sum to 100 %" in text
    assert "uniform (1 x) is 6.2 %" in text  # 4 x 4 positions.

  def test_the_words_that_share_a_map_are_named_beside_it(self, drawn, tmp_path):
    _, texts = drawn
    words = [Word("BOS", "marker"), Word("blue"), *[Word("PAD", "padding")] * 6]
    draw([row(n_words=8, words=tuple(words))], tmp_path)
    assert "All other words: BOS (marker); PAD x 6 (padding)" in " ".join(texts)

  def test_more_words_than_a_line_holds_make_the_picture_taller_not_wider(self, tmp_path):
    few = draw([row(n_words=8)], tmp_path)
    many = draw([row(n_words=9)], tmp_path)
    assert many.shape[0] > few.shape[0]
    assert many.shape[1] == few.shape[1]
    assert (many[:, -10:] == 255).all()


class TestOnePosition:
  """A model that pools its map to 1 x 1, as the PyTorch release does."""

  def pooled(self, shares, **changes):
    weights = np.array(shares)[:, None, None]
    attention_ = {"fusion": weights, "look": np.ones_like(weights)}
    return row(n_words=len(shares), attention=attention_, **changes)

  def test_words_become_bars_and_nothing_is_drawn_on_the_image(self, drawn, tmp_path):
    maps, texts = drawn
    picture = draw([self.pooled([0.2, 0.3, 0.5])], tmp_path)
    assert maps == []
    assert any("pools the map to 1 x 1" in t for t in texts)
    assert any(t.startswith("look: Where a word looks. Always 100 %") for t in texts)
    assert [t for t in texts if t.endswith(" x)")] == ["20 % (0.6 x)", "30 % (0.9 x)",
                                                       "50 % (1.5 x)"]  # fmt: skip
    blue = (picture == ImageColor.getrgb(palette.BLUE)).all(axis=-1)
    rows_of_bars = blue[:, : attention._WIDTH].any(axis=1)
    first = np.flatnonzero(rows_of_bars & ~np.roll(rows_of_bars, 1))
    lengths = [np.flatnonzero(blue[y]).max() - np.flatnonzero(blue[y]).min() + 1 for y in first]
    np.testing.assert_allclose(np.array(lengths) / lengths[-1], [0.4, 0.6, 1.0], atol=0.002)

  def test_the_mark_of_uniform_attention_is_at_its_share(self, tmp_path):
    # The mark of the rest, of 3 in 4 words, is the longest that is drawn.
    words = (Word("blue"), *[Word("is", "stop word")] * 3)
    picture = draw([self.pooled([0.5, 0.1, 0.2, 0.2], words=words)], tmp_path)
    ink = (picture == ImageColor.getrgb(palette.INK)).all(axis=-1)
    # A mark is a line two pixels wide and higher than any letter.
    runs = ink.sum(axis=0)[attention._LEFT + 2 * attention._TILE :]
    blue, blue_right, rest, rest_right = np.flatnonzero(runs >= attention._BAR - 3)
    assert (blue_right - blue, rest_right - rest) == (1, 1)
    assert rest / blue == pytest.approx(3, abs=0.01)

  def test_a_single_word_stays_inside_the_picture(self, tmp_path):
    picture = draw([self.pooled([1.0])], tmp_path)
    assert (picture[:, -10:] == 255).all()

  def test_without_a_part_over_words_there_are_no_bars(self, drawn, tmp_path):
    _, texts = drawn
    draw([one_part(np.ones((2, 1, 1)), POSITIONS)], tmp_path)
    assert not [t for t in texts if t.endswith(" x)")]


class TestErrors:
  def test_no_queries(self, tmp_path):
    with pytest.raises(ValueError, match="at least one query"):
      attention.attention_maps([], tmp_path / "a.png", title="demo")

  @pytest.mark.parametrize(
    "weights",
    [
      {"fusion": np.ones((2, 4, 4))},
      {"fusion": np.ones((3, 4, 4)), "look": np.ones((3, 2, 2))},
      {"fusion": np.ones((3, 4))},
      {"fusion": np.ones((3, 0, 0))},
      {},
    ],
  )
  def test_weights_that_fit_neither_words_nor_each_other(self, weights):
    with pytest.raises(ValueError, match=r"of one shape \[3, h, w\] for 3 words"):
      row(attention=weights)

  def test_no_words(self):
    with pytest.raises(ValueError, match="for 0 words"):
      row(n_words=0, attention={"fusion": np.ones((0, 4, 4))})

  @pytest.mark.parametrize("changes", [{"sums_over": {"fusion": WORDS, "look": "all"}},
                                       {"sums_over": {"fusion": WORDS}},
                                       {"notes": {"fusion": ""}}])  # fmt: skip
  def test_a_part_of_which_too_little_is_said(self, changes):
    with pytest.raises(ValueError, match="'look' needs"):
      row(**changes)

  def test_rows_that_differ_in_parts_or_size(self, tmp_path):
    for other in (one_part(np.ones((3, 4, 4)), WORDS), row(grid=(2, 2))):
      with pytest.raises(ValueError, match="same parts and map size"):
        draw([row(), other], tmp_path)
