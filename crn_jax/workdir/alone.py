"""Orbax in one of several processes: without it each would wait for all others to do the same."""

import jax
import orbax.checkpoint as ocp


def options() -> ocp.options.MultiprocessingOptions:
  """For a process that writes, or reads, by itself."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
  )


def checkpointer(**handling) -> ocp.Checkpointer:
  """For trees; takes further arguments of Orbax's `PyTreeCheckpointHandler`."""
  handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options(), **handling)
  return ocp.Checkpointer(handler, multiprocessing_options=options())


class Manager(ocp.CheckpointManager):
  """For a process that writes by itself; takes no part in what all agree on."""

  def reached_preemption(self, step: int) -> bool:
    """Never: Orbax would ask JAX, which counts its questions as `processes.agreed_stop`'s."""
    del step
    return False
