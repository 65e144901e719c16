"""A process among others: how it finds them, joins them and leaves them.

A process that is alone starts nothing here, and touches no device.
"""

import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from crn_jax import background
from crn_jax.errors import UserError

# Seconds to wait for the other processes at the start.
WAIT = 300

# Seconds without a sign of life after which JAX takes a process for lost, and ends all others.
_HEARTBEAT = 30
# Seconds that a process that failed waits for others which may be about to fail, too.
_FAREWELL = 10

# How errors of a collective operation read when a process that takes part in it has ended.
_LOST = re.compile(r"Gloo|NCCL|coordination service|UNAVAILABLE|Connection (reset|closed)", re.I)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands among the others.

  Attributes:
    coordinator: HOST:PORT at which process 0 answers.
    processes: how many there are.
    process: number of this one, from 0.
    local_devices: of this machine, those that the process uses; None for all.
  """

  coordinator: str
  processes: int
  process: int
  local_devices: tuple[int, ...] | None = None


@dataclasses.dataclass
class _Joined:
  """What is known once a process has joined others.

  Attributes:
    last_words: what is said when JAX ends this process.
    abort_handler: kept from being collected.
  """

  last_words: str
  abort_handler: object


_joined: _Joined | None = None


def find(
  coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Place | None:
  """Where this process stands: as given, as the environment says, or as JAX finds out.

  The environment is JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or for the last
  JOB_COMPLETION_INDEX, which Kubernetes sets in an indexed job. JAX knows Slurm, Open MPI and TPUs.

  Args:
    coordinator, processes, process: as of `Place`; None looks further. One process is alone.

  Returns:
    The place, or None for a process that is alone.

  Raises:
    UserError: something is missing or cannot be.
  """
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
  processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
  explicit = coordinator is not None or processes is not None or process is not None
  if processes == 1:
    return None
  local_devices = None
  if process is None:
    process = _number("JAX_PROCESS_ID")
  if process is None and explicit:
    process = _number("JOB_COMPLETION_INDEX")
  # JAX's own detection asks Kubernetes for more than pods may know by default, and takes every
  # indexed job for one training.
  if None in (coordinator, processes, process) and "KUBERNETES_SERVICE_HOST" not in os.environ:
    from jax._src.clusters import ClusterEnv  # There is no public way to ask without starting.

    coordinator, processes, process, local_devices = (
      ClusterEnv.auto_detect_unset_distributed_params(
        coordinator, processes, process, None, None, WAIT
      )
    )
  given = {"coordinator": coordinator, "processes": processes, "process": process}
  if not explicit and (processes in (None, 1) or None in given.values()):
    return None
  if missing := [f"--{name}" for name, value in given.items() if value is None]:
    raise UserError(
      f"{', '.join(missing)}: missing; a process among several needs --coordinator=HOST:PORT of "
      f"process 0, --processes=N and --process=0 .. N - 1 (docs/cluster.md)"
    )
  if not re.fullmatch(r".+:\d+", coordinator):
    raise UserError(f"--coordinator={coordinator}: expected HOST:PORT, e.g. node1:4321")
  if processes < 1 or not 0 <= process < processes:
    raise UserError(
      f"--process={process} of --processes={processes}: expected numbers from 0 to "
      f"{max(processes, 1) - 1}, another one for every process"
    )
  if processes == 1:
    return None
  if local_devices is not None and not os.environ.get("JAX_LOCAL_DEVICE_IDS"):
    local_devices = tuple(local_devices)
  else:
    local_devices = None
  return Place(coordinator, processes, process, local_devices)


def join(place: Place, again: str, wait: int = WAIT) -> None:
  """Waits for the other processes; to be called before anything touches a device.

  From here on JAX ends this process if another one is lost, within a minute, with a message.

  Args:
    place: of this process.
    again: the command that starts this process again, for the message.
    wait: seconds.

  Raises:
    UserError: process 0 is not found, or cannot answer at its address.
  """
  global _joined
  import jax

  if place.process:
    _reach(place, wait)
  _joined = _Joined(
    f"{place.coordinator}: not all {place.processes} processes came within {wait} s. Start the "
    f"same command once for every --process=0 .. {place.processes - 1}, each number once",
    _say_before_abort(),
  )
  handler = signal.getsignal(signal.SIGTERM)
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.processes,
      place.process,
      list(place.local_devices) if place.local_devices is not None else None,
      cluster_detection_method="deactivate",
      initialization_timeout=wait,
      heartbeat_timeout_seconds=_HEARTBEAT,
    )
  except (RuntimeError, ValueError) as error:
    _joined = None
    raise UserError(
      f"{place.coordinator}: process {place.process} cannot join the others there "
      f"({str(error).splitlines()[0]}). The address must be of the machine of process 0, with a "
      f"port that nothing else uses: choose another --coordinator"
    ) from error
  # JAX notes the signal from here on; outside of training, which asks for it, it ends a process.
  signal.signal(signal.SIGTERM, handler if handler is not None else signal.SIG_DFL)
  _joined.last_words = (
    f"process {place.process} of {place.processes}: another process has ended, its own output says "
    f"why, and none can go on without it. Start all of them again; a training continues from its "
    f"last checkpoint:\n  {again}"
  )


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
  """Context of a program: one that fails waits neither for others nor for its own threads.

  By default a process that has joined others would wait for them before it ends, and they for it in
  the next collective operation; and one that compiles in the background until that is done. A
  process that does neither is left alone.
  """
  try:
    yield
  except BaseException as error:
    if _joined is None and not background.under_way():
      raise
    _leave(error)


def _leave(error: BaseException) -> None:
  """Says what was wrong and ends the process, as Python would."""
  status, text = 1, None
  if isinstance(error, SystemExit):
    status, text = (
      (error.code or 0, None) if isinstance(error.code, int | None) else (1, error.code)
    )
  elif _joined is not None and _LOST.search(str(error)):
    # The cause, too: a network that cannot be set up reads alike, in all processes.
    text = f"{type(error).__name__}: {error}\nerror: {_joined.last_words}"
  else:
    traceback.print_exception(error)
  if text is not None:
    print(text, file=sys.stderr)
  if _joined is not None:
    _say_farewell()
  sys.stdout.flush()
  sys.stderr.flush()
  if _joined is None and isinstance(error, KeyboardInterrupt):  # A shell looks at the signal.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
  os._exit(status)


def _say_farewell() -> None:
  """Lets others who leave for the same reason do so without being told that another has ended."""
  from jax._src.distributed import global_state  # There is no public way to it.

  _joined.last_words = ""
  with contextlib.suppress(Exception):
    global_state.client.wait_at_barrier("crn_jax/leaving", 1000 * _FAREWELL)
    if global_state.process_id == 0:
      time.sleep(1)  # It answers the others.


def _reach(place: Place, wait: int) -> None:
  """Waits until process 0 listens: JAX would end this process without a word to mend it.

  Raises:
    UserError: it does not.
  """
  host, _, port = place.coordinator.rpartition(":")
  start, reason = time.monotonic(), ""
  while (left := start + wait - time.monotonic()) > 0:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=left).close()
      return
    except (OSError, OverflowError) as error:
      reason = str(error)
    time.sleep(min(1, max(left, 0)))
  raise UserError(
    f"{place.coordinator}: no answer from process 0 in {time.monotonic() - start:.0f} s "
    f"({reason}). Start it on that machine with --process=0, and let its port through the "
    f"firewall; or give its address with --coordinator=HOST:PORT"
  )


def _say_before_abort() -> Callable:
  """Has the last words said when JAX ends this process, in C++ and by abort().

  A handler in Python would wait for the interpreter, which abort() does not return to. The process
  ends in it: a core file of all its memory is of no use to anybody.
  """

  def handle(_):
    if _joined.last_words:
      os.write(2, f"error: {_joined.last_words}\n".encode())
    os._exit(1)

  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
  return handler


def _number(variable: str) -> int | None:
  """An environment variable as a number.

  Raises:
    UserError: it is none.
  """
  value = os.environ.get(variable)
  if not value:
    return None
  if not value.isdigit():
    raise UserError(f"{variable}={value}: expected a number, 0 or more")
  return int(value)
