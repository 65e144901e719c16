"""Verifies image files before training starts, so that a damaged one does not end a run days later.

Every file is decoded, because only that finds a truncated one. JPEGs are decoded at an eighth of
their size: the whole compressed stream is read, but most of the arithmetic is left out.
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool

import tqdm
from PIL import Image

from crn_jax.input_pipeline import images

# Pillow releases the GIL; a few threads more than cores hide the latency of the disk.
_THREADS = min(32, (os.cpu_count() or 1) + 4)


@dataclasses.dataclass(frozen=True)
class Verified:
  """What was found in image files.

  Attributes:
    unreadable: path -> reason of the files that cannot be decoded, see `images.describe_damage`.
    digest: of names, sizes and times of change of the files; "" if some are unreadable, so that
      they are looked at again.
    converted: colour mode -> number of files that `images.to_rgb` converts from it, other than
      plain grey; empty if nothing was decoded.
  """

  unreadable: Mapping[str, str]
  digest: str
  converted: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def remarks(self) -> tuple[str, ...]:
    """What is odd but harmless, in sentences."""
    if not self.converted:
      return ()
    modes = ", ".join(f"{n:,} of mode {mode}" for mode, n in self.converted.items())
    return (f"image files converted to 8-bit RGB, transparent parts to white: {modes}",)


def verify(
  paths: Sequence[str], root: str | os.PathLike, known_digest: str | None = None
) -> Verified:
  """Decodes every file, with a progress bar if that takes more than a second.

  Args:
    paths: of the files, each once; all exist.
    root: folder to which the digest's paths are relative.
    known_digest: the digest of an earlier call. If it is still that of the files, they are not
      decoded again.
  """
  digest = _digest(paths, root)
  if digest == known_digest:
    return Verified({}, digest)
  with ThreadPool(_THREADS) as pool:
    found = tqdm.tqdm(
      pool.imap(inspect, paths),
      total=len(paths),
      desc="verify images",
      unit="image",
      delay=1,
      leave=False,
      disable=None,  # Where there is no terminal.
    )
    found = dict(zip(paths, found, strict=True))
  unreadable = {path: reason for path, (reason, _) in found.items() if reason}
  modes = collections.Counter(mode for reason, mode in found.values() if not reason)
  del modes["RGB"], modes["L"]
  converted = dict(sorted(modes.items(), key=lambda item: (-item[1], item[0])))
  return Verified(unreadable, "" if unreadable else digest, converted)


def inspect(path: str | os.PathLike) -> tuple[str | None, str]:
  """Why a file cannot be decoded, in a few words, or None if it can; and its colour mode.

  Finds what `images.decode` would stumble over.
  """
  mode = ""
  try:
    with Image.open(path) as image:
      images.check_supported(image)
      mode = images.describe_mode(image)
      image.draft("L", (1, 1))  # Does nothing where the format has no reduced size.
      image.load()
      images.check_supported(image)
      images.to_rgb(image)
  except MemoryError:
    raise
  except Exception as error:  # What decoders raise is no closed list.
    return images.describe_damage(path, error), mode
  return None, mode


def _digest(paths: Sequence[str], root: str | os.PathLike) -> str:
  # Files that other limits let through are looked at again.
  digest = hashlib.sha256(f"{images.MAX_PIXELS} {images.MAX_ASPECT}\n".encode())
  for path in sorted(paths):
    stat = os.stat(path)
    line = f"{os.path.relpath(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
    digest.update(line.encode("utf-8", "surrogateescape"))
  return digest.hexdigest()
