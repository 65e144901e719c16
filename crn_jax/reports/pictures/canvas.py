"""What all pictures made with Pillow share: wrapped text, image cells, files."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crn_jax.errors import UserError
from crn_jax.input_pipeline import images
from crn_jax.reports import texts
from crn_jax.reports.pictures import palette
from crn_jax.workdir import files

_LINE_SPACING = 1.35

# Path of an image file, or an image [h, w, 3] uint8.
Picture = str | os.PathLike | np.ndarray


def font(size: int) -> ImageFont.FreeTypeFont:
  """Pillow's own font, which is there on every machine."""
  return ImageFont.load_default(size=size)


def wrap(text: str, font, width: int, max_lines: int) -> list[str]:
  """Breaks at spaces, inside words only if one is wider than a line; cuts with "..." at the end."""
  lines = []
  for paragraph in texts.printable(text).splitlines():
    line = ""
    for word in paragraph.split():
      joined = f"{line} {word}" if line else word
      if font.getlength(joined) <= width:
        line = joined
        continue
      if line:
        lines.append(line)
      *full, line = _pieces(word, font, width)
      lines.extend(full)
    lines.append(line)
  if len(lines) > max_lines:
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last} ...") > width:
      last = last[:-1]
    lines = [*lines[: max_lines - 1], f"{last.rstrip()} ..."]
  return lines


def _pieces(word: str, font, width: int) -> list[str]:
  """The word cut into pieces no wider than a line."""
  pieces, piece = [], ""
  for character in word:
    if piece and font.getlength(piece + character) > width:
      pieces.append(piece)
      piece = ""
    piece += character
  return [*pieces, piece]


def line_height(font) -> int:
  """Distance of two lines in pixels."""
  return round(font.size * _LINE_SPACING)


def text_height(lines: Sequence[str], font) -> int:
  """Height of wrapped lines in pixels."""
  return len(lines) * line_height(font)


def draw_lines(draw, origin, lines: Sequence[str], font, colour) -> None:
  """Draws wrapped lines below each other."""
  x, y = origin
  for i, line in enumerate(lines):
    draw.text((x, y + i * line_height(font)), line, fill=colour, font=font)


def cell(picture: Picture, side: int, font) -> Image.Image:
  """The image, as large as a side x side square allows, centred on a neutral background."""
  try:
    # As the model sees it.
    pixels = picture if isinstance(picture, np.ndarray) else images.decode(picture)
    image = _fit(Image.fromarray(pixels), side)
  except (UserError, OSError):
    square = Image.new("RGB", (side, side), palette.UNREADABLE)
    draw = ImageDraw.Draw(square)
    draw.text((side / 2, side / 2), "unreadable", fill=palette.INK, font=font, anchor="mm")
    return square
  square = Image.new("RGB", (side, side), palette.EMPTY)
  square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
  return square


def _fit(image: Image.Image, side: int) -> Image.Image:
  longest = max(image.size)
  size = [max(1, round(length * side / longest)) for length in image.size]
  return image.resize(size, Image.Resampling.LANCZOS)


def write_png(image: Image.Image, path: str | os.PathLike) -> None:
  """Writes a PNG; its folder is created, the file appears complete or not at all."""
  with files.replacing(path) as temporary:
    image.save(temporary, format="PNG")
