"""Array layouts of PyTorch and of this project.

PyTorch keeps (out, in, *window), Flax (*window, in, out); patch embedding and 1 x 1 convolutions
are plain matrices here. Everything that is not a kernel is the same in both.
"""

import numpy as np

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
  if leaf in KERNELS:
    tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    fits = tensor.shape[-1] == shape[-1] and tensor.size == np.prod(shape)
  else:
    fits = tensor.shape == shape or tensor.size == np.prod(shape) == 1
  if not fits:
    raise ValueError(f"has shape {tensor.shape} where {shape} is expected")
  return tensor.reshape(shape)


def to_torch(array: np.ndarray, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
  """Inverse of `to_flax`: Flax array -> PyTorch tensor of the given shape."""
  if leaf not in KERNELS:
    return array.reshape(shape)
  array = array.reshape(*shape[2:], shape[1], shape[0])
  return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
