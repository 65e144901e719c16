"""Indexes over and over, killed each time; run by test_indexing.py as a process of its own.

Arguments: index, pictures, number of kills. Each attempt is a process that kills itself with
SIGKILL at a later one of the moments before and after something is written, so that together they
stop everywhere. Prints as JSON what each attempt has encoded, and how it ended.
"""

import json
import os
import signal
import sys

from crn_jax.catalogue import indexing
from crn_jax.catalogue.store import Store
from tests.catalogue import made

BATCH_SIZE = 2


def attempt(index: str, pictures: str, moments: int, report: int) -> None:
  """Indexes; at the given moment this process is killed."""
  left = moments

  def moment():
    nonlocal left
    left -= 1
    if left == 0:
      os.kill(os.getpid(), signal.SIGKILL)

  def watched(function):
    def call(*args, **kwargs):
      moment()
      result = function(*args, **kwargs)
      moment()
      return result

    return call

  class Encoders(made.FakeEncoders):
    def image_vectors(self, pictures, batch_size):
      vectors = super().image_vectors(pictures, batch_size)
      os.write(report, b"%d\n" % len(pictures))
      return vectors

  with Store(index, create=True) as store:
    for name in ("create_collection", "upsert", "delete", "flush"):
      setattr(store._client, name, watched(getattr(store._client, name)))
    indexing.update(store, Encoders(), pictures, batch_size=BATCH_SIZE)
  os._exit(3)  # It was not killed.


def main(index: str, pictures: str, kills: int) -> None:
  encoded, statuses = [], []
  for i in range(kills):
    read, write = os.pipe()
    process = os.fork()
    if not process:
      os.close(read)
      attempt(index, pictures, 3 + i, write)
    os.close(write)
    with os.fdopen(read) as lines:
      encoded.append(sum(map(int, lines)))
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
  print(json.dumps({"encoded": encoded, "statuses": statuses}))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
