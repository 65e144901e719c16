"""Layers that composition is made of: generalised-mean pooling, BatchNorm, Inception units.

All take an optional mask over positions. Masked positions (text padding) are zeros to
convolutions, absent from averages and from BatchNorm statistics.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from crn_jax.errors import UserError
from crn_jax.models import linear
from crn_jax.models.remat import KEPT


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

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None,
    *,
    train: bool,
    update_stats: bool,
    others: Sequence[tuple["BatchNorm", int]] = (),
  ) -> jax.Array:
    """[batch, *positions, channels] -> the same shape.

    Args:
      x: input.
      mask: [batch, *positions] bool or None.
      train: whether to normalise by the batch rather than by the running statistics.
      update_stats: whether a training pass moves the running statistics (momentum 0.1).
      others: norms that the last channels of x belong to, with the number of channels of each. As
        channels do not mix, this is every norm by itself, in one operation.
    """
    widths = [width for _, width in others]
    widths = [x.shape[-1] - sum(widths), *widths]
    norms = [self, *(norm for norm, _ in others)]
    arrays = [norm.arrays(width) for norm, width in zip(norms, widths, strict=True)]
    scale, bias, mean_ra, var_ra = (jnp.concatenate(parts) for parts in zip(*arrays, strict=True))
    x = x.astype(jnp.promote_types(x.dtype, scale.dtype))
    if train:
      mean, var, n = self._batch_statistics(x, mask)
      if update_stats and not self.is_initializing():
        mean_ra = 0.9 * mean_ra + 0.1 * mean
        var_ra = 0.9 * var_ra + 0.1 * var * (n / jnp.maximum(n - 1.0, 1.0))
        means, variances = split(mean_ra, widths), split(var_ra, widths)
        for norm, new_mean, new_var in zip(norms, means, variances, strict=True):
          norm.put_variable("batch_stats", "mean", new_mean)
          norm.put_variable("batch_stats", "var", new_var)
    else:
      mean, var = mean_ra, var_ra
    y = (x - mean) * (scale / jnp.sqrt(var + 1e-5)) + bias
    return y.astype(self.dtype)

  @nn.compact
  def arrays(self, channels: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Scale, bias, running mean and running variance, [channels] each."""
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    return scale, bias, mean.value, var.value

  def _batch_statistics(self, x, mask):
    """Mean, biased variance (two passes, as PyTorch) and count over batch, positions, devices."""
    axes = tuple(range(x.ndim - 1))
    weight = None if mask is None else mask[..., None].astype(x.dtype)

    def over_devices(value):
      return jax.lax.psum(value, self.axis_name) if self.axis_name else value

    def total(value):
      return over_devices(jnp.sum(value if weight is None else value * weight, axes))

    n = over_devices(math.prod(x.shape[:-1]) if weight is None else jnp.sum(weight, axes))
    mean = checkpoint_name(total(x) / n, KEPT)
    # The variance has no gradient by way of the mean; without the stop, its rounding noise is large
    # where a small batch has little variance.
    deviation = x - jax.lax.stop_gradient(mean)
    return mean, checkpoint_name(total(jnp.square(deviation)) / n, KEPT), n


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

  def setup(self):
    self.conv = _Kernel(self.dtype)
    self.bn = BatchNorm(self.axis_name, self.dtype)

  def __call__(self, x, mask, *, train: bool, update_stats: bool):
    """[batch, *positions, channels] -> [batch, *positions, features]."""
    x = pointwise([self], x) if self.width == 1 else convolve(self, masked(x, mask))
    return normalised_relu([self], x, mask, train=train, update_stats=update_stats)

  def kernel(self, x: jax.Array) -> jax.Array:
    """For inputs like x: [*sides, channels, features], without sides if the width is 1."""
    sides = () if self.width == 1 else (self.width,) * (x.ndim - 2)
    return self.conv((*sides, x.shape[-1], self.features))


class _Kernel(nn.Module):
  """A convolution's kernel in the dtype of the computation."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, shape: tuple[int, ...]) -> jax.Array:
    uniform = linear.torch_uniform(math.prod(shape[:-1]))
    return self.param("kernel", uniform, shape).astype(self.dtype)


def pointwise(units: Sequence[ConvUnit], x: jax.Array) -> jax.Array:
  """1 x 1 convolutions of one input as one product: [batch, *positions, sum of their features]."""
  kernel = jnp.concatenate([unit.kernel(x) for unit in units], axis=-1)
  return linear.matmul(x.astype(kernel.dtype), kernel)


def convolve(unit: ConvUnit, x: jax.Array) -> jax.Array:
  """A wide unit's convolution alone: [batch, *positions, features]."""
  kernel = unit.kernel(x)
  positions = "HW"[: x.ndim - 2]
  layouts = (f"N{positions}C", f"{positions}IO", f"N{positions}C")
  return jax.lax.conv_general_dilated(
    x.astype(kernel.dtype), kernel, (1,) * len(positions), "SAME", dimension_numbers=layouts
  )


