"""Checkpoints of a run: the last two and the best, by Orbax, written in the background.

A checkpoint appears complete or not at all, carries a checksum, and takes the place of an older one
only once it is complete. So whatever happens there is one to continue from: a full disk keeps the
one before, and a damaged one is passed over for the one before.
"""

import concurrent.futures
import json
import os
import pathlib
import shutil
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from crn_jax.methods.crn import TrainState

_METRIC, _ORDER = "best_metric", "minus_step"


class Checkpoints:
  """The checkpoints in a folder; a context manager that waits for writing to end."""

  def __init__(self, folder: str | os.PathLike):
    self._folder = pathlib.Path(folder).absolute()

    def rank(metrics):
      # Of equal ones the earlier: as the release, a later one must be strictly better.
      return metrics[_METRIC], metrics[_ORDER]

    policies = [
      preservation_policy.LatestN(2),
      preservation_policy.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False),
    ]
    logging.get_absl_handler().addFilter(_not_of_orbax)
    self._set_aside_unreadable_metrics()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        best_fn=rank,
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
      ),
    )
    self._writing: int | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.wait()
    self._manager.close()

  def steps(self) -> list[int]:
    """Steps of all checkpoints, rising."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """Step of the checkpoint with the highest metric, or None if none was evaluated."""
    step = self._manager.best_step()
    return step if step is not None and self._manager.metrics(step) is not None else None

  def results(self, step: int) -> dict | None:
    """Results that were saved with a checkpoint, or None."""
    return self._metadata(step).get("results")

  def save(
    self, state: TrainState, metric: float | None = None, results: dict | None = None
  ) -> None:
    """Starts writing a state; returns as soon as the one before is written.

    A failure (a full disk) is no error: it is told as a warning, when it shows, which is at the
    next call of this class; the checkpoints there are stay as they are.

    Args:
      state: host arrays, one copy (not one a device).
      metric: value of eval.best_metric at this state, if it was evaluated.
      results: results of the evaluation, if there was one.
    """
    self.wait()
    step = int(state.step)
    free, needed = shutil.disk_usage(self._folder).free, size_in_bytes(state)
    if free < needed:
      # Not even tried: Orbax would fill the disk for others and print a traceback an array.
      self._tell_not_written(step, f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
      return
    order = {_METRIC: metric, _ORDER: -step}
    self._attempt(
      step,
      lambda: self._manager.save(
        step,
        args=ocp.args.StandardSave(state),
        metrics=None if metric is None else order,
        custom_metadata={"checksum": checksum(state), "results": results},
      ),
    )
    self._writing = step

  def check_space(self, state: TrainState) -> None:
    """Warns if the disk cannot hold what a run keeps: three checkpoints, and one being written."""
    free, needed = shutil.disk_usage(self._folder).free, 4 * size_in_bytes(state)
    if not self.steps() and free < needed:
      logging.warning(
        "%s: checkpoints will need %.3g GB, %.3g GB are free",
        self._folder,
        needed / 1e9,
        free / 1e9,
      )

  def poll(self) -> None:
    """Tells of a failure to write, if one has shown by now."""
    if not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits until everything is written, and tells of a failure."""
    if self._writing is not None:
      step, self._writing = self._writing, None
      self._attempt(step, self._manager.wait_until_finished)

  def require(self, step: int) -> None:
    """Waits, and raises OSError if the checkpoint of a step is not there."""
    self.wait()
    if step not in self.steps():
      last = f"continues from step {self.steps()[-1]}" if self.steps() else "starts anew"
      raise OSError(
        f"{self._folder}: the checkpoint at step {step} could not be written; free disk space, "
        f"then the same command {last}"
      )

  def restore(self, step: int, like: TrainState) -> TrainState:
    """Reads the state of a step.

    Args:
      step: one of `steps()`.
      like: a state of the same structure and shapes.

    Raises:
      ValueError: if the checkpoint is damaged.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    expected = self._metadata(step).get("checksum")
    try:
      state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except Exception as error:  # Orbax and TensorStore raise many kinds.
      reason = str(error).splitlines()[0]
      raise ValueError(f"{self._folder / str(step)}: damaged checkpoint ({reason})") from error
    if checksum(state) != expected:
      raise ValueError(f"{self._folder / str(step)}: damaged checkpoint (its checksum is wrong)")
    return state

  def restore_last(self, like: TrainState) -> TrainState | None:
    """Reads the newest checkpoint that is not damaged; None if there is no checkpoint.

    Damaged ones are set aside in the folder `damaged` beside the checkpoints, with a warning.

    Raises:
      ValueError: if all are damaged.
    """
    damaged = []
    for step in reversed(self.steps()):
      try:
        state = self.restore(step, like)
      except ValueError as error:
        damaged.append((step, str(error)))
        continue
      for bad_step, message in damaged:
        aside = self._set_aside(bad_step)
        logging.warning("%s; moved to %s, continuing from step %d", message, aside, step)
      self._manager.reload()
      return state
    if damaged:
      messages = "\n  ".join(message for _, message in damaged)
      raise ValueError(
        f"no checkpoint can be read:\n  {messages}\n"
        f"Restore the folder from a copy, or train anew with another --workdir"
      )
    return None

  def _attempt(self, step: int, write) -> None:
    try:
      write()
    except Exception as error:  # As above; what failed is the disk, and the run must go on.
      self._manager.reload()
      for partial in self._folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(partial, ignore_errors=True)  # It fills the disk.
      self._tell_not_written(step, str(error).splitlines()[0][:200])

  def _tell_not_written(self, step: int, reason: str) -> None:
    kept = f"the one at step {self.steps()[-1]} is kept" if self.steps() else "there is none yet"
    logging.warning("checkpoint at step %d was not written (%s); %s", step, reason, kept)

  def _metadata(self, step: int) -> dict:
    return self._manager.metadata(step).custom_metadata or {}

  def _set_aside(self, step: int) -> pathlib.Path:
    aside = self._folder.parent / "damaged" / str(step)
    aside.parent.mkdir(exist_ok=True)
    if aside.exists():
      shutil.rmtree(aside)
    os.rename(self._folder / str(step), aside)
    return aside

  def _set_aside_unreadable_metrics(self) -> None:
    """Orbax reads the metrics of all checkpoints at once and fails if one is damaged."""
    for path in self._folder.glob("*/metrics/metrics"):
      try:
        json.loads(path.read_text())
      except ValueError:
        aside = self._set_aside(int(path.parts[-3]))
        logging.warning("%s: damaged checkpoint; moved to %s", path, aside)


def exists(folder: str | os.PathLike) -> bool:
  """Whether a folder of checkpoints holds one, damaged or not."""
  return any(path.name.isdigit() for path in pathlib.Path(folder).glob("*"))


def size_in_bytes(state: TrainState) -> int:
  """Bytes of all arrays of a state: what a checkpoint of it takes, or a little more."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def checksum(state: TrainState) -> str:
  """CRC-32 over all arrays of a state, in the order of the tree.

  Orbax detects what is missing or cut short, but not changed bytes.
  """

  def crc(leaf) -> int:
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))

  # In threads: zlib works outside Python's lock, and a Swin-L state has gigabytes.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    parts = list(pool.map(crc, jax.tree.leaves(state)))
  return f"{zlib.crc32(np.asarray(parts, np.uint32).tobytes()):08x}"


def _not_of_orbax(record) -> bool:
  """Log filter: Orbax logs habits, and pages of traceback for errors that are told here."""
  return "orbax" not in record.pathname
