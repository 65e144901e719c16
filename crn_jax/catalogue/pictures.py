"""The pictures of a catalogue: which there are, and how their files are read.

Files come from anywhere, so reading one is bounded in bytes, pixels and formats.
"""

import dataclasses
import io
import os
import pathlib
import stat
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from crn_jax.errors import UserError
from crn_jax.input_pipeline import images

# Decoders that are used; others (among them those that start programs) are never called.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".heic", ".heif")

# Larger files are not read, in bytes: of the catalogue, and given with a query.
MAX_FILE = 100_000_000
MAX_UPLOAD = 20_000_000

Metadata = Mapping[str, str | int | float | bool]


class Unreadable(UserError):
  """A picture that cannot be read; the text says why and does not name it."""


@dataclasses.dataclass(frozen=True)
class Source:
  """A picture that belongs into a catalogue.

  Attributes:
    id: by which people name it; unique.
    path: absolute path of its file.
    metadata: name -> value.
  """

  id: str
  path: str
  metadata: Metadata = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A picture that is left out: its path, and why."""

  path: str
  reason: str


def walk(folder: str | os.PathLike) -> tuple[list[Source], list[Skipped]]:
  """The pictures below a folder, by name; an id is the path from there, with slashes.

  Files with other endings than `SUFFIXES` are no pictures; hidden files and folders are passed
  over. Links to files are followed, links to folders are not.

  Returns:
    The pictures, sorted by id, and those whose names cannot be stored.

  Raises:
    OSError: a folder cannot be listed: its pictures must not be taken for removed ones.
  """

  def fail(error: OSError):
    raise error

  root = pathlib.Path(folder).absolute()
  found, skipped = [], []
  for parent, folders, names in os.walk(root, onerror=fail):
    folders[:] = [name for name in folders if not name.startswith(".")]
    for name in names:
      if name.startswith(".") or not name.lower().endswith(SUFFIXES):
        continue
      path = pathlib.Path(parent, name)
      try:
        source = Source(path.relative_to(root).as_posix(), str(path))
        check_length(source)
        found.append(source)
      except UserError as error:
        skipped.append(Skipped(printable(str(path)), str(error)))
  return sorted(found, key=lambda source: source.id), skipped


def check_length(source: Source) -> None:
  """Raises UserError for an id or a path that cannot be stored."""
  for what, value, most in (("id", source.id, 1_000), ("path", source.path, 4_000)):
    try:
      length = len(value.encode())
    except UnicodeEncodeError:
      raise UserError(f"the {what} is no UTF-8; rename the file") from None
    if not 0 < length <= most:
      raise UserError(f"the {what} has {length:,} bytes; expected 1 to {most:,}")


def printable(text: str) -> str:
  """The text in one line that any terminal and file can hold."""
  whole = text.encode("utf-8", "replace").decode("utf-8")
  return "".join(c if c.isprintable() else "?" for c in whole)


def read_file(path: str | os.PathLike, most: int = MAX_FILE) -> bytes:
  """The content of a file of at most `most` bytes.

  Raises:
    Unreadable: it is not there, no ordinary file, too large or may not be read.
  """
  try:
    # Not to wait for ever at a pipe.
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise Unreadable("no ordinary file")
    with open(path, "rb") as file:
      content = file.read(most + 1)
  except FileNotFoundError:
    raise Unreadable("no such file") from None
  except OSError as error:
    raise Unreadable(f"cannot be read: {error.strerror or error}") from error
  if len(content) > most:
    raise Unreadable(f"larger than {most / 1e6:,.0f} MB")
  return content


def decode(content: bytes) -> np.ndarray:
  """A picture from the bytes of its file, upright as its EXIF data say.

  Returns:
    [h, w, 3] uint8; bounded as `images.decode` says.

  Raises:
    Unreadable: damaged, of another format than `FORMATS`, or too large.
  """
  try:
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
      images.check_supported(image)
      image.load()
      images.check_supported(image)
      return np.asarray(images.to_rgb(_upright(image)))
  except MemoryError:
    raise
  except Exception as error:  # What decoders raise is no closed list.
    reason = images.describe_damage(content, error)
    if reason == "not an image":
      reason = f"not a picture of these formats: {', '.join(f for f in FORMATS if f != 'MPO')}"
    advice = images.mend(reason)
    raise Unreadable(f"{reason}. {advice}" if advice else reason) from error


def of_image(image: Image.Image) -> np.ndarray:
  """A picture that the caller has opened with Pillow; see `decode`."""
  try:
    images.check_supported(image)
    return np.asarray(images.to_rgb(_upright(image)))
  except MemoryError:
    raise
  except Exception as error:  # Pillow decodes only now.
    raise Unreadable(images.describe_damage(b"", error)) from error


def _upright(image: Image.Image) -> Image.Image:
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # Damaged EXIF data do not make a damaged picture.
    return image


def _formats() -> list[str]:
  Image.init()
  return [name for name in FORMATS if name in Image.OPEN]