def normalised_relu(units: Sequence[ConvUnit], x: jax.Array, mask, **mode) -> jax.Array:
  """BatchNorm (`mode`: its `train`, `update_stats`) and ReLU of units whose channels follow each
  other in x."""
  first, *others = units
  return nn.relu(first.bn(x, mask, others=[(unit.bn, unit.features) for unit in others], **mode))


def split(x: jax.Array, widths: Sequence[int]) -> list[jax.Array]:
  """Parts of the last axis, of the widths given."""
  if len(widths) == 1:  # An operation less, for all norms of a ResNet.
    return [x]
  return jnp.split(x, np.cumsum(widths)[:-1].tolist(), axis=-1)


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
  input width (512 and 224 of 2048). It holds the convolutions; `inception` computes.

  Attributes:
    features: output channels, a multiple of 16; the input width must be a multiple of 64.
  """

  features: int
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def conv_units(self, channels: int, axes: int) -> dict[str, ConvUnit]:
    """Convolutions by name, for inputs with so many channels and axes of positions."""
    if channels % 64 or self.features % 16:
      raise UserError(
        f"an Inception unit needs an input width that is a multiple of 64 and an output width that "
        f"is a multiple of 16, not {channels} and {self.features}: change model.feature_dim "
        f"(input: twice it) or model.map_dim"
      )
    out = [self.features * share // 16 for share in BRANCH_WIDTHS[axes]]
    hidden, narrow = channels // 4, channels * 7 // 64
    sizes = {
      "branch0": (out[0], 1),
      "branch1_0": (hidden, 1),
      "branch1_1": (out[1], 3),
      "branch2_0": (hidden, 1),
      "branch2_1": (narrow, 3),
      "branch2_2": (out[2], 3),
      "branch3": (out[3], 1),
    }
    return {
      name: ConvUnit(*size, self.axis_name, self.dtype, name=name) for name, size in sizes.items()
    }


def inception(
  modules: Sequence[InceptionUnit], x: jax.Array, mask: jax.Array | None, **mode
) -> list[jax.Array]:
  """What Inception units of one size make of one input, all of them together.

  Their 1 x 1 convolutions are one product, those of the averages too: the average of a product is
  the product of the average, and has fewer channels. Three norms do the work of all, one at each
  distance from the input and one at the end.

  Args:
    modules: the units.
    x: [batch, *positions, channels].
    mask: [batch, *positions] bool or None.
    mode: `train` and `update_stats`, see `BatchNorm`.

  Returns:
    A unit's [batch, *positions, features], not negative.
  """
  units = [module.conv_units(x.shape[-1], x.ndim - 2) for module in modules]

  def of(*names):
    return [unit[name] for name in names for unit in units]

  def each(value):
    return jnp.split(value, len(modules), axis=-1)

  def wide(name, value):
    return [convolve(unit, part) for unit, part in zip(of(name), each(value), strict=True)]

  def activated(group, *parts):
    return normalised_relu(group, jnp.concatenate(parts, axis=-1), mask, **mode)

  hidden, direct, averaged = of("branch1_0", "branch2_0"), of("branch0"), of("branch3")
  products = pointwise([*hidden, *direct, *averaged], x)
  widths = [sum(unit.features for unit in group) for group in (hidden, direct, averaged)]
  hidden_products, branch_0, branch_3 = split(products, widths)
  x_1, x_2 = jnp.split(masked(activated(hidden, hidden_products), mask), 2, axis=-1)
  x_2 = masked(activated(of("branch2_1"), *wide("branch2_1", x_2)), mask)
  branches = {
    "branch0": each(branch_0),
    "branch1_1": wide("branch1_1", x_1),
    "branch2_2": wide("branch2_2", x_2),
    "branch3": each(average_3(branch_3, mask)),
  }
  last = [unit[name] for unit in units for name in branches]
  parts = [branch[i] for i in range(len(modules)) for branch in branches.values()]
  return each(activated(last, *parts))
