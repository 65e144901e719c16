"""All tests run on eight virtual CPU devices; the flag must stand before JAX starts."""

import os
import sys

import pytest

_DEVICES = "--xla_force_host_platform_device_count"

if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()


# These hold weights at Swin-L's widths: one process for all of them, or memory runs short.
_LARGE = ("test_forward_parity", "test_heads_grid", "test_losses_parity", "test_train_parity")


@pytest.hookimpl(tryfirst=True)  # Before pytest-xdist reads the groups.
def pytest_collection_modifyitems(items):
  """A process runs whole files, whose fixtures are then computed once."""
  # TensorFlow's context manager, which only looks like a test.
  items[:] = [item for item in items if item.name != "test_session"]
  for item in items:
    name = item.path.stem
    item.add_marker(pytest.mark.xdist_group("large" if name in _LARGE else name))


@pytest.fixture(scope="module", autouse=True)
def released_memory():
  """Compiled programs of one file are of no use to the next, and are gigabytes."""
  yield
  if "jax" in sys.modules:
    import jax

    from tests import release

    jax.clear_caches()
    release.release_memory()


@pytest.fixture(scope="module")
def quick_compile():
  """Compiles without optimisation: half the time, where a test is mostly compilation."""
  import jax  # Only here: the flag above must stand before.

  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
