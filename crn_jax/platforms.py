"""The platform that a program is traced for, which need not be one of the machine's."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_traced_for = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def tracing_for(device: jax.Device) -> Iterator[None]:
  """What is traced here is for the device's platform, whatever the machine has.

  For functions that were not traced for another platform before: JAX keeps what it traced.
  """
  token = _traced_for.set(device.platform)
  try:
    yield
  finally:
    _traced_for.reset(token)


def current() -> str:
  """The platform that programs are traced for, e.g. 'cpu' or 'gpu'."""
  return _traced_for.get() or jax.default_backend()
