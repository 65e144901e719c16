"""All tests run on eight virtual CPU devices; the flag must stand before JAX starts."""

import os

import pytest

_DEVICES = "--xla_force_host_platform_device_count"

if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()


@pytest.fixture(scope="module")
def quick_compile():
  """Compiles without optimisation: half the time, where a test is mostly compilation."""
  import jax  # Only here: the flag above must stand before.

  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
