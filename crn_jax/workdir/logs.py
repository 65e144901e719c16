"""What a run records while it goes: TensorBoard events and metrics.jsonl."""

import json
import os
import pathlib
import resource
import sys
from collections.abc import Iterable

import jax
import numpy as np
from absl import logging
from PIL import Image

from crn_jax.parallel import is_primary
from crn_jax.workdir import files, history


class Log:
  """Writes scalars and images of a run, in the primary process only; a context manager.

  `metrics.jsonl` has one object a line: {"step", "epoch", name: value, ...}. A full disk costs
  records, never the run: what cannot be written is dropped with a warning.
  """

  def __init__(self, workdir: str | os.PathLike, start_step: int):
    """Opens both; records beyond `start_step`, of steps that will be done again, are removed."""
    self._path = pathlib.Path(workdir) / history.NAME
    self._writer = None
    if is_primary():
      from clu import metric_writers  # Late: TensorFlow takes seconds to import.

      drop_records_after(self._path, start_step)
      self._writer = metric_writers.SummaryWriter(str(workdir))

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, *_) -> None:
    if self._writer is not None:
      self._attempt(self._writer.close)

  def scalars(self, step: int, epoch: float, values: dict[str, float]) -> None:
    """Records values of a step, e.g. {'train/local/total': 1.5}."""
    if self._writer is None:
      return
    record = json.dumps({"step": step, "epoch": round(epoch, 4), **values})
    self._attempt(lambda: append_line(self._path, record))
    self._attempt(lambda: self._writer.write_scalars(step, values))
    self._attempt(self._writer.flush)

  def pictures(self, step: int, paths: Iterable[pathlib.Path]) -> None:
    """Shows picture files in TensorBoard."""
    for path in paths if self._writer is not None else ():
      with Image.open(path) as picture:
        batch = {f"pictures/{path.stem}": np.asarray(picture.convert("RGB"))[None]}
      self._attempt(lambda batch=batch: self._writer.write_images(step, batch))

  def _attempt(self, write) -> None:
    # TensorFlow's errors are no OSErrors, and importing TensorFlow for their names costs seconds.
    try:
      write()
    except Exception as error:
      if not isinstance(error, OSError) and type(error).__module__ != (
        "tensorflow.python.framework.errors_impl"
      ):
        raise
      logging.warning("%s: a record was not written: %s", self._path.parent, error)


def append_line(path: pathlib.Path, line: str) -> None:
  """Appends a whole line or, if the disk is full, nothing.

  Raises:
    OSError: the line could not be written.
  """
  with open(path, "ab", buffering=0) as file:
    size = file.seek(0, os.SEEK_END)
    data = line.encode() + b"\n"
    try:
      if file.write(data) < len(data):
        raise OSError("no space left for a whole record")
    except OSError:
      file.truncate(size)
      raise


def drop_records_after(path: pathlib.Path, step: int) -> None:
  """Removes the records of later steps, and incomplete lines; atomically."""
  if path.exists():
    kept = [record for record in history.read_records(path) if record["step"] <= step]
    with files.replacing(path) as partial:
      partial.write_text("".join(json.dumps(record) + "\n" for record in kept))


def peak_memory_gib() -> float:
  """Highest memory use so far: of the fullest device, or of this process on a CPU."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  if all(stats):
    return max(s["peak_bytes_in_use"] for s in stats) / 2**30
  status = pathlib.Path("/proc/self/status")
  if status.exists():  # Linux; its `getrusage` includes the peak of the process that started this.
    (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / (2**30 if sys.platform == "darwin" else 2**20)
