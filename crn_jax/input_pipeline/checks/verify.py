"""Verifies image files before training starts, so that a damaged one does not end a run days later.

Every file is decoded, because only that finds a truncated one. JPEGs are decoded at an eighth of
their size: the whole compressed stream is read, but most of the arithmetic is left out.
"""

import hashlib
import os
import struct
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool

import tqdm
from PIL import Image, UnidentifiedImageError

from crn_jax.input_pipeline import images

# Pillow releases the GIL; a few threads more than cores hide the latency of the disk.
_THREADS = min(32, (os.cpu_count() or 1) + 4)


def find_unreadable(
  paths: Sequence[str], root: str | os.PathLike, known_digest: str | None = None
) -> tuple[dict[str, str], str]:
  """Decodes every file, with a progress bar if that takes more than a second.

  Args:
    paths: of the files, each once; all exist.
    root: folder to which the digest's paths are relative.
    known_digest: the digest of an earlier call. If it is still that of the files, they are not
      decoded again.

  Returns:
    unreadable: path -> reason of the files that cannot be decoded, in the order of `paths`.
    digest: of names, sizes and times of change of the files; "" if some are unreadable, so that
      they are looked at again.
  """
  digest = _digest(paths, root)
  if digest == known_digest:
    return {}, digest
  with ThreadPool(_THREADS) as pool:
    reasons = tqdm.tqdm(
      pool.imap(damage, paths),
      total=len(paths),
      desc="verify images",
      unit="image",
      delay=1,
      leave=False,
    )
    unreadable = {path: reason for path, reason in zip(paths, reasons, strict=True) if reason}
  return unreadable, "" if unreadable else digest


def damage(path: str | os.PathLike) -> str | None:
  """Why a file cannot be decoded, in a few words; None if it can.

  Finds what `images.decode` would stumble over.
  """
  try:
    with Image.open(path) as image:
      image.draft("L", (1, 1))  # Does nothing where the format has no reduced size.
      image.load()
  except UnidentifiedImageError:
    return "not an image" if os.path.getsize(path) else "empty"
  except images.DECODE_ERRORS as error:
    if isinstance(error, struct.error) or "truncated" in str(error).lower():
      return "truncated"
    # An error of the system repeats the path in its text.
    return f"damaged: {getattr(error, 'strerror', None) or error}"
  return None


def _digest(paths: Sequence[str], root: str | os.PathLike) -> str:
  digest = hashlib.sha256()
  for path in sorted(paths):
    stat = os.stat(path)
    line = f"{os.path.relpath(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
    digest.update(line.encode("utf-8", "surrogateescape"))
  return digest.hexdigest()
