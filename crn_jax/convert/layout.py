"""Array layouts of PyTorch and of this project.

PyTorch keeps (out, in, *window), Flax (*window, in, out); patch embedding and 1 x 1 convolutions
are plain matrices here. Everything that is not a kernel is the same in both.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from crn_jax.errors import UserError

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
    raise ValueError(f"has shape {given} where {shape} is expected")
  return tensor.reshape(shape)


def to_torch(array: np.ndarray, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
  """Inverse of `to_flax`: Flax array -> PyTorch tensor of the given shape."""
  if leaf not in KERNELS:
    return array.reshape(shape)
  array = array.reshape(*shape[2:], shape[1], shape[0])
  return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))


def fill(
  flat: Mapping[tuple, np.ndarray],
  names: Mapping[tuple, str],
  state_dict: Mapping[str, np.ndarray],
  source: str,
  model: str,
) -> dict[tuple, np.ndarray]:
  """Flat variables with the values of a state dict.

  Args:
    flat: path -> variable (or its shape), what is to be filled.
    names: path -> name in the state dict.
    state_dict: name -> tensor; must hold these names and no others.
    source: file that the weights come from, for messages.
    model: what the variables belong to, for messages.

  Returns:
    path -> float32 array.

  Raises:
    UserError: if weights are missing, left over, of another shape, not finite or no floating point
      numbers, or a running variance is negative; names them.
  """
  known = set(names.values())
  problems = [f"missing {name}" for name in names.values() if name not in state_dict]
  problems += [
    f"unexpected {name} {np.shape(state_dict[name])}" for name in state_dict if name not in known
  ]
  filled = {}
  for path, name in names.items():
    if name in state_dict:
      try:
        tensor = _float32(state_dict[name], path[-1])
        filled[path] = to_flax(tensor, path[-1], flat[path].shape)
      except ValueError as error:
        problems.append(f"{name} {error}")
  if problems:
    shown = "\n  ".join(problems)
    raise UserError(
      f"{source}: not the weights of this {model} ({len(problems)} differences):\n  {shown}"
    )
  return filled


def _float32(tensor: np.ndarray, leaf: str) -> np.ndarray:
  """The values as float32; raises ValueError if a model cannot have them."""
  if not jnp.issubdtype(tensor.dtype, jnp.floating):
    raise ValueError(f"has numbers of type {tensor.dtype}, not floating point numbers")
  with np.errstate(over="ignore"):
    tensor = np.asarray(tensor, np.float32)
  if bad := tensor.size - np.count_nonzero(np.isfinite(tensor)):
    raise ValueError(f"holds {bad} of {tensor.size} values that are not finite in float32")
  if leaf == "var" and np.any(tensor < 0):
    raise ValueError(f"is a variance, and is negative in {np.sum(tensor < 0)} places")
  return tensor
