"""All tests run on eight virtual CPU devices and share what they compile.

Both must be in the environment before JAX starts; xdist's workers inherit it.
"""

import os
import shutil
import signal
import sys
import tempfile
import time

import pytest

_DEVICES = "--xla_force_host_platform_device_count"

if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# PyTorch's GPU build, which pip takes, brings Triton and imports it, for nothing that is tested. In
# a process that has imported TensorFlow that ends in a segmentation fault.
sys.modules["triton"] = None

# Files whose models have Swin-L's widths. They need several GB each, and so run one after another.
LARGE = {
  "tests/methods/test_losses_parity.py",
  "tests/methods/test_train_parity.py",
  "tests/models/test_forward_parity.py",
  "tests/models/test_heads_grid.py",
}

# Files and workers compile many of the same functions, and give up their own copies: see below.
_created = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  _created = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="crn_jax_compiled_")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def pytest_unconfigure():
  """In the process that created it, the last to end."""
  if _created:
    shutil.rmtree(_created, ignore_errors=True)


def pytest_collection_modifyitems(items):
  """Leaves out TensorFlow's context manager, which only looks like a test."""
  items[:] = [item for item in items if item.name != "test_session"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """A file stays in one process, as its fixtures are computed once; the large ones share one."""
  from xdist.scheduler import LoadFileScheduling

  class Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
      file = super()._split_scope(nodeid)
      return "large" if file in LARGE else file

  return Scheduling(config, log)


@pytest.fixture(scope="module", autouse=True)
def released_memory():
  """Compiled programs of one file are of no use to the next, and are gigabytes."""
  yield
  if "jax" in sys.modules:
    import jax

    from tests import release

    jax.clear_caches()
    release.release_memory()


@pytest.fixture(autouse=True)
def nothing_under_way():
  """A step that one test has begun to compile is not counted by the next."""
  yield
  background = sys.modules.get("crn_jax.background")
  while background and background.under_way():
    time.sleep(0.01)


@pytest.fixture
def usual_handler():
  """Of SIGINT, which a shell's jobs in the background ignore."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def quick_compile():
  """Compiles without optimisation: half the time, where a test is mostly compilation."""
  import jax  # Only here: the flag above must stand before.

  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
