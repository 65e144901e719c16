"""LayerNorm as in PyTorch, with a gradient of its own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, with scale and bias, as `torch.nn.LayerNorm` computes it.

  Its variance takes two passes, which loses no digits. `flax.linen.LayerNorm` gives the same
  values; its gradient, found by differentiating the statistics, takes more passes over memory and
  more operations to compile.

  Attributes:
    epsilon: added to the variance.
    dtype: of the result; statistics are float32 at least.
  """

  epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., channels] -> the same shape."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    return normalized(x, scale, bias, self.epsilon, jnp.dtype(self.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalized(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype) -> jax.Array:
  """(x - mean) / sqrt(var + epsilon) * scale + bias over the last axis, in `dtype`."""
  return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(x, scale, bias, epsilon, dtype):
  wide = x.astype(jnp.promote_types(x.dtype, scale.dtype))
  mean = jnp.mean(wide, -1, keepdims=True)
  deviation = wide - mean
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(deviation), -1, keepdims=True) + epsilon)
  out = deviation * (inverse * scale) + bias
  return out.astype(dtype), (x, scale, bias, mean, inverse)


def _backward(epsilon, dtype, saved, of_out):
  del epsilon, dtype
  x, scale, bias, mean, inverse = saved
  # Without it XLA for GPUs computes the statistics again inside their products with the gradient,
  # and writes these down in float32 before it sums them.
  mean, inverse = jax.lax.optimization_barrier((mean, inverse))
  of_out = of_out.astype(mean.dtype)
  unit = (x.astype(mean.dtype) - mean) * inverse
  of_unit = of_out * scale
  # A shift of x and a scaling change nothing: what lies along these directions is taken out.
  shift = jnp.mean(of_unit, -1, keepdims=True)
  stretch = jnp.mean(of_unit * unit, -1, keepdims=True)
  of_x = inverse * (of_unit - shift - unit * stretch)
  rows = tuple(range(x.ndim - 1))
  of_scale, of_bias = jnp.sum(of_out * unit, rows), jnp.sum(of_out, rows)
  return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


normalized.defvjp(_forward, _backward)
