"""What the processes of one training tell each other beside their arrays: verdicts, when to stop.

Through the coordinator's key-value store, not by collective operations of the devices: these have
limits of time, and one process may check data for hours. A process that is alone tells nothing.

What is told is plain values that JSON holds.
"""

import datetime
import itertools
import json
import pathlib
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import ml_collections
from jax._src.distributed import global_state  # There is no public way to the key-value store.
from jax.experimental import multihost_utils

from crn_jax.errors import UserError
from crn_jax.input_pipeline.dataset import EvalSplit, evaluation_fingerprint
from crn_jax.parallel import is_primary
from crn_jax.workdir import run

_T = TypeVar("_T")

# The key by which JAX's processes learn that one of them is to be stopped, and when.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"

# Milliseconds after which a wait lets Ctrl-C through.
_WAIT_MS = 1000

# Seconds until a file that another machine has written must be seen: network file systems keep
# what they know of a folder for up to a minute.
_SEEN_WITHIN = 60

# All processes tell the same things in the same order: they count alike.
_told = itertools.count()
_asked = itertools.count()
_announced = False


def say(text: str) -> None:
  """Prints, in the primary process only."""
  if is_primary():
    print(text, flush=True)


def on_primary(work: Callable[[], _T]) -> _T:
  """Does something in the primary process only; all others wait for it, as long as it takes.

  Args:
    work: gives a plain value. What it does to its surroundings stays in the primary process.

  Returns:
    The value, in all processes.

  Raises:
    UserError: in all processes, if `work` raises it; in the others also for any other error.
  """
  if jax.process_count() == 1:
    return work()
  key = f"crn_jax/told/{next(_told)}"
  if not is_primary():
    verdict = json.loads(_get(key))
    if "error" in verdict:
      raise UserError(verdict["error"])
    return verdict["value"]
  try:
    value = work()
  except BaseException as error:
    message = str(error)
    if not isinstance(error, (UserError, OSError)):
      message = f"process 0: {type(error).__name__}: {message}"
    global_state.client.key_value_set(key, json.dumps({"error": message}))
    raise
  global_state.client.key_value_set(key, json.dumps({"value": value}))
  return value


def primary_first(make: Callable[[Any], _T], note: Callable[[_T], Any]) -> _T:
  """Makes something in all processes, in the primary one first.

  Args:
    make: what the others are told, or None in the primary process -> what is made.
    note: what the primary process made -> what the others are told, a plain value.

  Raises:
    UserError: see `on_primary`.
  """
  made = []

  def first():
    made.append(make(None))
    return note(made[0])

  told = on_primary(first)
  return made[0] if made else make(told)


def gather(value: Any) -> list:
  """The values of all processes, in their order; each waits for the last."""
  if jax.process_count() == 1:
    return [value]
  key = f"crn_jax/told/{next(_told)}"
  global_state.client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
  return [json.loads(_get(f"{key}/{i}")) for i in range(jax.process_count())]


def check_equal(what: dict[str, Any], mend: str) -> None:
  """Compares facts that must be the same in all processes.

  Args:
    what: name, for people -> plain value.
    mend: what to do if one differs.

  Raises:
    UserError: in all processes; names the first fact that differs, and who differs from process 0.
  """
  everywhere = gather(what)
  for name in what:
    values = [found.get(name) for found in everywhere]
    if other := [i for i, value in enumerate(values) if value != values[0]]:
      i = other[0]
      raise UserError(
        f"{name}: {values[i]} in process {i}, {values[0]} in process 0; it must be the same in all "
        f"processes. {mend}"
      )


def check_alike(config: ml_collections.ConfigDict) -> None:
  """Checks that all processes have as many devices, and the same configuration but for where data
  lie.

  Raises:
    UserError: in all processes, if they do not.
  """
  fields = run.flat(run.as_json(config))
  check_equal(
    {"the number of devices": jax.local_device_count()},
    "Show every process as many (CUDA_VISIBLE_DEVICES, or JAX_LOCAL_DEVICE_IDS)",
  )
  check_equal(
    {
      f"{name} (configuration)": value
      for name, value in fields.items()
      if name not in ("data.root", "data.prepared")
    },
    "Start the same command everywhere",
  )


def check_same_queries(splits: Sequence[EvalSplit]) -> None:
  """Checks that all processes are to evaluate the same queries on the same galleries.

  Raises:
    UserError: in all processes, if they are not.
  """
  if jax.process_count() > 1:
    check_equal(
      {"what is evaluated (a digest of queries and galleries)": evaluation_fingerprint(splits)},
      "Give every machine the same data: an image that is missing on one changes what is ranked",
    )


def check_shared(folder: pathlib.Path) -> None:
  """Checks that a folder, which need not exist, is the same one in all processes.

  A file is written to it, or to the first folder above it that exists, and removed.

  Raises:
    UserError: in all processes, if it is another in some of them.
  """
  if jax.process_count() == 1:
    return
  path = folder.absolute()
  written = []

  def write():
    there = next(p for p in (path, *path.parents) if p.exists())
    written.append(there / f".shared.{secrets.token_hex(8)}")
    written[0].touch()
    return len(path.relative_to(there).parts), written[0].name

  try:
    up, name = on_primary(write)
    there = (path, *path.parents)[min(up, len(path.parents))]
    found = gather([_appears(there / name), socket.gethostname()])
  finally:
    for file in written:
      file.unlink(missing_ok=True)
  blind = [f"process {i} on {host}" for i, (sees, host) in enumerate(found) if not sees]
  if blind:
    raise UserError(
      f"{folder}: is another folder in {', '.join(blind)} than in process 0 on {found[0][1]}. All "
      f"processes read and continue one run: name a folder of a file system that all machines "
      f"share with --workdir"
    )


def agreed_stop(signal_number: int | None) -> int | None:
  """Whether to stop after this step: all processes answer alike, once one got a signal.

  To be called once a step by all. It costs nothing until there is a signal.

  Args:
    signal_number: the signal that this process got, or None.

  Returns:
    A signal's number if all are to stop now, or None.
  """
  global _announced
  if jax.process_count() == 1:
    return signal_number
  if signal_number is not None and not _announced:
    _announced = True
    # JAX's own handler for SIGTERM does this; ours stands in its place, and knows SIGINT, too.
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    global_state.client.key_value_set(_NOTICE, now, allow_overwrite=True)
  if multihost_utils.reached_preemption_sync_point(next(_asked)):
    return signal_number or int(signal.SIGTERM)
  return None


def _appears(path: pathlib.Path) -> bool:
  """Whether a file is there, or comes to be seen."""
  end = time.monotonic() + _SEEN_WITHIN
  while not path.exists():
    if time.monotonic() > end or not path.parent.is_dir():
      return False
    time.sleep(0.5)
  return True


def _get(key: str) -> str:
  """What is told under a key, once it is."""
  while True:
    try:
      return global_state.client.blocking_key_value_get(key, _WAIT_MS)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
