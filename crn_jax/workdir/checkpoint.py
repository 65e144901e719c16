"""Checkpoints of a run: the last two and the best, by Orbax, written in a thread of their own.

A checkpoint appears complete or not at all, carries checksums, and takes the place of an older one
only once it is complete. So whatever happens there is one to continue from: a full disk keeps the
one before, and a damaged one is passed over for the one before.

Who only reads (evaluation, export) opens the folder with `CheckpointReader`, which changes nothing
in it, so that it may be used beside a training.

Of several processes the primary one writes, as every process has the whole state; each reads for
itself. So none ever waits for another in Orbax.
"""

import concurrent.futures
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from crn_jax.errors import UserError
from crn_jax.models.backbones import stacking
from crn_jax.workdir import alone

_METRIC, _ORDER = "best_metric", "minus_step"
_ITEM = "default"  # Orbax's name of a checkpoint's only item.
# How a checkpoint's arrays are laid out; one without a number has the first.
_UNSTACKED, _STACKED = 0, 1  # See `stacking`.
_SHOWN = 5  # Differences of structure that a message names.


class DamagedError(UserError):
  """A checkpoint whose bytes are not those that were written."""


class CheckpointReader:
  """The checkpoints in a folder, to read; another process may write there meanwhile."""

  def __init__(self, folder: str | os.PathLike):
    self._folder = pathlib.Path(folder).absolute()
    logging.get_absl_logger().addFilter(_not_of_orbax)
    # Lightweight: otherwise Orbax reads the metrics of all checkpoints at once.
    self._reader = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        read_only=True, lightweight_initialize=True, multiprocessing_options=alone.options()
      ),
    )

  def __enter__(self) -> "CheckpointReader":
    return self

  def __exit__(self, *_) -> None:
    self._reader.close()

  def steps(self) -> list[int]:
    """Steps of all checkpoints that are there now, rising."""
    return steps(self._folder)

  def best_step(self) -> int | None:
    """Step of the checkpoint with the highest metric, or None if none was evaluated.

    Of equal ones it is the earlier: as in the PyTorch release, a later one must be strictly better.
    """
    found = {step: _metric(self._folder / str(step)) for step in self.steps()}
    found = {step: metric for step, metric in found.items() if metric is not None}
    return max(found, key=lambda step: (found[step], -step), default=None)

  def results(self, step: int) -> dict | None:
    """Results that were saved with a checkpoint, or None."""
    return self._metadata(step).get("results")

  def restore(self, step: int, like: Any) -> Any:
    """Reads the state of a step.

    Args:
      step: one of `steps()`.
      like: a state of the same structure and shapes; arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The state, of numpy arrays.

    Raises:
      DamagedError: if its bytes are not those that were written.
      UserError: if it cannot be read, or is a state of another structure.
    """
    return self._checked(step, lambda: self._restore_whole(step, like))

  def restore_fields(self, step: int, like: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """Reads some fields of the state of a step: {field: tree of numpy arrays}; see `restore`.

    Without the optimizer's moments a state is a third of its size.
    """
    return self._checked(step, lambda: self._restore_fields(step, like, fields))

  def _restore_whole(self, step: int, like: Any) -> Any:
    state = self._read_arrays(step, self._as_written(step, like))
    metadata = self._metadata(step)
    if "checksums" in metadata:
      self._compare(step, {f: checksum(tree) for f, tree in _fields(state).items()})
    elif metadata.get("checksum") != checksum(state):  # As written before fields had their own.
      raise DamagedError(f"{self._folder / str(step)}: damaged checkpoint (its checksum is wrong)")
    return self._as_used(step, state)

  def _restore_fields(self, step: int, like: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    if "checksums" not in self._metadata(step):
      whole = _fields(self._restore_whole(step, like))
      return {field: whole[field] for field in fields}
    wanted = {field: getattr(like, field) for field in fields}
    found = self._read_arrays(step, self._as_written(step, wanted))
    self._compare(step, {field: checksum(tree) for field, tree in found.items()})
    return self._as_used(step, found)

  def _as_written(self, step: int, like: Any) -> Any:
    """Shapes of a state in the layout of a checkpoint."""
    layout = self._metadata(step).get("layout", _UNSTACKED)
    if layout > _STACKED:
      raise UserError(
        f"{self._folder / str(step)}: layout {layout} of the arrays, {_STACKED} is the newest that "
        f"is known here; use the version that wrote it"
      )
    return jax.eval_shape(stacking.unstack, like) if layout == _UNSTACKED else like

  def _as_used(self, step: int, state: Any) -> Any:
    written = self._metadata(step).get("layout", _UNSTACKED)
    return stacking.stack(state) if written == _UNSTACKED else state

  def _compare(self, step: int, found: dict[str, str]) -> None:
    expected = self._metadata(step)["checksums"]
    wrong = [field for field, value in found.items() if expected.get(field) != value]
    if wrong:
      raise DamagedError(
        f"{self._folder / str(step)}: damaged checkpoint (checksum of {', '.join(wrong)} is wrong)"
      )

  def _read_arrays(self, step: int, like: Any) -> Any:
    folder = self._folder / str(step) / _ITEM
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with alone.checkpointer() as checkpointer:
      saved = checkpointer.metadata(folder).item_metadata
      if saved is None:  # Orbax does not say why.
        raise ValueError("the list of its arrays cannot be read")
      _check_structure(self._folder / str(step), saved.tree, abstract)
      as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
      return checkpointer.restore(
        folder,
        args=ocp.args.PyTreeRestore(item=abstract, restore_args=as_numpy, partial_restore=True),
      )

  def _checked(self, step: int, read: Callable[[], Any]) -> Any:
    """Tells apart what can go wrong in reading: the device, the bytes, the program."""
    path = self._folder / str(step)
    try:
      return read()
    except UserError:
      raise
    except _PROGRAMMING_ERRORS:
      raise
    except Exception as error:  # Orbax and TensorStore raise many kinds.
      reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not path.exists():
      raise UserError(f"{path}: is gone; a training has replaced it. Start the same command again")
    unreadable = _unreadable(path)
    if unreadable is not None:
      raise UserError(
        f"{path}: cannot be read ({unreadable}); nothing was changed. Mend the disk or its "
        f"connection, then start the same command again"
      )
    try:
      return read()  # The bytes can be read now: what failed may have been of the moment.
    except _PROGRAMMING_ERRORS:
      raise
    except UserError:
      raise
    except Exception as error:
      raise DamagedError(f"{path}: damaged checkpoint ({reason})") from error

  def _metadata(self, step: int) -> dict:
    return self._reader.metadata(step).custom_metadata or {}


class Checkpoints(CheckpointReader):
  """The checkpoints in a folder, to write; a context manager that waits for writing to end.

  One process at a time may have it open: see `workdir.lock`. Of a training's it is the primary one.
  """

  def __init__(self, folder: str | os.PathLike):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    super().__init__(folder)
    self._set_aside_unreadable_metrics()
    self._manager = self._open()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._writing: tuple[int, concurrent.futures.Future] | None = None  # Step, and its writing.

  def _open(self) -> ocp.CheckpointManager:
    def rank(metrics):
      return metrics[_METRIC], metrics[_ORDER]

    policies = [
      preservation_policy.LatestN(2),
      preservation_policy.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False),
    ]
    return alone.Manager(
      self._folder,
      item_handlers=alone.waiting_handler(),
      options=ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False,  # It is called in a thread, see `_write`.
        best_fn=rank,
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        create=False,  # It is there; Orbax refuses to, for one process of several.
        multiprocessing_options=alone.options(),
      ),
    )

  def __exit__(self, *_) -> None:
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._manager.close()
      super().__exit__()

  def save(self, state: Any, metric: float | None = None, results: dict | None = None) -> None:
    """Starts writing a state; returns once that is computed and the one before it is written.

    A failure of the disk (it is full) is no error: it is shown as a warning at the next call of
    this class; the checkpoints there are stay as they are. Any other error is raised there.

    Args:
      state: dataclass with the field `step`; arrays of the host or of one device, one copy, which
        nobody changes or donates until they are written (`DataParallel.copy`).
      metric: value of eval.best_metric at this state, if it was evaluated.
      results: results of the evaluation, if there was one.
    """
    self.wait()
    step = int(state.step)
    free, needed = shutil.disk_usage(self._folder).free, size_in_bytes(state)
    if free < needed:
      # Not even tried: Orbax would fill the disk for others and print a traceback an array.
      self._warn_not_written(step, f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
      return
    held = [state]
    self._writing = step, self._thread.submit(self._write, step, held, metric, results)

  def _write(self, step: int, held: list, metric: float | None, results: dict | None) -> None:
    """Writes the state that is held, and lets go of it as soon as it is on the host."""
    state = jax.tree.map(np.asarray, jax.device_get(held.pop()))
    order = {_METRIC: metric, _ORDER: -step}
    checksums = {field: checksum(tree) for field, tree in _fields(state).items()}
    self._manager.save(
      step,
      args=ocp.args.PyTreeSave(state),
      metrics=None if metric is None else order,
      custom_metadata={"checksums": checksums, "results": results, "layout": _STACKED},
    )

  def check_space(self, state: Any) -> None:
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
    """Warns of a failure to write, if one has shown by now."""
    if self._writing is not None and self._writing[1].done():
      self.wait()

  def wait(self) -> None:
    """Waits until everything is written, and warns of a failure."""
    if self._writing is None:
      return
    step, writing = self._writing
    concurrent.futures.wait([writing])
    self._writing = None
    try:
      writing.result()
    except Exception as error:
      if not _of_the_disk(error):
        raise
      self._manager.reload()
      for partial in self._folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(partial, ignore_errors=True)  # It fills the disk.
      self._warn_not_written(step, str(error).splitlines()[0][:200])

  def require(self, step: int) -> None:
    """Waits, and raises UserError if the checkpoint of a step is not there."""
    self.wait()
    if step not in self.steps():
      last = f"continues from step {self.steps()[-1]}" if self.steps() else "starts anew"
      raise UserError(
        f"{self._folder}: the checkpoint at step {step} could not be written; free disk space, "
        f"then the same command {last}"
      )

  def restore_last(self, like: Any) -> Any | None:
    """Reads the newest checkpoint that is not damaged; None if there is no checkpoint.

    Damaged ones are set aside in the folder `damaged` beside the checkpoints, with a warning.

    Raises:
      UserError: if all are damaged; if one cannot be read or has another structure, in which case
        nothing is moved.
    """
    damaged = []
    for step in reversed(self.steps()):
      try:
        state = self.restore(step, like)
      except DamagedError as error:
        damaged.append((step, str(error)))
        continue
      for bad_step, message in damaged:
        aside = self._set_aside(bad_step)
        logging.warning("%s; moved to %s, continuing from step %d", message, aside, step)
      self._manager.reload()
      return state
    if damaged:
      messages = "\n  ".join(message for _, message in damaged)
      raise UserError(
        f"no checkpoint can be read:\n  {messages}\n"
        f"Restore the folder from a copy, or train anew with another --workdir"
      )
    return None

  def _warn_not_written(self, step: int, reason: str) -> None:
    kept = f"the one at step {self.steps()[-1]} is kept" if self.steps() else "there is none yet"
    logging.warning("checkpoint at step %d was not written (%s); %s", step, reason, kept)

  def _set_aside(self, step: int) -> pathlib.Path:
    aside = self._folder.parent / "damaged" / str(step)
    aside.parent.mkdir(exist_ok=True)
    if aside.exists():
      shutil.rmtree(aside)
    os.rename(self._folder / str(step), aside)
    return aside

  def _set_aside_unreadable_metrics(self) -> None:
    """Orbax reads the metrics of all checkpoints at once and fails if one is damaged."""
    for step in steps(self._folder):
      path = _metrics_path(self._folder / str(step))
      try:
        json.loads(path.read_text())
      except FileNotFoundError:
        continue
      except ValueError:
        aside = self._set_aside(step)
        logging.warning("%s: damaged checkpoint; moved to %s", path, aside)


def steps(folder: str | os.PathLike) -> list[int]:
  """Steps of the checkpoints in a folder, damaged or not, rising; none if there is no folder."""
  return sorted(int(path.name) for path in pathlib.Path(folder).glob("*") if path.name.isdigit())


def size_in_bytes(state: Any) -> int:
  """Bytes of all arrays of a state: what a checkpoint of it takes, or a little more."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def checksum(tree: Any) -> str:
  """CRC-32 over all arrays of a tree, in its order.

  Orbax detects what is missing or cut short, but not changed bytes.
  """

  def crc(leaf) -> int:
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))

  # In threads: zlib works outside Python's lock, and a Swin-L state has gigabytes.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    parts = list(pool.map(crc, jax.tree.leaves(tree)))
  return f"{zlib.crc32(np.asarray(parts, np.uint32).tobytes()):08x}"


# Never a sign of a damaged file.
_PROGRAMMING_ERRORS = (TypeError, AttributeError, NameError, ImportError, MemoryError)


def _fields(state: Any) -> dict[str, Any]:
  return {name: getattr(state, name) for name in state.__dataclass_fields__}


def _check_structure(path: pathlib.Path, saved: Any, like: Any) -> None:
  """Raises UserError if a checkpoint holds other arrays than `like` asks for."""
  found = {leaf.name: tuple(leaf.shape) for leaf in jax.tree.leaves(saved)}
  wanted = {
    jax.tree_util.keystr(key, simple=True, separator="."): tuple(leaf.shape)
    for key, leaf in jax.tree_util.tree_leaves_with_path(like)
  }
  fields = {name.partition(".")[0] for name in wanted}
  found = {name: shape for name, shape in found.items() if name.partition(".")[0] in fields}
  different = [n for n in sorted(found | wanted) if found.get(n) != wanted.get(n)]
  if different:
    shown = [
      f"{n}: {found.get(n, 'absent')} in the checkpoint, {wanted.get(n, 'absent')} expected"
      for n in different[:_SHOWN]
    ]
    more = f"\n  ... and {len(different) - _SHOWN:,} more" if len(different) > _SHOWN else ""
    raise UserError(
      f"{path}: a state of another structure, {len(different):,} arrays differ:\n  "
      + "\n  ".join(shown)
      + f"{more}\nUse the configuration and the version that wrote it; nothing was changed"
    )


def _metrics_path(folder: pathlib.Path) -> pathlib.Path:
  return folder / "metrics" / "metrics"


def _metric(folder: pathlib.Path) -> float | None:
  """The metric that was saved with a checkpoint; None if there is none, or none to be read."""
  try:
    return json.loads(_metrics_path(folder).read_text())[_METRIC]
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None


def _unreadable(folder: pathlib.Path) -> str | None:
  """Why the bytes below a folder cannot be read now; None if they can."""
  try:
    for path in folder.rglob("*"):
      if path.is_file():
        with open(path, "rb") as file:
          while file.read(1 << 24):
            pass
  except OSError as error:
    return str(error)
  return None


def _of_the_disk(error: BaseException | None) -> bool:
  """Whether the system refused to write; TensorStore tells of it in its message only."""
  while error is not None:
    if isinstance(error, OSError) or "OS error" in str(error) or "Error writing" in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def _not_of_orbax(record) -> bool:
  """Log filter: Orbax logs habits, and pages of traceback for errors that are reported here."""
  return "orbax" not in record.pathname
