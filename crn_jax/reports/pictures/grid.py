"""Retrieval grids: what a model retrieves for a query, drawn with Pillow alone.

A row of the grid reads from left to right: reference image, text, the first images of the ranking
with their scores, and, behind a gap, the target if it is not among them.
"""

import dataclasses
import os
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from crn_jax.reports.pictures import canvas, palette

CELL = 112  # Side of an image cell; all lengths here are pixels.
_MARGIN = 20
_GAP = 10
_WIDE_GAP = 28
_ROW_PADDING = 12  # Between a row and the rule above or below it; wider than a frame.
_TEXT_WIDTH = 176
_CAPTION = 20
_FRAME = 5
_DASH = 9
_MAX_TEXT_LINES = 12
_MAX_TITLE_LINES = 4


@dataclasses.dataclass(frozen=True)
class GridRow:
  """One query and what was retrieved for it.

  Attributes:
    reference: the reference image; None if the query has none.
    text: modification text.
    top: (image, score) of the first images of the ranking, best first.
    target: the target image; None if none is known.
    target_position: position of the target in `top`, 0-based; None if it is not there, in which
      case it is drawn on its own.
    rank: 0-based rank of the target (drawn as rank + 1); None if it is not ranked.
    also_right: positions in `top` of images that are right besides the target.
  """

  reference: canvas.Picture | None
  text: str
  top: tuple[tuple[canvas.Picture, float], ...]
  target: canvas.Picture | None
  target_position: int | None
  rank: int | None
  also_right: tuple[int, ...] = ()

  def __post_init__(self):
    if self.target_position is not None and not 0 <= self.target_position < len(self.top):
      raise ValueError(
        f"target_position: expected None or a position in a top {len(self.top)}, "
        f"got {self.target_position}"
      )


def retrieval_grid(rows: Sequence[GridRow], path: str | os.PathLike, *, title: str) -> None:
  """Writes a PNG with one row of images per query.

  The target is framed in blue where it was retrieved; otherwise it stands at the far right in a
  dashed vermillion frame with its rank. Other right images have a dashed blue frame. Images keep
  their aspect ratio. An image file that cannot be read becomes a grey cell with the word
  "unreadable".

  Args:
    rows: the queries; `top` is typically ten images long and may differ between rows.
    path: the PNG file. Its folder is created; the file appears complete or not at all.
    title: what the picture shows, e.g. data set, protocol, gallery size, checkpoint step. Wrapped
      if it is wider than the picture.

  Raises:
    ValueError: there are no rows.
    OSError: the file cannot be written.
  """
  if not rows:
    raise ValueError("a retrieval grid needs at least one row")
  canvas.write_png(_draw_grid(rows, title), path)


@dataclasses.dataclass(frozen=True)
class _Fonts:
  title: ImageFont.FreeTypeFont
  header: ImageFont.FreeTypeFont
  text: ImageFont.FreeTypeFont
  caption: ImageFont.FreeTypeFont


@dataclasses.dataclass(frozen=True)
class _Columns:
  """Left edges of the columns; `missed` is None if every target was retrieved."""

  reference: int
  text: int
  top: tuple[int, ...]
  missed: int | None
  width: int


def _draw_grid(rows: Sequence[GridRow], title: str) -> Image.Image:
  fonts = _Fonts(*(canvas.font(s) for s in (19, 14, 14, 12)))
  columns = _columns(rows)
  title_lines = canvas.wrap(title, fonts.title, columns.width - 2 * _MARGIN, _MAX_TITLE_LINES)
  texts = [canvas.wrap(row.text, fonts.text, _TEXT_WIDTH, _MAX_TEXT_LINES) for row in rows]
  cell_height = CELL + _CAPTION
  heights = [max(cell_height, canvas.text_height(lines, fonts.text)) for lines in texts]

  header_y = _MARGIN + canvas.text_height(title_lines, fonts.title) + _GAP
  first_row_y = header_y + canvas.line_height(fonts.header) + _GAP // 2
  height = first_row_y + sum(h + 2 * _ROW_PADDING for h in heights) + _MARGIN - _ROW_PADDING

  sheet = Image.new("RGB", (columns.width, height), palette.WHITE)
  draw = ImageDraw.Draw(sheet)
  canvas.draw_lines(draw, (_MARGIN, _MARGIN), title_lines, fonts.title, palette.INK)
  _draw_header(draw, header_y, columns, fonts.header)
  y = first_row_y
  for row, lines, row_height in zip(rows, texts, heights, strict=True):
    draw.line((_MARGIN, y, columns.width - _MARGIN, y), fill=palette.RULE)
    _draw_row(sheet, draw, y + _ROW_PADDING, row, lines, columns, fonts)
    y += row_height + 2 * _ROW_PADDING
  return sheet


