"""ResNet (He et al., CVPR 2016) as torchvision computes it, NHWC.

Equal to torchvision's `resnet18` and `resnet50` without their classifiers: the stride of a
bottleneck is in its 3 x 3 convolution ("v1.5"), paddings are symmetric, BatchNorm is PyTorch's.
Sizes are free.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from crn_jax.models import linear
from crn_jax.models.backbones import stacking
from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.layers import BatchNorm
from crn_jax.models.remat import KEPT, rematerialised

# Output of a block in widths of its 3 x 3 convolutions, by which kinds of blocks are told apart.
BASIC, BOTTLENECK = 1, 4

# name -> arguments of `ResNet`, as in torchvision.
VARIANTS = {
  "resnet18": {"width": 64, "depths": (2, 2, 2, 2), "expansion": BASIC},
  "resnet50": {"width": 64, "depths": (3, 4, 6, 3), "expansion": BOTTLENECK},
}

# He's initial values: normal with variance 2 / (outputs * kernel size), as torchvision.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(features: int, side: int, stride: int, dtype, name: str):
  """A square convolution without bias, padded so that stride 1 keeps the grid."""
  if side == 1:

    def product(x):
      # A matrix product; where a stride skips positions, they are left out before it.
      dense = linear.Dense(features, _he_normal, None, dtype, use_bias=False, name=name)
      return dense(x[:, ::stride, ::stride])

    return product
  return nn.Conv(
    features, (side, side), stride, padding=side // 2, use_bias=False, dtype=dtype,
    kernel_init=_he_normal, name=name,
  )  # fmt: skip


class Block(nn.Module):
  """Residual block.

  Bottleneck: 1 x 1 to `width`, 3 x 3 with the stride, 1 x 1 to four times the width. Basic: 3 x 3
  with the stride, 3 x 3.

  Attributes:
    width: channels of the 3 x 3 convolutions.
    expansion: `BASIC` or `BOTTLENECK`.
    stride: of the first 3 x 3 convolution and of the shortcut.
    project: whether the shortcut is a 1 x 1 convolution rather than the identity.
  """

  width: int
  expansion: int
  stride: int
  project: bool
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[batch, h, w, channels] -> [batch, ceil(h / stride), ceil(w / stride), outputs]."""

    def unit(x, name, features, side, stride=1):
      x = checkpoint_name(conv(features, side, stride, self.dtype, f"conv{name}")(x), KEPT)
      bn = BatchNorm(self.axis_name, self.dtype, name=f"bn{name}")
      return bn(x, None, train=train, update_stats=train)

    outputs = self.expansion * self.width
    if self.expansion == BASIC:
      y = nn.relu(unit(x, "1", self.width, 3, self.stride))
      y = unit(y, "2", outputs, 3)
    else:
      y = nn.relu(unit(x, "1", self.width, 1))
      y = nn.relu(unit(y, "2", self.width, 3, self.stride))
      y = unit(y, "3", outputs, 1)
    if self.project:
      x = unit(x, "_shortcut", outputs, 1, self.stride)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """The backbone.

  Attributes:
    width: channels after the stem; a stage's blocks give `expansion` times 1, 2, 4, ... as many.
    depths: blocks a stage.
    expansion: `BASIC` or `BOTTLENECK`: the kind of the blocks.
    remat: what blocks keep for their gradient, see `remat`.
    dtype: of the computation; parameters and statistics are float32.
    axis_name: mapped axis over which the batch is split, if any; BatchNorm counts all of it.
    uses_batch_statistics: see `registry`.
  """

  width: int = 64
  depths: Sequence[int] = (3, 4, 6, 3)
  expansion: int = BOTTLENECK
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  uses_batch_statistics: ClassVar[bool] = True

  @property
  def map_dim(self) -> int:
    """Width of the last map."""
    return self.stage_dim(len(self.depths) - 1)

  def stage_dim(self, stage: int) -> int:
    """Width of what the blocks of a stage give."""
    return self.expansion * self.width * 2**stage

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    *,
    train: bool,
    first_stage: int = 0,
    modulate: Callable[[jax.Array], jax.Array] = lambda x: x,
  ) -> FeatureMaps:
    """Encodes images.

    Args:
      images: [batch, height, width, 3], normalised; any size. If `first_stage` is above 0: the map
        of the stage before it.
      train: normalise by the batch; this moves the running statistics (collection 'batch_stats',
        which must be mutable).
      first_stage: where to begin.
      modulate: what a block gives -> what the next one takes; called once a block, in order.

    Returns:
      `FeatureMaps`: entry k of `stages` is torchvision's `layer{k + 1}`, h / 4 at the first and
      half as much at each next; `map` is the last of them. The first is that of `first_stage`.
    """
    x = images.astype(self.dtype)
    if first_stage == 0:
      x = conv(self.width, 7, 2, self.dtype, "conv1")(x)
      bn = BatchNorm(self.axis_name, self.dtype, name="bn1")
      x = nn.relu(bn(x, None, train=train, update_stats=train))
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    block = rematerialised(Block, self.remat, static_argnums=(2,))
    stages = []
    for i, depth in list(enumerate(self.depths))[first_stage:]:
      for j in range(depth):
        x = block(
          self.width * 2**i, self.expansion, 2 if i > 0 and j == 0 else 1,
          # A basic block of the first stage changes neither grid nor width.
          j == 0 and (i > 0 or self.expansion != BASIC), self.dtype, self.axis_name,
          name=stacking.block_name(i, j),
        )(x, train)  # fmt: skip
        x = modulate(x)
      stages.append(x)
    return FeatureMaps(x, tuple(stages))
