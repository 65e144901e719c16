"""Flags of XLA that a configuration, or several processes, ask for."""

import os

_EXCLUDE = "--xla_gpu_exclude_nondeterministic_ops=true"
_TUNE_ALONE = "--xla_gpu_shard_autotuning=false"


def exclude_nondeterministic_ops() -> None:
  """Has XLA leave out operations of GPUs whose sums change from run to run.

  To be called before anything is computed: XLA reads the environment once. What the user has set in
  XLA_FLAGS stays, and decides.
  """
  _add(_EXCLUDE)


def tune_alone() -> None:
  """Has every process try out for itself how a product is computed best; as above.

  By default processes share that work while they compile, and wait for another. One that finds a
  program in its cache does not compile it, and the others would wait for ever.
  """
  _add(_TUNE_ALONE)


def _add(flag: str) -> None:
  flags = os.environ.get("XLA_FLAGS", "")
  if flag.partition("=")[0] not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
