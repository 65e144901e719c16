"""Flags of XLA that a configuration asks for."""

import os

_FLAG = "--xla_gpu_exclude_nondeterministic_ops=true"


def exclude_nondeterministic_ops() -> None:
  """Has XLA leave out operations of GPUs whose sums change from run to run.

  To be called before anything is computed: XLA reads the environment once. What the user has set in
  XLA_FLAGS stays, and decides.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if _FLAG.partition("=")[0] not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()
