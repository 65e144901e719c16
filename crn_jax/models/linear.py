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
  """`Dense` with PyTorch's initial values; a 1 x 1 convolution is the same on channels-last."""
  uniform = torch_uniform(in_features)
  return Dense(features, uniform, uniform, dtype, use_bias, name=name)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[..., k] and [k, n] -> [..., n], computed as one product of [rows, k]."""
  return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class Dense(nn.Module):
  """`flax.linen.Dense`, but for how two gradients are summed.

  That of the kernel is a plain matrix product of [rows, k], whatever axes there are: of several
  axes XLA copies a transposed gradient, which on a CPU costs five times the product. That of the
  bias is summed in the bias's precision; `flax.linen.Dense` adds up thousands of rows in `dtype`,
  where a sum in bfloat16 stands still as soon as it is 2^8 times what is added.

  Attributes:
    features: width of the result.
    kernel_init, bias_init: initial values; the latter may be None without a bias.
    dtype: of the computation and of the result; parameters are float32.
    use_bias: whether there is one.
  """

  features: int
  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer | None
  dtype: jnp.dtype
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., k] -> [..., features]."""
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
    out = matmul(x.astype(self.dtype), kernel.astype(self.dtype))
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
      # Broadcast first: the gradient of a broadcast is a sum, that of a conversion converts back.
      out = out + jnp.broadcast_to(bias, out.shape).astype(out.dtype)
    return out
