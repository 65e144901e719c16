"""Work beside the main thread that cannot be stopped, as XLA's on a program."""

import concurrent.futures
import weakref
from collections.abc import Callable

_started: weakref.WeakSet[concurrent.futures.Future] = weakref.WeakSet()


def start(work: Callable[[], object]) -> concurrent.futures.Future:
  """Begins work in a thread of its own; the future has its result, or raises its error.

  Python waits for such a thread before it ends: see `under_way`.
  """
  pool = concurrent.futures.ThreadPoolExecutor(1)
  future = pool.submit(work)
  _started.add(future)
  pool.shutdown(wait=False)
  return future


def under_way() -> bool:
  """Whether something that was begun is not done yet."""
  return not all(future.done() for future in _started)
