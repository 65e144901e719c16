"""Array layouts of PyTorch and of this project, and filling a tree of ours by PyTorch's names.

PyTorch keeps (out, in, *window), Flax (*window, in, out); patch embedding and 1 x 1 convolutions
are plain matrices here. Everything that is not a kernel is the same in both.
"""

from collections.abc import Callable, Mapping

import numpy as np
from flax import traverse_util

KERNELS = ("kernel", "hidden_kernel")


def to_flax(tensor: np.ndarray, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
  """PyTorch tensor -> Flax array of the given shape.

  Args:
    tensor: any PyTorch weight or buffer.
    leaf: last part of the Flax name, e.g. 'kernel'.
    shape: what the Flax module expects.

  Raises:
    ValueError: if the sizes do not fit.
  """
  given = tensor.shape
  if leaf in KERNELS and tensor.ndim > 1:
    tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    fits = tensor.shape[-1] == shape[-1] and tensor.size == np.prod(shape)
  else:
    fits = tensor.shape == shape or tensor.size == np.prod(shape) == 1
  if not fits:
    raise ValueError(f"has shape {given} where {shape} (ours: kernels are transposed) is expected")
  return tensor.reshape(shape)


def to_torch(array: np.ndarray, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
  """Inverse of `to_flax`: Flax array -> PyTorch tensor of the given shape."""
  if leaf not in KERNELS:
    return array.reshape(shape)
  array = array.reshape(*shape[2:], shape[1], shape[0])
  return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))


def fill(
  like: Mapping, name_of: Callable[[tuple], str], tensors: Mapping[str, np.ndarray], source: str
) -> dict:
  """A tree of ours with PyTorch's values.

  Args:
    like: the structure to fill: arrays or their shapes.
    name_of: path in `like` -> name in `tensors`.
    tensors: every tensor must have its place.
    source: file that they come from, for messages.

  Returns:
    A tree like `like`, float32.

  Raises:
    ValueError: if tensors are missing, left over, or of another shape; names each.
  """
  flat = traverse_util.flatten_dict(like)
  names = {path: name_of(path) for path in flat}
  expected = set(names.values())
  problems = [f"missing {n}" for n in names.values() if n not in tensors]
  problems += [f"unexpected {n} {np.shape(tensors[n])}" for n in tensors if n not in expected]
  filled = {}
  for path, name in names.items():
    if name in tensors:
      try:
        filled[path] = to_flax(np.asarray(tensors[name], np.float32), path[-1], flat[path].shape)
      except ValueError as error:
        problems.append(f"{name} {error}")
  if problems:
    listed = "\n  ".join(problems)
    raise ValueError(f"{source}: {len(problems)} tensors do not fit the model:\n  {listed}")
  return traverse_util.unflatten_dict(filled)
