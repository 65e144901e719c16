"""One process at a time in a folder: one training in a work directory."""

import contextlib
import datetime
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from crn_jax.errors import UserError

_NAME = ".lock"
_TRAINING = (
  "a training is under way in this folder",
  "Wait for it, stop it, or choose another --workdir",
)


@contextlib.contextmanager
def lock(folder: str | os.PathLike, busy: tuple[str, str] = _TRAINING) -> Iterator[None]:
  """Holds a folder, which must exist, until the block ends or the process does, however it ends.

  Args:
    folder: what is held.
    busy: what is said where another process holds it: what it does there, and what to do.

  Raises:
    UserError: another process holds it; says which.
  """
  path = pathlib.Path(folder) / _NAME
  with open(path, "a+") as file:
    try:
      # The system gives it back when the process ends: nothing stays behind a kill.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise UserError(f"{folder}: {busy[0]} ({file.read().strip()}). {busy[1]}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n")
    file.flush()
    yield
    file.truncate(0)


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
