"""The folder of Milvus Lite, a database inside the process: what may be one, and who has it."""

import contextlib
import pathlib
from collections.abc import Iterator

from milvus_lite.server_manager import server_manager_instance

from crn_jax.errors import UserError
from crn_jax.workdir.lock import lock

_BUSY = (
  "another process has this index open",
  "Only one can: end it, or use a Milvus server (--index=http://host:19530), which serves many",
)


@contextlib.contextmanager
def held(index: str, *, create: bool) -> Iterator[tuple[str, pathlib.Path]]:
  """Holds the folder of a catalogue; no other process can, meanwhile.

  Args:
    index: NAME.db.
    create: whether it may be made.

  Returns:
    The path under which Milvus knows it; a folder in there for what is derived from the rows.

  Raises:
    UserError: it is not there, is no index, or another process has it.
  """
  path = pathlib.Path(index).expanduser().absolute()
  if path.suffix != ".db":
    raise UserError(
      f"{index}: expected a name that ends in .db, or http://host:port of a Milvus server"
    )
  if path.is_file():
    raise UserError(
      f"{path}: a file, and so no index of this program: Milvus Lite 3 keeps a folder, and does "
      f"not read the files of Milvus Lite 2. Choose another --index and index anew"
    )
  there = path.is_dir()
  if there and any(path.iterdir()) and not (path / "collections").is_dir():
    raise UserError(f"{path}: a folder, but no index; choose another --index")
  if not there and not create:
    raise UserError(
      f"{path}: no such index; make it with python main.py --mode=index --model=MODEL "
      f"--images=PICTURES --index={index}"
    )
  # What Milvus Lite's folders are told by is made first, so that a stop here leaves an index.
  (path / "collections").mkdir(parents=True, exist_ok=True)
  derived = path / "crn_jax"
  derived.mkdir(exist_ok=True)
  with lock(derived, _BUSY):
    try:
      yield str(path), derived
    finally:
      server_manager_instance.release_server(str(path))
