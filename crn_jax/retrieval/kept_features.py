"""Features on disk: computed once a set of weights, in chunks that appear complete or not at all.

A folder holds what one set of weights, with one way of preparing what it sees, makes of images and
texts. A chunk's file is named after what its rows were made of, so that a changed image, or another
list, is another file: nothing that is stale is ever read.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
import tqdm
from flax import traverse_util

from crn_jax import processes
from crn_jax.errors import UserError
from crn_jax.parallel import is_primary
from crn_jax.workdir import files

# Rows of a chunk: what an interruption costs at most.
CHUNK = 2048

_FACTS = "made_by.json"


def digest(params: Mapping) -> str:
  """Of a tree of parameters: names, shapes and every bit of the values; 64 hexadecimal digits."""
  found = hashlib.sha256()
  for path, leaf in sorted(traverse_util.flatten_dict(dict(params), sep="/").items()):
    array = np.ascontiguousarray(jax.device_get(leaf))
    found.update(f"{path} {array.dtype} {array.shape}\n".encode())
    found.update(array.view(np.uint8).data)
  return found.hexdigest()


def image_key(path: str) -> str:
  """What an image file is known by: its path, size and time of change."""
  stat = os.stat(path)
  return f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}"


@dataclasses.dataclass(frozen=True)
class KeptFeatures:
  """Features of one set of weights.

  Attributes:
    folder: of the chunks; made when the first is written.
    width: of a feature.
  """

  folder: pathlib.Path
  width: int

  @classmethod
  def of(cls, parent: str | os.PathLike, facts: Mapping[str, object], width: int) -> "KeptFeatures":
    """The features made in one way.

    Args:
      parent: folder of features of all kinds.
      facts: everything that decides a feature beside its image or text, the weights' digest above
        all; plain values.
      width: of a feature.

    Raises:
      UserError: the folder is not what it should be.
    """
    content = json.dumps(dict(facts), sort_keys=True, indent=2)
    folder = pathlib.Path(parent).expanduser() / hashlib.sha256(content.encode()).hexdigest()[:16]
    noted = folder / _FACTS
    if not noted.exists():
      # Harmless in several processes: each writes the same.
      with files.replacing(noted) as partial:
        partial.write_text(content + "\n", encoding="utf-8")
    elif noted.read_text(encoding="utf-8") != content + "\n":
      raise UserError(f"{noted}: is not as it was written; remove {folder} (data.features)")
    return cls(folder, width)

  def rows(
    self, kind: str, keys: Sequence[str], compute: Callable[[int, int], np.ndarray], show: str
  ) -> np.ndarray:
    """The features of a list of things, of which those that are not kept are computed.

    Processes must all call it; the primary one writes, and knows what is kept.

    Args:
      kind: 'image' or 'text'.
      keys: a string a thing, which says what its feature is made of.
      compute: (first, last) -> features of things first .. last - 1, [last - first, width].
      show: name in the progress bar.

    Returns:
      [n, width] float32.

    Raises:
      UserError: a process cannot read what the primary one finds.
    """
    found = np.empty((len(keys), self.width), np.float32)
    chunks = {}
    for first in range(0, len(keys), CHUNK):
      last = min(first + CHUNK, len(keys))
      chunks[first] = (first, last, self._path(kind, keys[first:last]))

    def read(first, last, path) -> bool:
      kept = _read(path, (last - first, self.width))
      if kept is not None:
        found[first:last] = kept
      return kept is not None

    # Processes compute together: they must agree on what is missing.
    unread = processes.on_primary(lambda: [c[0] for c in chunks.values() if not read(*c)])
    missing = [chunks[first] for first in unread]
    if not is_primary():
      for chunk in chunks.values():
        if chunk not in missing and not read(*chunk):
          raise UserError(
            f"{chunk[2]}: process 0 has read this file, process {jax.process_index()} cannot; name "
            f"a folder that all machines share with data.features"
          )
    bar = tqdm.tqdm(
      total=len(keys), initial=len(keys) - sum(last - first for first, last, _ in missing),
      desc=f"features of {show}", unit=kind, leave=False,
      # None: a log file needs no animation.
      disable=None if missing and is_primary() else True,
    )  # fmt: skip
    with bar:
      for first, last, path in missing:
        found[first:last] = compute(first, last)
        if is_primary():
          _write(path, found[first:last])
        bar.update(last - first)
    return found

  def _path(self, kind: str, keys: Sequence[str]) -> pathlib.Path:
    name = hashlib.sha256()
    for key in keys:
      name.update(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())
    return self.folder / f"{kind}-{name.hexdigest()[:32]}.npy"


def _read(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray | None:
  """What a chunk's file holds, or None if there is none that can be used."""
  try:
    kept = np.load(path, allow_pickle=False)
  except (ValueError, EOFError, OSError):  # Not there, or damaged: it is computed, or again.
    return None
  return kept if kept.shape == shape and kept.dtype == np.float32 else None


def _write(path: pathlib.Path, rows: np.ndarray) -> None:
  with files.replacing(path) as partial, open(partial, "wb") as file:
    np.save(file, rows)
