"""Checkpoints of a run: the last and the best, by Orbax, written in the background."""

import os
import pathlib

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from crn_jax.train_step import TrainState

METRIC = "best_metric"


class Checkpoints:
  """The checkpoints in a folder; a context manager that waits for writing to end."""

  def __init__(self, folder: str | os.PathLike):
    keep_best = preservation_policy.BestN(get_metric_fn=lambda metrics: metrics[METRIC], n=1)
    self._manager = ocp.CheckpointManager(
      pathlib.Path(folder).absolute(),
      options=ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics[METRIC],
        preservation_policy=preservation_policy.AnyPreservationPolicy(
          [preservation_policy.LatestN(1), keep_best]
        ),
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self._manager.close()

  def last_step(self) -> int | None:
    """Step of the newest checkpoint, or None."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Step of the checkpoint with the highest metric, or None."""
    return self._manager.best_step()

  def save(self, state: TrainState, metric: float) -> None:
    """Starts writing a state; returns as soon as it is copied.

    Args:
      state: host or device arrays, one copy (not one a device).
      metric: value of eval.best_metric at this state.
    """
    self._manager.save(
      int(state.step), args=ocp.args.StandardSave(state), metrics={METRIC: float(metric)}
    )

  def restore(self, step: int, like: TrainState) -> TrainState:
    """Reads the state of a step.

    Args:
      step: as given by `last_step` or `best_step`.
      like: a state of the same structure and shapes.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
