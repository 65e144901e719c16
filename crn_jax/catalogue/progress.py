"""How far a long work is: a bar in a terminal, else a line every half minute."""

import datetime
import sys
import time

import tqdm

_LINE_INTERVAL = 30.0  # Seconds.


class Progress:
  """Counts pictures up to a total."""

  def __init__(self, total: int, what: str):
    """Begins; `what` is what is done."""
    self._total, self._what, self._done = total, what, 0
    self._start = self._shown = time.monotonic()
    # On standard error, as standard output may be read by a program.
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total, desc=what, unit="picture", dynamic_ncols=True)

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._bar.close()

  def advance(self, n: int) -> None:
    """Notes that n more are done."""
    self._done += n
    if self._bar is not None:
      self._bar.update(n)
      return
    now = time.monotonic()
    if now - self._shown >= _LINE_INTERVAL:
      self._shown = now
      rate = self._done / (now - self._start)
      left = datetime.timedelta(seconds=round((self._total - self._done) / rate))
      print(
        f"{self._what}: {self._done:,} of {self._total:,} pictures, {rate:,.0f} pictures/s, "
        f"{left} left",
        file=sys.stderr, flush=True,
      )  # fmt: skip
