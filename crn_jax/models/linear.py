"""Linear layers: PyTorch's initial values, and a matrix product that XLA compiles well."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for weights and biases alike."""
  bound = 1.0 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def torch_dense(in_features: int, features: int, dtype, use_bias: bool = True, name=None):
  """`dense` with PyTorch's initial values; a 1 x 1 convolution is the same on channels-last."""
  uniform = torch_uniform(in_features)
  return dense(features, uniform, uniform, dtype, use_bias, name)


def dense(features: int, kernel_init, bias_init, dtype, use_bias: bool = True, name=None):
  """`nn.Dense` on the last axis of any array, computed as one plain matrix product."""
  return nn.Dense(
    features,
    use_bias=use_bias,
    kernel_init=kernel_init,
    bias_init=bias_init,
    dtype=dtype,
    dot_general=_flat_dot_general,
    name=name,
  )


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[..., k] and [k, n] -> [..., n], as `dense` computes it."""
  return _flat_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _flat_dot_general(lhs, rhs, dimension_numbers, **kwargs):
  """`lax.dot_general` of [..., k] and [k, n] on the flattened [rows, k].

  With more than one row axis, the gradient of the kernel contracts several axes at once, for which
  XLA copies a transposed gradient: on a CPU that copy costs five times the product.
  """
  if dimension_numbers != (((lhs.ndim - 1,), (0,)), ((), ())):
    raise ValueError(f"expected a product over the last axis, got {dimension_numbers}")
  flat = lhs.reshape(-1, lhs.shape[-1])
  out = jax.lax.dot_general(flat, rhs, (((1,), (0,)), ((), ())), **kwargs)
  return out.reshape(*lhs.shape[:-1], rhs.shape[-1])
