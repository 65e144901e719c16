"""Files that appear complete or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a temporary path to write to; it becomes `path` if the block ends without an error.

  The folder of `path` is created.

  Raises:
    OSError: the file cannot be written.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, as a rename is atomic only within one file system.
  temporary = _beside(path, "tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """As `replacing`, for a folder: gives a path at which the block creates it.

  A folder that is there is kept until the new one is complete.

  Raises:
    OSError: the folder cannot be written.
  """
  path = pathlib.Path(path).absolute()
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary, before = _beside(path, "tmp"), _beside(path, "old")
  try:
    yield temporary
    if path.exists():
      os.rename(path, before)
    os.rename(temporary, path)
  finally:
    for leftover in (temporary, before):
      if leftover.is_dir():
        shutil.rmtree(leftover)
      else:
        leftover.unlink(missing_ok=True)


def _beside(path: pathlib.Path, kind: str) -> pathlib.Path:
  """A hidden path that nobody else uses: on other machines processes have the same numbers."""
  return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{kind}")
