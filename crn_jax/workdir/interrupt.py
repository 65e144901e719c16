"""SIGINT and SIGTERM: noted, so that the loop can save before it leaves."""

import contextlib
import os
import signal


class Interrupted(Exception):
  """A run was asked to stop, and has saved its state.

  Attributes:
    step: updates done and saved, or another `unit`.
    signal: number of the signal.
  """

  def __init__(self, step: int, signal_number: int, unit: str = "step"):
    super().__init__(f"stopped at {unit} {step} by {signal.Signals(signal_number).name}")
    self.step = step
    self.signal = signal_number


class Interruption:
  """Context in which the first SIGINT or SIGTERM is only noted; a second one acts at once.

  Works in the main thread only, as Python's signal handlers do.

  Attributes:
    signal: number of the signal that came, or None.
  """

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __init__(self, under_way: str = "step or evaluation"):
    """`under_way` is what is finished first, for the message."""
    self.signal: int | None = None
    self._under_way = under_way
    self._before: dict[int, object] = {}

  def __enter__(self) -> "Interruption":
    self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
    return self

  def __exit__(self, *_) -> None:
    self._restore()

  def _note(self, number: int, frame) -> None:
    del frame
    self.signal = number
    # Not by print: in the middle of another print it raises.
    name = signal.Signals(number).name
    with contextlib.suppress(OSError):
      os.write(
        1,
        f"\n{name}: saving after this {self._under_way}; again to leave without saving\n".encode(),
      )
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
