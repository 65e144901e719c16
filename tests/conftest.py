"""All tests run on eight virtual CPU devices; the flag must stand before JAX starts."""

import os
import sys

import pytest

_DEVICES = "--xla_force_host_platform_device_count"

if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()


def pytest_collection_modifyitems(items):
  """Leaves out TensorFlow's context manager, which only looks like a test."""
  items[:] = [item for item in items if item.name != "test_session"]


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
