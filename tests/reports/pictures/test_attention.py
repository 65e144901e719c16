"""Pictures of attention: what is drawn where, for maps and for a single position."""

import numpy as np
import pytest
from PIL import Image

from crn_jax.reports.pictures import attention, canvas
from crn_jax.reports.pictures.attention import AttentionRow, Word

FIRST, LAST = attention._COLOURS[0], attention._COLOURS[-1]


def row(n_words=3, grid=(4, 4), **changes):
  rng = np.random.default_rng(0)
  weights = rng.random((n_words, *grid))
  values = {
    "reference": np.full((32, 32, 3), 128, np.uint8),
    "text": "is blue",
    "outcome": "found: target at rank 1",
    "words": tuple(Word(f"word{i}") for i in range(n_words)),
    "local": weights / weights.sum(axis=0),
    "global_": weights / weights.sum(axis=(1, 2), keepdims=True),
  }
  return AttentionRow(**(values | changes))


def draw(rows, folder, title="demo") -> np.ndarray:
  path = folder / "attention.png"
  attention.attention_maps(rows, path, title=title)
  with Image.open(path) as picture:
    return np.asarray(picture)


@pytest.fixture
def drawn(monkeypatch):
  """The weights of every heat map, in the order of drawing, and every text."""
  maps, texts = [], []
  overlay, text = attention.overlay, attention.ImageDraw.ImageDraw.text

  def recording_overlay(picture, weights, end, side):
    maps.append((weights, end))
    return overlay(picture, weights, end, side)

  def recording_text(self, xy, string, *args, **kwargs):
    texts.append(string)
    return text(self, xy, string, *args, **kwargs)

  monkeypatch.setattr(attention, "overlay", recording_overlay)
  monkeypatch.setattr(attention.ImageDraw.ImageDraw, "text", recording_text)
  return maps, texts


class TestOverlay:
  def test_the_colours_are_where_the_weights_are(self):
    weights = np.zeros((4, 4))
    weights[0, 3] = 0.5
    picture = np.asarray(attention.overlay(np.zeros((32, 32, 3), np.uint8), weights, 0.5, 64))
    np.testing.assert_allclose(picture[2, -3], attention._OPACITY * LAST, atol=1)
    np.testing.assert_allclose(picture[-3, 2], attention._OPACITY * FIRST, atol=1)

  def test_the_image_shows_through(self):
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, 16:] = 255
    drawn = np.asarray(attention.overlay(picture, np.zeros((4, 4)), 1.0, 64)).astype(int)
    assert (drawn[:, -8:] - drawn[:, :8]).min() > 80

  def test_weights_beyond_the_scale_get_its_last_colour(self):
    drawn = np.asarray(attention.overlay(np.zeros((8, 8, 3), np.uint8), np.full((2, 2), 9), 1.0, 8))
    np.testing.assert_allclose(drawn[0, 0], attention._OPACITY * LAST, atol=1)


class TestMaps:
  def test_every_word_has_a_map_a_branch_and_the_global_branch_its_mean(self, drawn, tmp_path):
    maps, texts = drawn
    one = row(n_words=3)
    draw([one], tmp_path)
    expected = [w for pair in zip(one.local, one.global_, strict=True) for w in pair]
    expected.append(one.global_.mean(axis=0))
    assert len(maps) == 7
    for (weights, _), wanted in zip(maps, expected, strict=True):
      np.testing.assert_allclose(weights, wanted)
    assert {"word0", "word1", "word2", "all words", "local", "global"} <= set(texts)

  def test_the_share_below_is_a_mean_for_local_and_the_largest_for_global(self, drawn, tmp_path):
    _, texts = drawn
    local = np.array([[[0.1, 0.3]], [[0.9, 0.7]]])
    global_ = np.array([[[0.35, 0.65]], [[0.75, 0.25]]])
    draw([row(n_words=2, local=local, global_=global_)], tmp_path)
    # Ends of the two scales, then by word; the mean of the global maps is [0.55, 0.45].
    shares = [t for t in texts if t.endswith(" %")]
    assert shares == ["90 %", "75 %", "20 %", "65 %", "80 %", "75 %", "55 %"]

  def test_all_queries_share_the_scale_of_a_branch(self, drawn, tmp_path):
    maps, _ = drawn
    faint = row(local=np.full((3, 4, 4), 0.2))
    strong = row(local=np.full((3, 4, 4), 0.6))
    draw([faint, strong], tmp_path)
    ends = [end for _, end in maps]
    assert ends[0] == ends[7] == 0.6  # The first local map of either query.

  def test_more_words_than_a_line_holds_make_the_picture_taller_not_wider(self, tmp_path):
    few = draw([row(n_words=9)], tmp_path)
    many = draw([row(n_words=10)], tmp_path)  # The mean is the eleventh.
    assert many.shape[0] > few.shape[0]
    assert many.shape[1] == few.shape[1]
    assert (many[:, -10:] == 255).all()

  def test_notes_of_words_are_drawn(self, drawn, tmp_path):
    _, texts = drawn
    draw([row(n_words=1, words=(Word("qqq", "unknown"),))], tmp_path)
    assert "qqq" in texts
    assert "unknown" in texts


class TestOnePosition:
  """A model that pools its map to 1 x 1, as the PyTorch release does."""

  def test_words_become_bars_and_nothing_is_drawn_on_the_image(self, drawn, tmp_path):
    maps, texts = drawn
    local = np.array([0.2, 0.3, 0.5]).reshape(3, 1, 1)
    picture = draw([row(grid=(1, 1), local=local, global_=np.ones((3, 1, 1)))], tmp_path)
    assert maps == []
    assert any("pools the map to 1 x 1" in t for t in texts)
    assert [t for t in texts if t.endswith(" %")] == ["20 %", "30 %", "50 %"]
    lengths = (picture == canvas.BLUE).all(axis=-1).sum(axis=1)
    bars = [n for n, before in zip(lengths[1:], lengths, strict=False) if n and not before]
    np.testing.assert_allclose(np.array(bars) / bars[-1], [0.4, 0.6, 1.0], atol=0.01)

  def test_the_longest_bar_stays_inside_the_picture(self, tmp_path):
    picture = draw([row(n_words=1, grid=(1, 1), local=np.ones((1, 1, 1)))], tmp_path)
    assert (picture[:, -10:] == 255).all()


class TestErrors:
  def test_no_queries(self, tmp_path):
    with pytest.raises(ValueError, match="at least one query"):
      attention.attention_maps([], tmp_path / "a.png", title="demo")

  @pytest.mark.parametrize(
    "changes",
    [{"local": np.ones((2, 4, 4))}, {"global_": np.ones((3, 2, 2))}, {"local": np.ones((3, 4))}],
  )
  def test_weights_that_fit_neither_words_nor_each_other(self, changes):
    with pytest.raises(ValueError, match=r"two arrays \[3, h, w\] for 3 words"):
      row(**changes)
