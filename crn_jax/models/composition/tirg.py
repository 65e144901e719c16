"""TIRG: text image residual gating (Vo et al., CVPR 2019, arXiv 1812.07119, section 3.2).

A query is the reference image, gated, plus a residual: eq. (1)
  f = a_1 f_gate(i, t) + a_2 f_res(i, t),  a learned, starting at (1, 10).
"""

import abc

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear
from crn_jax.models.composition.base import Composition, ImageVector, TextVector
from crn_jax.models.layers import BatchNorm
from crn_jax.models.linear import torch_dense


class _Weights(Composition):
  """What the two variants share."""

  def setup(self):
    d = self.config.feature_dim
    self.image_vector = ImageVector(d, self.dtype)
    self.text_vector = TextVector(d, self.axis_name, self.dtype)
    self.gate = self.branch(gate=True)
    self.residual = self.branch(gate=False)
    self.weights = self.param("weights", lambda key: jnp.array([1.0, 10.0]))

  @abc.abstractmethod
  def branch(self, gate: bool) -> nn.Module:
    """Part of `setup`: one of the two functions of [image; text]."""

  def gated(self, image: jax.Array, both: jax.Array, *, train: bool) -> jax.Array:
    """Eq. (1) of the image side [batch, ..., c] and both sides [batch, ..., c + d]."""
    gate = nn.sigmoid(self.gate(both, train=train))
    a = self.weights.astype(image.dtype)
    return a[0] * gate * image + a[1] * self.residual(both, train=train)


class _Linear(nn.Module):
  """FC(relu(BN(c))), 2d -> d (gate); FC(relu(FC(relu(BN(c))))), 2d -> 2d -> d (residual)."""

  features: int
  deep: bool
  axis_name: str | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    width, bn = x.shape[-1], BatchNorm(self.axis_name, self.dtype, name="bn")
    x = nn.relu(bn(x, None, train=train, update_stats=train))
    if self.deep:
      x = nn.relu(torch_dense(width, width, self.dtype, name="hidden")(x))
    return torch_dense(width, self.features, self.dtype, name="out")(x)


class _Convolutions(nn.Module):
  """conv(relu(conv(BN(c)))), both 3 x 3, (c + d) -> (c + d) -> c."""

  features: int
  axis_name: str | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    width, bn = x.shape[-1], BatchNorm(self.axis_name, self.dtype, name="bn")

    def conv(features, name):
      uniform = linear.torch_uniform(9 * width)
      return nn.Conv(
        features, (3, 3), dtype=self.dtype, kernel_init=uniform, bias_init=uniform, name=name
      )

    x = bn(x, None, train=train, update_stats=train)
    return conv(self.features, "out")(nn.relu(conv(width, "hidden")(x)))


class TIRG(_Weights):
  """On vectors (the paper's choice for attributes of the whole image)."""

  def branch(self, gate):
    return _Linear(self.config.feature_dim, not gate, self.axis_name, self.dtype)

  def image(self, features, *, train):
    vector = self.image_vector(features.map)
    return vector, (vector,)

  def compose(self, reference, words, mask, *, train):
    text = self.text_vector(words, mask, train=train)
    both = jnp.concatenate([reference, text], axis=-1)
    return (self.gated(reference, both, train=train),)


class TIRGMap(_Weights):
  """On the last map, before pooling: the text's vector stands at every position."""

  def branch(self, gate):
    return _Convolutions(self.backbone.map_dim, self.axis_name, self.dtype)

  def image(self, features, *, train):
    return features.map, (self.image_vector(features.map),)

  def compose(self, reference, words, mask, *, train):
    text = self.text_vector(words, mask, train=train)[:, None, None]
    tiled = jnp.broadcast_to(text, (*reference.shape[:-1], text.shape[-1]))
    both = jnp.concatenate([reference, tiled.astype(reference.dtype)], axis=-1)
    return (self.image_vector(self.gated(reference, both, train=train)),)
