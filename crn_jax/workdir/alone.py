"""Orbax in one of several processes: without it each would wait for all others to do the same."""

import jax
import numpy as np
import orbax.checkpoint as ocp


def options() -> ocp.options.MultiprocessingOptions:
  """For a process that writes, or reads, by itself."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
  )


def checkpointer(**handling) -> ocp.Checkpointer:
  """For trees; takes further arguments of Orbax's `PyTreeCheckpointHandler`."""
  return ocp.Checkpointer(_handler(**handling), multiprocessing_options=options())


def waiting_handler() -> ocp.PyTreeCheckpointHandler:
  """Writes trees of NumPy arrays whose owner waits: Orbax need not copy them first."""
  arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
  registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, arrays))
  return _handler(type_handler_registry=registry)


def _handler(**handling) -> ocp.PyTreeCheckpointHandler:
  return ocp.PyTreeCheckpointHandler(multiprocessing_options=options(), **handling)


class Manager(ocp.CheckpointManager):
  """For a process that writes by itself; takes no part in what all agree on."""

  def reached_preemption(self, step: int) -> bool:
    """Never: Orbax would ask JAX, which counts its questions as `processes.agreed_stop`'s."""
    del step
    return False
