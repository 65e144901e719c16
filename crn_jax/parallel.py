"""Data parallelism: per-device code with a named axis, mapped over all devices.

Two ways to map it, with the same results: `jax.jit(jax.shard_map(...))`, or `jax.pmap`. Arrays are
either replicated (parameters) or sharded on their leading axis (batches); how a mode lays them out
on devices is known here only.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crn_jax import background
from crn_jax.errors import UserError

# Name of the axis that per-device code reduces and gathers over.
AXIS = "data"

REPLICATED, SHARDED = "replicated", "sharded"


def is_primary() -> bool:
  """Whether this process writes, prints and draws; of several, one does."""
  return jax.process_index() == 0


@dataclasses.dataclass(frozen=True)
class DataParallel:
  """Maps per-device functions over devices.

  Attributes:
    mode: 'shard_map' or 'pmap'.
    devices: the devices of all processes.
  """

  mode: str
  devices: tuple[jax.Device, ...]

  @classmethod
  def create(cls, mode: str, devices=None) -> "DataParallel":
    """Over the given devices (default: all of all processes).

    Raises:
      UserError: on an unknown mode.
    """
    if mode not in ("shard_map", "pmap"):
      raise UserError(f"parallel.mode must be 'shard_map' or 'pmap', not {mode!r}")
    if devices is None:
      # A process's slice of a batch is contiguous.
      devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return cls(mode, tuple(devices))

  def check_batch_size(self, batch_size: int, name: str) -> None:
    """Raises UserError if a global batch cannot be split evenly over the devices."""
    if batch_size % len(self.devices):
      raise UserError(
        f"{name} = {batch_size} must be a multiple of the number of devices, {len(self.devices)}"
      )

  def map(self, fn: Callable, outputs: Any, donate_first: bool = False) -> Callable:
    """Compiles `fn(replicated, *sharded)`, per-device code over the axis `AXIS`.

    Args:
      fn: takes a replicated tree and any number of trees sharded on their leading axis.
      outputs: REPLICATED or SHARDED for the output, or a tuple of them for a tuple.
      donate_first: whether the replicated input's buffers may be reused for the output.

    Returns:
      A function of the same arguments, placed by `replicate` and `shard`.
    """
    donate = (0,) if donate_first else ()
    if self.mode == "pmap":
      return jax.pmap(fn, axis_name=AXIS, devices=self.devices, donate_argnums=donate)
    specs = jax.tree.map({REPLICATED: P(), SHARDED: P(AXIS)}.get, outputs)

    def mapped(replicated, *sharded):
      # check_vma=False: gradients are summed over devices by hand, as pmap needs it.
      return jax.shard_map(
        fn, mesh=self._mesh, in_specs=(P(), *(P(AXIS) for _ in sharded)), out_specs=specs,
        check_vma=False,
      )(replicated, *sharded)  # fmt: skip

    return jax.jit(mapped, donate_argnums=donate)

  def compile_ahead(self, mapped: Callable, replicated, *sharded) -> Callable:
    """A function as from `map`, compiled in a thread from now on; a call waits for it.

    pmap, which cannot be compiled for shapes in all its uses, is left to compile when it is called.

    Args:
      mapped: the function.
      replicated: shapes and dtypes of what `replicate` will place.
      *sharded: of what `shard` will place, rows of all processes together.

    Returns:
      The same function; what goes wrong in the thread is raised by a call.
    """
    if self.mode == "pmap":
      return mapped
    arguments = (
      self._abstract(replicated, P()),
      *(self._abstract(tree, P(AXIS)) for tree in sharded),
    )
    compiling = background.start(lambda: mapped.lower(*arguments).compile())

    def waiting(*args):
      compiling.result()
      return mapped(*args)  # JAX finds the program by the function and the arguments' shapes.

    return waiting

  def replicate(self, tree):
    """Host tree, equal in all processes -> one copy a device."""
    if self.mode == "shard_map":
      sharding = NamedSharding(self._mesh, P())
      if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
      # `device_put` would compare every array over the network.
      return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
      )
    local = self._local_devices
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (len(local), *np.shape(x))), tree)
    return jax.device_put(stacked, self._pmap_sharding)

  def shard(self, tree):
    """Host tree with this process's rows -> rows spread over the devices."""
    if self.mode == "shard_map":
      sharding = NamedSharding(self._mesh, P(AXIS))
      return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)
    local = self._local_devices
    split = jax.tree.map(lambda x: x.reshape(len(local), -1, *x.shape[1:]), tree)
    return jax.device_put(split, self._pmap_sharding)

  def fetch(self, tree):
    """Replicated output -> one host copy, as numpy arrays."""
    # All copies are started before the first is waited for.
    if self.mode == "shard_map":
      return jax.device_get(tree)
    one = jax.device_get(_of_one_device(tree))
    return jax.tree.map(lambda x: x[0], one)

  def copy(self, tree):
    """Replicated output -> one copy, of what it is now: programs that donate it leave that alone.

    On a device, in milliseconds, where that has room; else on the host, and the caller waits.
    """
    one = _of_one_device(tree)
    leaves = jax.tree.leaves(one)
    (device,) = leaves[0].devices()
    if not has_room(device, sum(x.nbytes for x in leaves)):
      return self.fetch(tree)
    return _copy_row(one) if self.mode == "pmap" else _copy(one)

  def _abstract(self, tree, spec: P):
    sharding = NamedSharding(self._mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

  @property
  def _mesh(self) -> Mesh:
    return Mesh(np.asarray(self.devices), (AXIS,))

  @property
  def _local_devices(self) -> list[jax.Device]:
    return [d for d in self.devices if d.process_index == jax.process_index()]

  @property
  def _pmap_sharding(self) -> NamedSharding:
    """One row a device of this process: the layout that pmap takes and gives."""
    return NamedSharding(Mesh(np.asarray(self._local_devices), (AXIS,)), P(AXIS))


def has_room(device: jax.Device, size: int) -> bool:
  """Whether a device can hold more bytes without endangering what was computed on it so far.

  As much again must be free at the highest use so far, as memory is in pieces. That use holds
  earlier copies, so that copies go on only where there was room for three. A CPU's memory is the
  host's, where a copy would go otherwise.
  """
  if device.platform == "cpu":
    return True
  stats = device.memory_stats() or {}
  if not {"bytes_limit", "peak_bytes_in_use"} <= stats.keys():
    return False
  return stats["bytes_limit"] - stats["peak_bytes_in_use"] >= 2 * size


def _of_one_device(tree):
  return jax.tree.map(lambda x: x.addressable_shards[0].data, tree)


@jax.jit
def _copy(tree):
  return jax.tree.map(jnp.copy, tree)


@jax.jit
def _copy_row(tree):
  return jax.tree.map(lambda x: x[0], tree)
