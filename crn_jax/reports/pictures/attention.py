"""The attention between words and positions, drawn as heat maps on the reference image.

A query is drawn as a block: at the left the reference image and the text, at the right its words,
each with a heat map a branch, and the mean of the global branch's maps. (The local branch's mean is
the same at every position.) The colour scale of a branch is the same in the whole picture.
"""

import dataclasses
import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crn_jax.reports.pictures import canvas

# All lengths here are pixels.
_MARGIN = 20
_CELL = 92
_GAP = 8
_WORDS_PER_LINE = 10
_REFERENCE = 160
_SIDE = 78  # Between reference and heat maps: names of the branches.
_NOTE = 15
_LABEL = 38  # A word and its note, with room for descenders.
_LINE = _LABEL + 2 * (_CELL + _NOTE + 4) + _GAP  # A line of words with their maps.
_BAR = 20
_LEGEND_LINE = 44
_MAX_TITLE_LINES = 4
_MAX_TEXT_LINES = 10
_SCALE = (240, 14)
_LEGEND_GREY = 170
_OPACITY = 0.62  # Of the colours on the image.
_LEFT = _MARGIN + _REFERENCE + _GAP
_WIDTH = _LEFT + _SIDE + _WORDS_PER_LINE * (_CELL + _GAP) - _GAP + _MARGIN

