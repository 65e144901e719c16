"""Trainings that come before another: the towers are fine-tuned, then something learns on them.

The work directory is that of the last training; the one before has the folder `towers` in it, a
whole run of its own, with the fine-tuned towers as a folder of weights in `towers/weights`.
"""

import pathlib

import ml_collections

from crn_jax.methods.registry import uses_features
from crn_jax.workdir import run

_METHOD = "fine_tuning"


def fine_tuning(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict | None:
  """The configuration of the training before this one, or None if there is none."""
  if not uses_features(config.method) or not config.finetune.num_epochs:
    return None
  first = config.copy_and_resolve_references()
  first.method = _METHOD
  first.name, first.preset = f"{config.name}_{run.TOWERS}", f"{config.preset}_{run.TOWERS}"
  for field in ("num_epochs", "batch_size", "optimizer"):
    first[field] = first.finetune[field]
  first.eval.every_epochs = first.finetune.evaluate_every_epochs
  first.finetune.num_epochs = 0
  return first


def is_first(config: ml_collections.ConfigDict) -> bool:
  """Whether a configuration is that of a training before another one."""
  return config.method == _METHOD


def towers(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
  """Folder of the weights of the towers on whose features a run learns."""
  if config.finetune.num_epochs:
    return str(workdir / run.TOWERS / "weights")
  return config.model.pretrained
