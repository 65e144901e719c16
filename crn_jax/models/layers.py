"""Layers that composition is made of: generalised-mean pooling, BatchNorm, Inception units.

All take an optional mask over positions. Masked positions (text padding) are zeros to
convolutions, absent from averages and from BatchNorm statistics.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.errors import UserError
from crn_jax.models import linear


def gem_pool(x: jax.Array, p: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Generalised mean over positions: (mean(max(x, 1e-6)^p))^(1/p), per channel.

  Args:
    x: [batch, *positions, channels].
    p: exponent, above 0.
    mask: [batch, *positions] bool, False where a position does not count.

  Returns:
    [batch, channels].
  """
  axes = tuple(range(1, x.ndim - 1))
  where = None if mask is None else mask[..., None]
  x = jnp.maximum(x, 1e-6)
  # Where float32 has no such powers (1e-6^6.5 is zero, and its gradient NaN) they are taken in
  # units of the largest value. The result does not depend on the unit, nor does its gradient.
  largest = jnp.max(x, axes, where=where, initial=1e-6, keepdims=True)
  unit = jnp.where(jnp.abs(p * jnp.log2(largest)) < 60, 1.0, largest)
  unit = jax.lax.stop_gradient(unit)
  shares = x / unit if where is None else jnp.where(where, x / unit, 1.0)
  return unit.reshape(x.shape[0], -1) * jnp.mean(shares**p, axes, where=where) ** (1.0 / p)


class GeM(nn.Module):
  """`gem_pool` with a trained exponent that starts at 3; computed in float32 at least."""

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    p = self.param("p", nn.initializers.constant(3.0), (1,))
    return gem_pool(x.astype(jnp.promote_types(x.dtype, p.dtype)), p, mask).astype(x.dtype)


class BatchNorm(nn.Module):
  """BatchNorm over batch and positions, with a mask, PyTorch's statistics and a mapped axis.

  `flax.linen.BatchNorm` keeps the biased batch variance as running variance; PyTorch keeps the
  unbiased one, n / (n - 1) times larger, which matters for small batches.

  Attributes:
    axis_name: mapped axis over which statistics are taken too.
    dtype: of the result; statistics are float32 at least.
  """

  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array | None, *, train: bool, update_stats: bool
  ) -> jax.Array:
    """[batch, *positions, channels] -> the same shape.

    Args:
      x: input.
      mask: [batch, *positions] bool or None.
      train: whether to normalise by the batch rather than by the running statistics.
      update_stats: whether a training pass moves the running statistics (momentum 0.1).
    """
    channels = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, channels)
    bias = self.param("bias", nn.initializers.zeros, channels)
    mean_ra = self.variable("batch_stats", "mean", jnp.zeros, channels)
    var_ra = self.variable("batch_stats", "var", jnp.ones, channels)
    x = x.astype(jnp.promote_types(x.dtype, scale.dtype))
    if train:
      mean, var, n = self._batch_statistics(x, mask)
      if update_stats and not self.is_initializing():
        mean_ra.value = 0.9 * mean_ra.value + 0.1 * mean
        var_ra.value = 0.9 * var_ra.value + 0.1 * var * (n / jnp.maximum(n - 1.0, 1.0))
    else:
      mean, var = mean_ra.value, var_ra.value
    y = (x - mean) * (scale / jnp.sqrt(var + 1e-5)) + bias
    return y.astype(self.dtype)

  def _batch_statistics(self, x, mask):
    """Mean, biased variance (two passes, as PyTorch) and count over batch, positions, devices."""
    axes = tuple(range(x.ndim - 1))
    weight = None if mask is None else mask[..., None].astype(x.dtype)

    def over_devices(value):
      return jax.lax.psum(value, self.axis_name) if self.axis_name else value

    def total(value):
      return over_devices(jnp.sum(value if weight is None else value * weight, axes))

    n = over_devices(math.prod(x.shape[:-1]) if weight is None else jnp.sum(weight, axes))
    mean = total(x) / n
    # The variance has no gradient by way of the mean; without the stop, its rounding noise is large
    # where a small batch has little variance.
    deviation = x - jax.lax.stop_gradient(mean)
    return mean, total(jnp.square(deviation)) / n, n


