"""The palette: legible, and the only place of colours."""

import pathlib
import re

import pytest
from PIL import ImageColor

from crn_jax import reports
from crn_jax.reports.pictures import palette


def luminance(colour):
  """Relative luminance of WCAG 2."""
  channels = [c / 255 for c in ImageColor.getrgb(colour)]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
  high, low = sorted((luminance(one), luminance(other)), reverse=True)
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [palette.LIGHT, palette.DARK, palette.PRINT])
def test_texts_can_be_read_on_their_ground(theme):
  pairs = (("ink", "background"), ("faint", "background"), ("warn", "warn-background"))
  for text, ground in pairs:
    assert contrast(theme[text], theme[ground]) >= 4.5, text  # WCAG 2, level AA.


def test_the_themes_name_the_same_colours():
  assert palette.LIGHT.keys() == palette.DARK.keys() == palette.PRINT.keys()


def test_colours_live_here_alone():
  folder = pathlib.Path(reports.__path__[0])
  for path in [*folder.rglob("*.py"), *folder.rglob("*.html")]:
    if path.name != "palette.py":
      assert not re.search(r"#(?:[0-9a-fA-F]{3}){1,2}\b", path.read_text()), path
