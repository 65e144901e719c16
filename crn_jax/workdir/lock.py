"""One training at a time in a work directory."""

import contextlib
import datetime
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from crn_jax.errors import UserError

_NAME = ".lock"


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
  """Holds a folder, which must exist, until the block ends or the process does, however it ends.

  Raises:
    UserError: another process holds it; says which.
  """
  path = pathlib.Path(workdir) / _NAME
  with open(path, "a+") as file:
    try:
      # The system gives it back when the process ends: nothing stays behind a kill.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise UserError(
        f"{workdir}: a training is under way in this folder ({file.read().strip()}). Wait for it, "
        f"stop it, or choose another --workdir"
      ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n")
    file.flush()
    yield
    file.truncate(0)


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(" ", timespec="seconds")