def dropout(module: nn.Module, x: jax.Array, rate: float) -> jax.Array:
  """Drops values and scales up the others. What is dropped does not depend on how many devices the
  batch is spread over.

  Args:
    module: draws from its random numbers "dropout"; has the attribute `axis_name`.
    x: [batch, ...].
    rate: share of the values that are dropped, below 1.
  """
  shards = jax.lax.axis_size(module.axis_name) if module.axis_name else 1
  keep = 1.0 - rate
  kept = jax.random.bernoulli(module.make_rng("dropout"), keep, (shards * x.shape[0], *x.shape[1:]))
  if shards > 1:
    first = jax.lax.axis_index(module.axis_name) * x.shape[0]
    kept = jax.lax.dynamic_slice_in_dim(kept, first, x.shape[0])
  return jnp.where(kept, x / keep, 0.0)


class ConvUnit(nn.Module):
  """Convolution (no bias, stride 1, zero padding), BatchNorm, ReLU.

  Attributes:
    features: output channels.
    width: kernel side, 1 or 3.
  """

  features: int
  width: int
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, mask, *, train: bool, update_stats: bool):
    """[batch, *positions, channels] -> [batch, *positions, features]."""
    if self.width == 1:
      x = linear.torch_dense(x.shape[-1], self.features, self.dtype, use_bias=False, name="conv")(x)
    else:
      kernel = (self.width,) * (x.ndim - 2)
      fan_in = x.shape[-1] * math.prod(kernel)
      x = nn.Conv(
        self.features, kernel, padding="SAME", use_bias=False, dtype=self.dtype, name="conv",
        kernel_init=linear.torch_uniform(fan_in),
      )(masked(x, mask))  # fmt: skip
    bn = BatchNorm(self.axis_name, self.dtype, name="bn")
    x = bn(x, mask, train=train, update_stats=update_stats)
    return nn.relu(x)


def masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """x with zeros at masked positions: [batch, *positions, channels]."""
  return x if mask is None else x * mask[..., None].astype(x.dtype)


def average_3(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """3-wide average, stride 1, over the positions that exist: padding is not counted.

  Args:
    x: [batch, *positions, channels].
    mask: [batch, *positions] bool or None.
  """

  def window_sum(value):
    window = (3,) * (value.ndim - 2)
    return nn.pool(value, 0.0, jax.lax.add, window, (1,) * len(window), "SAME")

  weight = jnp.ones((1, *x.shape[1:-1], 1), x.dtype) if mask is None else mask[..., None]
  count = window_sum(weight.astype(x.dtype))
  return window_sum(masked(x, mask)) / jnp.maximum(count, 1.0)


# Output widths of the four branches in 16ths of the unit's output (local: 640, 512, 512, 384 of
# 2048; global: 384, 256, 256, 128 of 1024).
BRANCH_WIDTHS = {2: (5, 4, 4, 3), 1: (6, 4, 4, 2)}


class InceptionUnit(nn.Module):
  """Four parallel convolution branches, concatenated: 1 | 1-3 | 1-3-3 | average-1.

  One class serves maps (two position axes) and texts (one). Hidden widths are 1/4 and 7/64 of the
  input width (512 and 224 of 2048).

  Attributes:
    features: output channels, a multiple of 16; the input width must be a multiple of 64.
  """

  features: int
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, average, mask, *, train: bool, update_stats: bool):
    """[batch, *positions, channels] -> [batch, *positions, features], not negative.

    Args:
      x: input.
      average: `average_3(x, mask)`, which the units of one input share.
      mask: [batch, *positions] bool or None.
      train, update_stats: see `BatchNorm`.
    """
    channels = x.shape[-1]
    if channels % 64 or self.features % 16:
      raise UserError(
        f"an Inception unit needs an input width that is a multiple of 64 and an output width that "
        f"is a multiple of 16, not {channels} and {self.features}: change model.feature_dim "
        f"(input: twice it) or model.map_dim"
      )
    out = [self.features * share // 16 for share in BRANCH_WIDTHS[x.ndim - 2]]
    hidden, narrow = channels // 4, channels * 7 // 64

    def unit(name, features, width):
      module = ConvUnit(features, width, self.axis_name, self.dtype, name=name)
      return lambda value: module(value, mask, train=train, update_stats=update_stats)

    return jnp.concatenate(
      [
        unit("branch0", out[0], 1)(x),
        unit("branch1_1", out[1], 3)(unit("branch1_0", hidden, 1)(x)),
        unit("branch2_2", out[2], 3)(unit("branch2_1", narrow, 3)(unit("branch2_0", hidden, 1)(x))),
        unit("branch3", out[3], 1)(average),
      ],
      axis=-1,
    )