_LANCZOS = Image.Resampling.LANCZOS
# Even in lightness, and told apart with every kind of colour blindness.
_COLOURS = (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Word:
  """A word as the model reads it.

  Attributes:
    text: the word.
    note: what is special about it, e.g. "marker" or "unknown"; "" for an ordinary word.
  """

  text: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class AttentionRow:
  """One query and what its two branches attend to.

  Attributes:
    reference: [s, s, 3] uint8, the crop that the model sees.
    text: modification text.
    outcome: what became of the query, e.g. "target at rank 3".
    words: the words, in order.
    local: [words, h, w]; share of each word at a position, sums to 1 over the words.
    global_: [words, h, w]; share of each position for a word, sums to 1 over the positions.
  """

  reference: np.ndarray
  text: str
  outcome: str
  words: tuple[Word, ...]
  local: np.ndarray
  global_: np.ndarray

  def __post_init__(self):
    shapes = {len(self.words), len(self.local), len(self.global_)}
    if len(shapes) > 1 or self.local.shape != self.global_.shape or self.local.ndim != 3:
      raise ValueError(
        f"attention: expected two arrays [{len(self.words)}, h, w] for {len(self.words)} words, "
        f"got {self.local.shape} and {self.global_.shape}"
      )


def attention_maps(rows: Sequence[AttentionRow], path: str | os.PathLike, *, title: str) -> None:
  """Writes a PNG with one block of heat maps per query.

  Where the map has a single position there is nothing to draw on the image: the words' weights in
  the local branch are drawn as bars.

  Args:
    rows: the queries; all of one map size.
    path: the PNG file. Its folder is created; the file appears complete or not at all.
    title: what the picture shows. Wrapped if it is wider than the picture.

  Raises:
    ValueError: there are no rows.
    OSError: the file cannot be written.
  """
  if not rows:
    raise ValueError("a picture of attention needs at least one query")
  grid = rows[0].local.shape[1:]
  pooled = grid == (1, 1)
  fonts = _Fonts(*(canvas.font(s) for s in (19, 14, 12)))
  title_lines = canvas.wrap(title, fonts.title, _WIDTH - 2 * _MARGIN, _MAX_TITLE_LINES)
  texts = [canvas.wrap(r.text, fonts.text, _REFERENCE, _MAX_TEXT_LINES) for r in rows]
  outcomes = [canvas.wrap(r.outcome, fonts.note, _REFERENCE, 3) for r in rows]
  heights = [
    max(
      _REFERENCE
      + _GAP
      + canvas.text_height(text, fonts.text)
      + canvas.text_height(outcome, fonts.note),
      _bars_height(row) if pooled else _maps_height(row),
    )
    for row, text, outcome in zip(rows, texts, outcomes, strict=True)
  ]
  top = _MARGIN + canvas.text_height(title_lines, fonts.title) + _GAP
  legend_height = 2 * canvas.line_height(fonts.text) if pooled else 2 * _LEGEND_LINE
  first = top + legend_height + _GAP
  height = first + sum(h + 2 * _GAP + _MARGIN for h in heights)

  sheet = Image.new("RGB", (_WIDTH, height), canvas.WHITE)
  draw = ImageDraw.Draw(sheet)
  canvas.draw_lines(draw, (_MARGIN, _MARGIN), title_lines, fonts.title, canvas.INK)
  # A branch's largest weight among these queries is the end of its scale.
  ends = (max(float(r.local.max()) for r in rows), max(float(r.global_.max()) for r in rows))
  if pooled:
    _draw_pooled_legend(draw, top, fonts)
  else:
    _draw_legend(sheet, draw, top, grid, ends, fonts)
  y = first
  for row, text, outcome, row_height in zip(rows, texts, outcomes, heights, strict=True):
    draw.line((_MARGIN, y, _WIDTH - _MARGIN, y), fill=canvas.RULE)
    y += _GAP + 4
    reference = Image.fromarray(row.reference).resize((_REFERENCE, _REFERENCE), _LANCZOS)
    sheet.paste(reference, (_MARGIN, y))
    below = y + _REFERENCE + _GAP // 2
    canvas.draw_lines(draw, (_MARGIN, below), text, fonts.text, canvas.INK)
    below += canvas.text_height(text, fonts.text) + 2
    canvas.draw_lines(draw, (_MARGIN, below), outcome, fonts.note, canvas.FAINT)
    if pooled:
      _draw_bars(draw, y, row, ends[0], fonts)
    else:
      _draw_maps(sheet, draw, y, row, ends, fonts)
    y += row_height + _GAP + _MARGIN - 4
  canvas.write_png(sheet, path)


def overlay(picture: np.ndarray, weights: np.ndarray, end: float, side: int) -> Image.Image:
  """Weights as colours on an image in grey.

  Args:
    picture: [s, s, 3] uint8.
    weights: [h, w], 0 or more; enlarged bilinearly.
    end: weight that gets the last colour of the scale.
    side: of the result, in pixels.
  """
  grey = Image.fromarray(picture).convert("L").resize((side, side), _LANCZOS)
  enlarged = Image.fromarray(weights.astype(np.float32)).resize(
    (side, side), Image.Resampling.BILINEAR
  )
  colours = _COLOURS[np.clip(np.asarray(enlarged) / end * 255, 0, 255).astype(int)]
  return _mixed(colours, np.asarray(grey)[..., None])


def _mixed(colours: np.ndarray, grey) -> Image.Image:
  return Image.fromarray((_OPACITY * colours + (1 - _OPACITY) * grey).astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class _Fonts:
  title: ImageFont.FreeTypeFont
  text: ImageFont.FreeTypeFont
  note: ImageFont.FreeTypeFont


def _maps_height(row: AttentionRow) -> int:
  n_maps = len(row.words) + 1  # The mean is the last.
  return -(-n_maps // _WORDS_PER_LINE) * _LINE


def _bars_height(row: AttentionRow) -> int:
  return len(row.words) * _BAR


def _draw_legend(sheet, draw, y: int, grid, ends, fonts: _Fonts) -> None:
  even = 1 / (grid[0] * grid[1])
  lines = (
    (
      "local",
      "how much each position listens to the word: at a position, the words' shares sum to 100 %. "
      "Below: mean share.",
    ),
    (
      "global",
      "where the word looks: a word's shares of the positions sum to 100 % "
      f"(evenly {_percent(even)} each of {grid[0]} x {grid[1]}, interpolated). "
      "Below: largest share.",
    ),
  )
  for (name, meaning), end in zip(lines, ends, strict=True):
    draw.text((_MARGIN, y), name, fill=canvas.INK, font=fonts.text)
    x = _MARGIN + 60
    # Drawn like a map on a plain picture, so that its colours are those below.
    ramp = _COLOURS[np.linspace(0, 255, _SCALE[0]).astype(int)][None].repeat(_SCALE[1], axis=0)
    sheet.paste(_mixed(ramp, _LEGEND_GREY), (x, y + 2))
    draw.text((x, y + 18), "0", fill=canvas.FAINT, font=fonts.note)
    draw.text(
      (x + _SCALE[0], y + 18), _percent(end), fill=canvas.FAINT, font=fonts.note, anchor="ra"
    )
    wrapped = canvas.wrap(
      meaning, fonts.text, _WIDTH - _MARGIN - (x + _SCALE[0] + 2 * _GAP), max_lines=2
    )
    canvas.draw_lines(draw, (x + _SCALE[0] + 2 * _GAP, y), wrapped, fonts.text, canvas.INK)
    y += _LEGEND_LINE


def _draw_pooled_legend(draw, y: int, fonts: _Fonts) -> None:
  lines = [
    "This model pools the map to 1 x 1: there is one position only, and nothing to draw on the "
    "image.",
    "Bars: weight of each word in the local branch, summing to 100 %. In the global branch every "
    "word looks at the one position.",
  ]
  canvas.draw_lines(draw, (_MARGIN, y), lines, fonts.text, canvas.INK)


def _draw_maps(sheet, draw, y: int, row: AttentionRow, ends, fonts: _Fonts) -> None:
  step = _CELL + _NOTE + 4  # From a branch to the next.

  def heat_map(x, top, weights, end, value):
    sheet.paste(overlay(row.reference, weights, end, _CELL), (x, top))
    centre = (x + _CELL / 2, top + _CELL + _NOTE / 2 + 1)
    draw.text(centre, _percent(value), fill=canvas.FAINT, font=fonts.note, anchor="mm")

  words = [*row.words, Word("all words", "mean")]
  for i, word in enumerate(words):
    line, column = divmod(i, _WORDS_PER_LINE)
    x, top = _LEFT + _SIDE + column * (_CELL + _GAP), y + line * _LINE
    _draw_word(draw, x, top, word, fonts)
    top += _LABEL
    if column == 0:
      for name, middle in (("local", top + _CELL / 2), ("global", top + step + _CELL / 2)):
        at = (_LEFT + _SIDE - 2 * _GAP, middle)
        draw.text(at, name, fill=canvas.INK, font=fonts.text, anchor="rm")
    if i < len(row.words):
      heat_map(x, top, row.local[i], ends[0], row.local[i].mean())
      looks = row.global_[i]
    else:
      looks = row.global_.mean(axis=0)
    heat_map(x, top + step, looks, ends[1], looks.max())


def _draw_word(draw, x: int, y: int, word: Word, fonts: _Fonts) -> None:
  (line,) = canvas.wrap(word.text, fonts.text, _CELL, max_lines=1) or [""]
  colour = canvas.FAINT if word.note else canvas.INK
  draw.text((x, y + _LABEL - 6), word.note, fill=canvas.FAINT, font=fonts.note, anchor="ls")
  lift = 20 if word.note else 6
  draw.text((x, y + _LABEL - lift), line, fill=colour, font=fonts.text, anchor="ls")


def _draw_bars(draw, y: int, row: AttentionRow, end: float, fonts: _Fonts) -> None:
  names = _LEFT + _SIDE + 2 * _CELL
  longest = _WIDTH - _MARGIN - names - 80
  for word, weight in zip(row.words, row.local.ravel(), strict=True):
    label = f"{word.text} ({word.note})" if word.note else word.text
    (line,) = canvas.wrap(label, fonts.text, names - _LEFT - _GAP, max_lines=1) or [""]
    colour = canvas.FAINT if word.note else canvas.INK
    middle = y + _BAR / 2
    draw.text((names - _GAP, middle), line, fill=colour, font=fonts.text, anchor="rm")
    length = max(1, round(longest * float(weight) / end))
    draw.rectangle((names, y + 3, names + length, y + _BAR - 4), fill=canvas.BLUE)
    at = (names + length + 6, middle)
    draw.text(at, _percent(weight), fill=canvas.FAINT, font=fonts.note, anchor="lm")
    y += _BAR


def _percent(share: float) -> str:
  percent = 100 * float(share)
  return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"
