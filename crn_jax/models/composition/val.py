"""VAL: composite transformers at three depths (Chen, Gong, Bazzani, CVPR 2020, "Image Search with
Text Feedback by Visiolinguistic Attention Learning").

The text vector is t = BN(P drop(m)) with m the maximum over the words of the LSTM's outputs and P
from their width to half of it. At each of the backbone's last three depths, with F the reference's
map of c channels on h x w positions, [F; t] the map with t at every position, and f(x) =
relu(BN(W x)), a W of its own (1 x 1, no bias) for every letter f, g, o, and c channels of result:

  X = f([F; t])
  J = sigmoid(g(mean of X over positions)) * sigmoid(relu(BN(K * mean of X over channels)))
  A = o([H_1; H_2]),  H_k = drop(softmax(Q X_k (R X_k)^T / sqrt(c / 2))) V X_k
  composed = w_J J F + w_A A,  query = its mean over positions;  w_J starts at 1, w_A at 0

J preserves, A transforms. X_k is the k-th half of X's channels; Q, R, V keep its width, without
bias, and are each head's own; K is one kernel of h x w on one channel (zero padding), so that the
parameters belong to one size of images. Both dropouts drop 0.1. A target's vectors are the means
of its maps. Depths are compared by cosine, and summed (`losses.triplet`).

These are the formulas of the authors' code (Apache-2.0, github.com/yanbeic/VAL), whose convolutions
have BatchNorm and ReLU without exception, so that J lies between 1/4 and 1; of the paper only the
abstract was at hand. Widths of the text (1024 -> 512) and its dropout are those of the code's run
scripts. Different here: padding has no part in the maximum over the words (in the code a zero
stands for it), initial values are PyTorch's, and the backbone is a ResNet whose stages halve the
map at their beginning, or a Swin.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear
from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.composition.base import Composition
from crn_jax.models.layers import BatchNorm, ConvUnit, dropout
from crn_jax.models.text.lstm import max_over_words

DEPTHS = 3
_HEADS = 2
_DROPOUT = 0.1


class VAL(Composition):
  """Queries of composite transformers at the last `DEPTHS` depths, or at all if there are fewer.

  A reference is kept as its maps, a tuple of [batch, h_k, w_k, dim_k]; the vectors of a depth have
  the width of its map.
  """

  def setup(self):
    text_dim = self.config.feature_dim // 2
    self.text_fc = linear.torch_dense(self.config.feature_dim, text_dim, self.dtype, use_bias=False)
    self.text_bn = BatchNorm(self.axis_name, self.dtype)
    self.transformers = [CompositeTransformer(self.axis_name, self.dtype) for _ in range(DEPTHS)]

  def image(self, features: FeatureMaps, *, train: bool):
    """See `Composition.image`."""
    del train
    maps = (*features.stages[:-1], features.map)[-DEPTHS:]
    return maps, tuple(x.mean((1, 2)) for x in maps)

  def compose(self, reference, words: jax.Array, mask: jax.Array, *, train: bool):
    """See `Composition.compose`."""
    text = max_over_words(words, mask)
    text = self.text_fc(dropout(self, text, _DROPOUT) if train else text)
    text = self.text_bn(text, None, train=train, update_stats=train)
    # By their distance from the last depth, which every backbone has.
    transformers = self.transformers[DEPTHS - len(reference) :]
    return tuple(
      transformer(image_map, text, train=train).mean((1, 2))
      for transformer, image_map in zip(transformers, reference, strict=True)
    )


class CompositeTransformer(nn.Module):
  """One depth: a map and a text vector -> the composed map."""

  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image_map: jax.Array, text: jax.Array, *, train: bool) -> jax.Array:
    """[batch, h, w, channels], [batch, text_dim] -> [batch, h, w, channels]."""
    batch, h, w, channels = image_map.shape

    def unit(x, name):
      module = ConvUnit(channels, 1, self.axis_name, self.dtype, name=name)
      return module(x, None, train=train, update_stats=train)

    everywhere = jnp.broadcast_to(text[:, None, None], (batch, h, w, text.shape[-1]))
    both = unit(jnp.concatenate([image_map, everywhere], -1), "fusion")

    channel_gate = nn.sigmoid(unit(both.mean((1, 2)), "channel_gate"))[:, None, None]
    spatial_gate = nn.sigmoid(self._spatial(both.mean(-1, keepdims=True), train))

    heads = [
      SelfAttention(self.axis_name, self.dtype, name=f"head{k}")(half, train=train)
      for k, half in enumerate(jnp.split(both.reshape(batch, h * w, channels), _HEADS, axis=-1))
    ]
    attended = unit(jnp.concatenate(heads, -1).reshape(image_map.shape), "attended")

    def weight(name, start):
      return self.param(name, nn.initializers.constant(start), ()).astype(self.dtype)

    preserved = weight("joint_weight", 1.0) * channel_gate * spatial_gate * image_map
    return preserved + weight("self_weight", 0.0) * attended

  def _spatial(self, x, train):
    """[batch, h, w, 1] -> the same shape; a convolution as large as the map, BatchNorm, ReLU."""
    size = x.shape[1:3]
    x = nn.Conv(
      1, size, padding="SAME", use_bias=False, dtype=self.dtype, name="spatial_gate",
      kernel_init=linear.torch_uniform(math.prod(size)),
    )(x)  # fmt: skip
    bn = BatchNorm(self.axis_name, self.dtype, name="spatial_gate_bn")
    return nn.relu(bn(x, None, train=train, update_stats=train))


class SelfAttention(nn.Module):
  """One head, over the positions."""

  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """[batch, positions, width] -> the same shape."""
    width = x.shape[-1]

    def project(name):
      return linear.torch_dense(width, width, self.dtype, use_bias=False, name=name)(x)

    logits = jnp.einsum("bpd,bqd->bpq", project("query"), project("key"))
    attention = jax.nn.softmax(logits / math.sqrt(width))
    if train:
      attention = dropout(self, attention, _DROPOUT)
    return attention @ project("value")
