"""Concatenation: two linear layers on [image; text], a baseline of Vo et al. (CVPR 2019)."""

import flax.linen as nn
import jax.numpy as jnp

from crn_jax.models.composition.base import Composition, ImageVector, TextVector
from crn_jax.models.layers import BatchNorm, dropout
from crn_jax.models.linear import torch_dense


class Concat(Composition):
  """f = FC_d(drop(relu(BN(FC_2d(relu(BN([i; t])))))), dropout 0.1."""

  def setup(self):
    d, dtype = self.config.feature_dim, self.dtype
    self.image_vector = ImageVector(d, dtype)
    self.text_vector = TextVector(d, self.axis_name, dtype)
    self.bn_in = BatchNorm(self.axis_name, dtype)
    self.hidden = torch_dense(2 * d, 2 * d, dtype)
    self.bn_hidden = BatchNorm(self.axis_name, dtype)
    self.out = torch_dense(2 * d, d, dtype)

  def image(self, features, *, train):
    vector = self.image_vector(features.map)
    return vector, (vector,)

  def compose(self, reference, words, mask, *, train):
    mode = {"train": train, "update_stats": train}
    x = jnp.concatenate([reference, self.text_vector(words, mask, train=train)], axis=-1)
    x = self.hidden(nn.relu(self.bn_in(x, None, **mode)))
    x = nn.relu(self.bn_hidden(x, None, **mode))
    return (self.out(dropout(self, x, 0.1) if train else x),)
