"""Initial values as PyTorch draws them, from which the published training starts."""

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
  """`nn.Dense` with PyTorch's initial values; a 1 x 1 convolution is the same on channels-last."""
  uniform = torch_uniform(in_features)
  return nn.Dense(
    features, use_bias=use_bias, kernel_init=uniform, bias_init=uniform, dtype=dtype, name=name
  )
