"""A trace of some steps, for TensorBoard's profiler: where the time of a step goes."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from crn_jax.parallel import is_primary


class Profile:
  """Records steps `first` to `last` into a folder; a context manager.

  What was under way at its end is still written. A run that continues within the range records the
  rest of it, one that continues beyond it nothing. Of several processes the primary one records.
  """

  def __init__(self, folder: str | os.PathLike, steps: Sequence[int]):
    """`steps` is (first, last), counted from 1, or empty for no trace."""
    self._folder = os.fspath(folder)
    self._first, self._last = steps if steps and is_primary() else (0, 0)
    self._recording = False

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def before(self, step: int) -> None:
    """To be called before a step is started."""
    if not self._recording and self._first <= step <= self._last:
      jax.profiler.start_trace(self._folder)
      self._recording = True

  def after(self, step: int, results: Any) -> None:
    """To be called after a step is started, with arrays that are there once it is done."""
    if self._recording and step == self._last:
      jax.block_until_ready(results)
      self._stop()

  def _stop(self) -> None:
    if self._recording:
      self._recording = False
      jax.profiler.stop_trace()
