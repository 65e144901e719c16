"""Discs on an image: area, colour, place, scale."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from crn_jax.reports.pictures import canvas, discs, palette

MORE, LESS = (np.array(ImageColor.getrgb(c)) for c in (palette.VERMILLION, palette.BLUE))
GREY = np.full((32, 32, 3), 128, np.uint8)


def near(picture, colour):
  return np.abs(np.asarray(picture).astype(int) - colour).max(axis=-1) < 12


def overlay(values, end=1.0, side=160, picture=GREY):
  return np.asarray(discs.overlay(picture, np.asarray(values, float), end, side))


def test_more_and_less_have_their_colours_at_their_places():
  picture = overlay([[1, 2], [0, 1]])
  assert near(picture[40:41, 120:121], MORE).all()
  assert near(picture[120:121, 40:41], LESS).all()
  for quarter in (picture[:80, :80], picture[80:, 80:]):  # Uniform.
    assert (quarter == 128).all()


def test_the_area_is_the_distance_from_uniform():
  areas = [near(overlay([[1 + d]], end=4.0), MORE).sum() for d in (1, 2, 4)]
  # A white edge and soft borders take a few per cent of the smallest disc.
  np.testing.assert_allclose(np.array(areas) / areas[-1], [0.25, 0.5, 1], atol=0.02)


def test_beyond_the_scale_a_disc_fills_its_position_and_no_more():
  np.testing.assert_array_equal(overlay([[9.0]], end=1.0), overlay([[2.0]], end=1.0))
  picture = overlay([[9.0, 1.0]])
  assert (picture[:, 80:] == 128).all()


def test_the_image_keeps_its_colours_between_the_discs():
  red = np.zeros((32, 32, 3), np.uint8) + np.array([200, 30, 40], np.uint8)
  picture = overlay(np.full((4, 4), 1.25), picture=red)
  assert (picture == (200, 30, 40)).all(axis=-1).mean() > 0.7


def test_a_disc_is_told_from_an_image_of_its_colour():
  image = np.zeros((32, 32, 3), np.uint8) + MORE.astype(np.uint8)
  # The blue of neither is above 0; the white edge around is.
  assert (overlay([[2.0]], picture=image)[..., 2] > 120).sum() > 400


def test_maps_need_not_be_square():
  picture = overlay([[2.0, 1.0, 0.0]], side=120)
  assert near(picture[60, 20], MORE)
  assert near(picture[60, 100], LESS)
  assert (picture[:30] == 128).all()  # Discs are as wide as their positions.


@pytest.mark.parametrize(
  ("values", "end"),
  [([1.0], 0.5), ([0.9, 1.2], 0.5), ([0.2, 1.3], 1.0), ([0.5, 2.6], 2.0), ([1, 30], 4.0)],
)
def test_the_scale_reaches_as_far_as_the_values_within_limits(values, end):
  assert discs.scale_end(np.array(values)) == end


@pytest.mark.parametrize(
  ("end", "labels"),
  [(0.5, ["0.5 x", "1 x", "1.5 x"]), (2.0, ["0 x", "1 x", "3 x"]),
   (4.0, ["0 x", "1 x", "5 x or more"])],
)  # fmt: skip
def test_the_legend_names_its_ends(monkeypatch, end, labels):
  texts, text = [], discs.ImageDraw.ImageDraw.text

  def recording(self, xy, string, *args, **kwargs):
    texts.append(string)
    return text(self, xy, string, *args, **kwargs)

  monkeypatch.setattr(discs.ImageDraw.ImageDraw, "text", recording)
  legend = discs.legend(end, canvas.font(12))
  assert isinstance(legend, Image.Image)
  assert texts == labels
  blue, orange = (near(legend, colour).any(axis=0) for colour in (LESS, MORE))
  assert np.flatnonzero(blue).max() < legend.width / 2 < np.flatnonzero(orange).min()
