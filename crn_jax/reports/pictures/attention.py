"""The attention between words and positions, drawn as discs on the reference image.

A query is drawn as a block: at the left the reference image and the text, at the right a column a
word with a map for each part of the model. Words of content have a column of their own, all others
share the last one.

Weights are drawn against uniform attention, which gives each of n words or positions 1 / n: equal
discs say that a word is preferred everywhere, unequal ones where. The scale is symmetric in the
difference, not in its logarithm, because what attention gathers is a sum with these weights: an
equal area is an equal change of what a word or position contributes.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from crn_jax.reports.pictures import canvas, discs, palette

# All lengths here are pixels.
_MARGIN = 20
_TILE = 128
_GAP = 8
_TILES_PER_LINE = 8
_REFERENCE = 176
_SIDE = 92  # Between reference and maps: names of the parts.
_CAPTION = 24  # Below a map.
_HEAD = 26  # A word above its maps.
_BAR = 22
_MAX_TITLE_LINES = 4
_MAX_TEXT_LINES = 10
_LEFT = _MARGIN + _REFERENCE + _GAP
_WIDTH = _LEFT + _SIDE + _TILES_PER_LINE * (_TILE + _GAP) - _GAP + _MARGIN

_TITLE, _TEXT, _NOTE = (canvas.font(size) for size in (19, 14, 12))
_LANCZOS = Image.Resampling.LANCZOS
_OTHERS = "all other words"

WORDS, POSITIONS = "words", "positions"


@dataclasses.dataclass(frozen=True)
class Word:
  """A word as the model reads it.

  Attributes:
    text: the word.
    note: why it says little by itself, e.g. "marker" or "unknown"; "" for a word of content. Words
      with a note share one map.
  """

  text: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class AttentionRow:
  """One query and what the parts of a model attend to.

  Attributes:
    reference: [s, s, 3] uint8, the crop that the model sees.
    text: modification text.
    outcome: what became of the query, e.g. "target at rank 3".
    words: the words, in order.
    attention: part -> [words, h, w] weights of 0 or more; one shape for all parts.
    sums_over: part -> "words" if the words' weights sum to 1 at each position, "positions" if each
      word's weights do over the positions.
    notes: part -> what its attention means, for the legend.
  """

  reference: np.ndarray
  text: str
  outcome: str
  words: tuple[Word, ...]
  attention: Mapping[str, np.ndarray]
  sums_over: Mapping[str, str]
  notes: Mapping[str, str]

  def __post_init__(self):
    shapes = {weights.shape for weights in self.attention.values()}
    shape = min(shapes, default=())
    if len(shapes) != 1 or len(shape) != 3 or 0 in shape or shape[0] != len(self.words):
      raise ValueError(
        f"attention: expected arrays of one shape [{len(self.words)}, h, w] for {len(self.words)} "
        f"words, got {', '.join(map(str, sorted(shapes))) or 'none'}"
      )
    for name in self.attention:
      if self.sums_over.get(name) not in (WORDS, POSITIONS) or name not in self.notes:
        raise ValueError(
          f"attention: part {name!r} needs a note and {WORDS!r} or {POSITIONS!r} in sums_over"
        )

  @property
  def grid(self) -> tuple[int, int]:
    """Height and width of the map."""
    return next(iter(self.attention.values())).shape[1:]


@dataclasses.dataclass(frozen=True)
class Column:
  """What is drawn of one word, or of those that share a column.

  Attributes:
    label: the word, or what is said of several.
    n_words: how many they are.
    weights: part -> [h, w]; the sum of their weights where those sum over words, else the mean.
    multiples: part -> [h, w] weights in multiples of uniform attention.
  """

  label: str
  n_words: int
  weights: dict[str, np.ndarray]
  multiples: dict[str, np.ndarray]


def attention_maps(rows: Sequence[AttentionRow], path: str | os.PathLike, *, title: str) -> None:
  """Writes a PNG with one block of maps per query.

  Where the map has a single position there is nothing to draw on the image: the words' weights are
  drawn as bars, for the parts whose weights sum over words.

  Args:
    rows: the queries; all with the same parts and one map size.
    path: the PNG file. Its folder is created; the file appears complete or not at all.
    title: what the picture shows. Wrapped if it is wider than the picture.

  Raises:
    ValueError: there are no rows, or they differ in parts or map size.
    OSError: the file cannot be written.
  """
  if not rows:
    raise ValueError("a picture of attention needs at least one query")
  kinds = {(row.grid, tuple(row.sums_over[p] for p in row.attention), *row.attention)
           for row in rows}  # fmt: skip
  if len(kinds) > 1:
    raise ValueError(f"attention: expected rows with the same parts and map size, got {kinds}")
  shown = [columns(row) for row in rows]
  pooled = rows[0].grid == (1, 1)
  if pooled:
    end = max(_longest(row, own) for row, own in zip(rows, shown, strict=True))
    legend = _pooled_legend(rows[0])
  else:
    ends = {
      part: discs.scale_end(np.stack([c.multiples[part] for own in shown for c in own]))
      for part in rows[0].attention
    }
    legend = _legend(rows[0], ends)
  asides = [_aside(row) for row in rows]
  heights = [
    max(
      _REFERENCE + _GAP + sum(canvas.text_height(lines, font) for lines, font, _ in aside),
      _bars_height(row, own) if pooled else _maps_height(row, own),
    )
    for row, own, aside in zip(rows, shown, asides, strict=True)
  ]
  title_lines = canvas.wrap(title, _TITLE, _WIDTH - 2 * _MARGIN, _MAX_TITLE_LINES)
  top = _MARGIN + canvas.text_height(title_lines, _TITLE) + _GAP
  first = top + legend.height + _GAP

  sheet = Image.new("RGB", (_WIDTH, first + sum(h + 3 * _GAP + _MARGIN for h in heights)), "white")
  draw = ImageDraw.Draw(sheet)
  canvas.draw_lines(draw, (_MARGIN, _MARGIN), title_lines, _TITLE, palette.INK)
  sheet.paste(legend, (_MARGIN, top))
  y = first
  for row, own, aside, height in zip(rows, shown, asides, heights, strict=True):
    draw.line((_MARGIN, y, _WIDTH - _MARGIN, y), fill=palette.RULE)
    y += 2 * _GAP
    _draw_aside(sheet, draw, y, row, aside)
    if pooled:
      _draw_bars(draw, y, row, own, end)
    else:
      _draw_maps(sheet, draw, y, row, own, ends)
    y += height + _GAP + _MARGIN
  canvas.write_png(sheet, path)


def columns(row: AttentionRow) -> list[Column]:
  """The columns of a query: its words of content in their order, then all others together."""
  own = [[i] for i, word in enumerate(row.words) if not word.note]
  others = [i for i, word in enumerate(row.words) if word.note]
  found = []
  for members in [*own, others] if others else own:
    weights, multiples = {}, {}
    for part, values in row.attention.items():
      mean = values[members].mean(axis=0)
      over_words = row.sums_over[part] == WORDS
      weights[part] = mean * len(members) if over_words else mean
      multiples[part] = mean * (len(row.words) if over_words else math.prod(row.grid))
    label = _OTHERS if members is others else row.words[members[0]].text
    found.append(Column(label, len(members), weights, multiples))
  return found


def _aside(row: AttentionRow) -> list[tuple[list[str], object, str]]:
  """Lines, font and colour of the texts below a reference image."""
  others = collections.defaultdict(collections.Counter)
  for word in row.words:
    if word.note:
      others[word.note][word.text] += 1
  named = "; ".join(
    f"{', '.join(f'{w} x {n}' if n > 1 else w for w, n in counts.items())} ({note})"
    for note, counts in others.items()
  )
  texts = [
    (row.text, _MAX_TEXT_LINES, _TEXT, palette.INK),
    (row.outcome, 3, _NOTE, palette.FAINT),
  ]
  if named:
    texts.append((f"All other words: {named}", 6, _NOTE, palette.FAINT))
  return [
    (canvas.wrap(text, font, _REFERENCE, max_lines), font, colour)
    for text, max_lines, font, colour in texts
  ]


def _draw_aside(sheet, draw, y: int, row: AttentionRow, aside) -> None:
  reference = Image.fromarray(row.reference).resize((_REFERENCE, _REFERENCE), _LANCZOS)
  sheet.paste(reference, (_MARGIN, y))
  y += _REFERENCE + _GAP // 2
  for lines, font, colour in aside:
    canvas.draw_lines(draw, (_MARGIN, y), lines, font, colour)
    y += canvas.text_height(lines, font) + 2


def _line_height(row: AttentionRow) -> int:
  return _HEAD + len(row.attention) * (_TILE + _CAPTION) + _GAP


def _maps_height(row: AttentionRow, own: Sequence[Column]) -> int:
  return -(-len(own) // _TILES_PER_LINE) * _line_height(row)


def _draw_maps(sheet, draw, y: int, row: AttentionRow, own: Sequence[Column], ends) -> None:
  for i, column in enumerate(own):
    line, at = divmod(i, _TILES_PER_LINE)
    x, top = _LEFT + _SIDE + at * (_TILE + _GAP), y + line * _line_height(row)
    (label,) = canvas.wrap(column.label, _TEXT, _TILE, max_lines=1)
    colour = palette.FAINT if column.label == _OTHERS else palette.INK
    draw.text((x, top + _HEAD - 6), label, fill=colour, font=_TEXT, anchor="ls")
    top += _HEAD
    for part in row.attention:
      if at == 0:
        name = canvas.wrap(part, _TEXT, _SIDE - _GAP, max_lines=3)
        place = (_LEFT, top + (_TILE - canvas.text_height(name, _TEXT)) / 2)
        canvas.draw_lines(draw, place, name, _TEXT, palette.INK)
      multiples = column.multiples[part]
      sheet.paste(discs.overlay(row.reference, multiples, ends[part], _TILE), (x, top))
      centre = (x + _TILE / 2, top + _TILE + _CAPTION / 2 - 1)
      caption = _caption(row.sums_over[part], column.weights[part], multiples)
      draw.text(centre, caption, fill=palette.FAINT, font=_NOTE, anchor="mm")
      top += _TILE + _CAPTION


def _caption(sums_over: str, weights: np.ndarray, multiples: np.ndarray) -> str:
  if sums_over == WORDS:
    return f"mean {multiples.mean():.1f} x ({_percent(weights.mean())})"
  return f"largest {multiples.max():.1f} x ({_percent(weights.max())})"


def _legend(row: AttentionRow, ends: Mapping[str, float]) -> Image.Image:
  uniform = _percent(1 / math.prod(row.grid))
  meaning = {
    WORDS: "At each position the words' weights sum to 100 %; uniform (1 x) is the same weight "
    "for every word. Below: mean over the positions.",
    POSITIONS: f"Each word's weights sum to 100 % over the {row.grid[0]} x {row.grid[1]} "
    f"positions; uniform (1 x) is {uniform}. Below: the largest.",
  }
  intro = canvas.wrap(
    "Discs: attention against uniform attention. Orange is more, blue is less, the area says how "
    "much; no disc is uniform attention.", _TEXT, _WIDTH - 2 * _MARGIN, max_lines=2,
  )  # fmt: skip
  scales = {part: discs.legend(end, _NOTE) for part, end in ends.items()}
  x = _SIDE + next(iter(scales.values())).width + 3 * _GAP
  texts = {
    part: canvas.wrap(
      f"{row.notes[part]} {meaning[row.sums_over[part]]}", _TEXT, _WIDTH - 2 * _MARGIN - x, 4
    )
    for part in row.attention
  }
  heights = [
    max(canvas.text_height(texts[part], _TEXT), scales[part].height) + _GAP for part in texts
  ]
  y = canvas.text_height(intro, _TEXT) + _GAP
  sheet = Image.new("RGB", (_WIDTH - 2 * _MARGIN, y + sum(heights)), "white")
  draw = ImageDraw.Draw(sheet)
  canvas.draw_lines(draw, (0, 0), intro, _TEXT, palette.INK)
  for (part, lines), height in zip(texts.items(), heights, strict=True):
    name = canvas.wrap(part, _TEXT, _SIDE - _GAP, max_lines=2)
    canvas.draw_lines(draw, (0, y), name, _TEXT, palette.INK)
    sheet.paste(scales[part], (_SIDE, y))
    canvas.draw_lines(draw, (x, y), lines, _TEXT, palette.INK)
    y += height
  return sheet


def _pooled_legend(row: AttentionRow) -> Image.Image:
  texts = [
    "This model pools the map to 1 x 1: there is one position only, and nothing to draw on the "
    "image. Bars: weights of the words, summing to 100 %; the mark is uniform attention."
  ]
  for part in row.attention:
    alone = "" if row.sums_over[part] == WORDS else " Always 100 %, as there is one position."
    texts.append(f"{part}: {row.notes[part]}{alone}")
  lines = [line for text in texts for line in canvas.wrap(text, _TEXT, _WIDTH - 2 * _MARGIN, 3)]
  sheet = Image.new("RGB", (_WIDTH - 2 * _MARGIN, canvas.text_height(lines, _TEXT)), "white")
  canvas.draw_lines(ImageDraw.Draw(sheet), (0, 0), lines, _TEXT, palette.INK)
  return sheet


def _bars_height(row: AttentionRow, own: Sequence[Column]) -> int:
  n_parts = sum(row.sums_over[part] == WORDS for part in row.attention)
  return n_parts * (len(own) + 1) * _BAR


def _longest(row: AttentionRow, own: Sequence[Column]) -> float:
  """The largest share that a bar of the query or its mark shows."""
  parts = [part for part in row.attention if row.sums_over[part] == WORDS]
  weights = [float(column.weights[part].item()) for column in own for part in parts]
  return max([*weights, *(column.n_words / len(row.words) for column in own)])


def _draw_bars(draw, y: int, row: AttentionRow, own: Sequence[Column], end: float) -> None:
  names = _LEFT + 2 * _TILE
  for part in row.attention:
    if row.sums_over[part] != WORDS:
      continue
    draw.text((names, y + _BAR / 2), part, fill=palette.INK, font=_TEXT, anchor="lm")
    y += _BAR
    for column in own:
      (label,) = canvas.wrap(column.label, _TEXT, names - _LEFT - 2 * _GAP, max_lines=1)
      middle = y + _BAR / 2
      draw.text((names - _GAP, middle), label, fill=palette.INK, font=_TEXT, anchor="rm")
      full = (_WIDTH - _MARGIN - names - 110) / end
      weight, multiple = float(column.weights[part].item()), float(column.multiples[part].item())
      length = max(1, round(full * weight))
      draw.rectangle((names, y + 4, names + length - 1, y + _BAR - 5), fill=palette.BLUE)
      uniform = names + round(full * column.n_words / len(row.words))
      draw.rectangle((uniform - 1, y + 1, uniform, y + _BAR - 2), fill=palette.INK)
      place = (max(names + length, uniform) + 8, middle)
      text = f"{_percent(weight)} ({multiple:.1f} x)"
      draw.text(place, text, fill=palette.FAINT, font=_NOTE, anchor="lm")
      y += _BAR


def _percent(share: float) -> str:
  percent = 100 * float(share)
  return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"
