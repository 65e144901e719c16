"""Small pictures for the page: of the catalogue's pictures, and of those that people upload.

Nothing is ever looked for by a path from outside: pictures of the catalogue are known by their id,
uploads by the hash of their content.
"""

import collections
import functools
import hashlib
import io
import threading

import numpy as np
from PIL import Image

from crn_jax.catalogue import pictures
from crn_jax.catalogue.retriever import Retriever
from crn_jax.errors import UserError

# Longest side in pixels: twice the size at which results are shown, for fine screens.
SIDE = 400
_QUALITY = 85
_KEPT = 2_000  # About 40 MB.
# Bytes of all uploads that are kept; of the oldest ones nothing remains.
_UPLOADS = 256_000_000


def small(picture: np.ndarray) -> bytes:
  """A JPEG of a picture [h, w, 3] uint8 that is at most `SIDE` wide and high, without metadata."""
  image = Image.fromarray(picture)
  image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=_QUALITY)
  return buffer.getvalue()


class Thumbnails:
  """Of the pictures of a catalogue; several threads may ask."""

  def __init__(self, retriever: Retriever):
    self._retriever = retriever
    # Large pictures take much memory while they are decoded.
    self._decoding = threading.Semaphore(2)
    self._drawn = functools.lru_cache(_KEPT)(self._draw)

  def get(self, identifier: str) -> bytes:
    """A JPEG.

    Raises:
      UserError: no such picture in the catalogue, or its file cannot be read (any more).
    """
    row = self._retriever.get(identifier)
    return self._drawn(row.path, row.digest)

  def _draw(self, path: str, digest: str) -> bytes:
    with self._decoding:
      content = pictures.read_file(path)
      # What now lies in its place was never to be shown.
      if hashlib.sha256(content).hexdigest() != digest:
        raise pictures.Unreadable("changed since it was indexed")
      return small(pictures.decode(content))


class Uploads:
  """Pictures that people have uploaded, in memory; several threads may ask."""

  def __init__(self, most: int = _UPLOADS):
    self._most, self._bytes = most, 0
    # Name -> file and thumbnail.
    self._kept: collections.OrderedDict[str, tuple[bytes, bytes]] = collections.OrderedDict()
    self._lock = threading.Lock()
    self._decoding = threading.Semaphore(2)

  def add(self, content: bytes) -> str:
    """Keeps a picture.

    Returns:
      Its name: the SHA-256 of its content, hexadecimal.

    Raises:
      UserError: it is no picture that can be searched with, with the reason.
    """
    if len(content) > pictures.MAX_UPLOAD:
      raise UserError(f"the picture is larger than {pictures.MAX_UPLOAD / 1e6:,.0f} MB")
    try:
      with self._decoding:
        thumbnail = small(pictures.decode(content))
    except pictures.Unreadable as error:
      raise UserError(f"the file cannot be used: {error}") from error
    name = hashlib.sha256(content).hexdigest()
    with self._lock:
      if name not in self._kept:
        self._bytes += len(content)
      self._kept[name] = content, thumbnail
      self._kept.move_to_end(name)
      while self._bytes > self._most and len(self._kept) > 1:
        self._bytes -= len(self._kept.popitem(last=False)[1][0])
    return name

  def get(self, name: str) -> bytes:
    """The file.

    Raises:
      UserError: it is not kept (any more).
    """
    return self._get(name)[0]

  def thumbnail(self, name: str) -> bytes:
    """A JPEG; raises UserError as `get` does."""
    return self._get(name)[1]

  def _get(self, name: str) -> tuple[bytes, bytes]:
    with self._lock:
      if name not in self._kept:
        raise UserError("your picture is no longer kept here; upload it once more")
      self._kept.move_to_end(name)
      return self._kept[name]