def _columns(rows: Sequence[GridRow]) -> _Columns:
  text = _MARGIN + CELL + _GAP
  first = text + _TEXT_WIDTH + _WIDE_GAP
  top = tuple(first + i * (CELL + _GAP) for i in range(max(len(row.top) for row in rows)))
  end = top[-1] + CELL if top else first
  missed = None
  if any(_is_missed(row) for row in rows):
    missed = end + _WIDE_GAP
    end = missed + CELL
  return _Columns(reference=_MARGIN, text=text, top=top, missed=missed, width=end + _MARGIN)


def _draw_header(draw, y: int, columns: _Columns, font) -> None:
  labels = [(columns.reference, "Reference"), (columns.text, "Text")]
  if columns.top:
    labels.append((columns.top[0], f"Top {len(columns.top)}: rank and score"))
  if columns.missed is not None:
    labels.append((columns.missed, "Missed target"))
  for x, label in labels:
    draw.text((x, y), label, fill=palette.FAINT, font=font)


def _draw_row(sheet, draw, y: int, row: GridRow, lines, columns: _Columns, fonts: _Fonts) -> None:
  if row.reference is not None:
    sheet.paste(canvas.cell(row.reference, CELL, fonts.caption), (columns.reference, y))
  canvas.draw_lines(draw, (columns.text, y), lines, fonts.text, palette.INK)
  # A row may hold fewer images than the longest one.
  for position, (x, (path, score)) in enumerate(zip(columns.top, row.top, strict=False)):
    sheet.paste(canvas.cell(path, CELL, fonts.caption), (x, y))
    caption = f"{position + 1}   {score:.3f}"
    if position == row.target_position:
      _draw_frame(draw, x, y, palette.BLUE, dashed=False)
      _draw_label(draw, x, y, f"{caption}   target", palette.BLUE, fonts.caption)
    elif position in row.also_right:
      _draw_frame(draw, x, y, palette.BLUE, dashed=True)
      _draw_label(draw, x, y, f"{caption}   right", palette.BLUE, fonts.caption)
    else:
      _draw_caption(draw, x, y, caption, palette.INK, fonts.caption)
  if _is_missed(row):
    sheet.paste(canvas.cell(row.target, CELL, fonts.caption), (columns.missed, y))
    rank = "not ranked" if row.rank is None else f"target: rank {row.rank + 1}"
    _draw_frame(draw, columns.missed, y, palette.VERMILLION, dashed=True)
    _draw_label(draw, columns.missed, y, rank, palette.VERMILLION, fonts.caption)


def _is_missed(row: GridRow) -> bool:
  return row.target is not None and row.target_position is None


def _draw_frame(draw, x: int, y: int, colour, *, dashed: bool) -> None:
  """Frames the cell just outside its image, so that nothing of the image is covered."""
  low, side = -_FRAME, CELL + 2 * _FRAME
  if not dashed:
    box = (x + low, y + low, x + low + side - 1, y + low + side - 1)
    draw.rectangle(box, outline=colour, width=_FRAME)
    return
  far = low + side - _FRAME
  for start in range(0, side, 2 * _DASH):
    a, b = low + start, low + min(start + _DASH, side) - 1
    for edge in (low, far):
      draw.rectangle((x + a, y + edge, x + b, y + edge + _FRAME - 1), fill=colour)
      draw.rectangle((x + edge, y + a, x + edge + _FRAME - 1, y + b), fill=colour)


def _draw_label(draw, x: int, y: int, text: str, colour, font) -> None:
  """A caption in white on the colour of the frame that it hangs from."""
  top = y + CELL
  draw.rectangle((x - _FRAME, top, x + CELL + _FRAME - 1, top + _CAPTION), fill=colour)
  _draw_caption(draw, x, y, text, palette.WHITE, font)


def _draw_caption(draw, x: int, y: int, text: str, colour, font) -> None:
  centre = (x + CELL / 2, y + CELL + _CAPTION / 2 + 1)
  draw.text(centre, text, fill=colour, font=font, anchor="mm")
