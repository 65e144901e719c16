"""Hinton diagrams on an image: a disc at each position of a map.

Its area is the distance of a value from 1, in one colour above it and in another below. Discs, not
a coat of colour, because between them an image keeps its own colours.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from crn_jax.reports.pictures import palette

_FINE = 4  # How much larger discs are drawn than shown: Pillow's own have jagged edges.
_FILL = 0.94  # Diameter of the largest disc, in sides of its position.
_LANCZOS = Image.Resampling.LANCZOS
# How far a scale reaches from 1. At least so far, lest noise look like a finding; at most so far,
# lest a single value hide all others.
_ENDS = (0.5, 4.0)
_COUNT, _SIDE = 9, 28  # Discs in a legend, and pixels of each.
_GREY = 225  # Behind them.
_LABEL = 18  # Pixels of the line below.


def scale_end(values: np.ndarray) -> float:
  """How far the scale of some values reaches from 1, on both sides.

  As far as the values, rounded up to a half and within limits.
  """
  farthest = float(np.abs(values - 1).max())
  return float(np.clip(math.ceil(2 * farthest) / 2, *_ENDS))


def overlay(picture: np.ndarray, values: np.ndarray, end: float, side: int) -> Image.Image:
  """A picture with a disc at each position.

  Args:
    picture: [s, s, 3] uint8.
    values: [h, w].
    end: distance from 1 from which on a disc fills its position, see `scale_end`.
    side: of the result, in pixels.
  """
  large = Image.fromarray(picture).resize((side * _FINE, side * _FINE), _LANCZOS)
  draw = ImageDraw.Draw(large)
  step_y, step_x = (large.height / n for n in values.shape)
  for (i, j), value in np.ndenumerate(values):
    away = (float(value) - 1) / end
    radius = _FILL * min(step_x, step_y) / 2 * math.sqrt(min(abs(away), 1))
    if radius < _FINE:  # Less than a pixel.
      continue
    x, y = (j + 0.5) * step_x, (i + 0.5) * step_y
    # White around it, as the image may have the disc's colour.
    draw.ellipse(
      (x - radius, y - radius, x + radius, y + radius),
      fill=palette.VERMILLION if away > 0 else palette.BLUE,
      outline=palette.WHITE,
      width=_FINE if radius > 3 * _FINE else 1,
    )
  return large.resize((side, side), _LANCZOS)


def legend(end: float, font) -> Image.Image:
  """Discs from 0, or where the scale begins, to its end, with what they stand for below."""
  sheet = Image.new("RGB", (_COUNT * _SIDE, _SIDE + _LABEL), palette.WHITE)
  draw = ImageDraw.Draw(sheet)
  middle, begin = _COUNT // 2, max(0.0, 1 - end)
  values = [*np.linspace(begin, 1, middle, endpoint=False), *np.linspace(1, 1 + end, middle + 1)]
  grey = np.full((1, 1, 3), _GREY, np.uint8)
  for i, value in enumerate(values):
    sheet.paste(overlay(grey, np.array([[value]]), end, _SIDE), (i * _SIDE, 0))
  last = f"{1 + end:g} x{' or more' if end == _ENDS[1] else ''}"
  y = _SIDE + _LABEL / 2
  for x, label, anchor in (
    (0, f"{begin:g} x", "lm"),
    ((middle + 0.5) * _SIDE, "1 x", "mm"),
    (sheet.width, last, "rm"),
  ):
    draw.text((x, y), label, fill=palette.FAINT, font=font, anchor=anchor)
  return sheet
