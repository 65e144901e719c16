"""FiLM: feature-wise linear modulation (Perez et al., AAAI 2018, arXiv 1709.07871), on images.

The text scales and shifts every channel of what the backbone's last blocks give, eq. (1-2):
  FiLM(x) = gamma(t) * x + beta(t),  gamma = 1 + W_gamma t + b_gamma,  beta = W_beta t + b_beta.
The target passes the backbone without it, as where Vo et al. (CVPR 2019) compare with FiLM.
"""

import jax
import jax.numpy as jnp

from crn_jax.models.backbones.resnet import VARIANTS
from crn_jax.models.composition.base import Composition, ImageVector, TextVector
from crn_jax.models.linear import torch_dense

# Modulated stages, counted from the end; at least the first is not.
STAGES = 2


class FiLM(Composition):
  """The reference passes the last stages once more, modulated after each block."""

  backbones = tuple(VARIANTS)

  def setup(self):
    d, depths = self.config.feature_dim, self.backbone.depths
    self.image_vector = ImageVector(d, self.dtype)
    self.text_vector = TextVector(d, self.axis_name, self.dtype)
    self.first = max(1, len(depths) - STAGES)
    self.widths = [
      self.backbone.stage_dim(i) for i in range(self.first, len(depths)) for _ in range(depths[i])
    ]
    # Of all blocks in one product: gammas, then betas.
    self.modulation = torch_dense(d, 2 * sum(self.widths), self.dtype)

  def image(self, features, *, train):
    return features.stages[self.first - 1], (self.image_vector(features.map),)

  def compose(self, reference, words, mask, *, train):
    text = self.text_vector(words, mask, train=train)
    gamma, beta = jnp.split(self.modulation(text)[:, None, None], 2, axis=-1)
    ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)]
    blocks = iter(zip(jnp.split(gamma, ends, -1), jnp.split(beta, ends, -1), strict=True))

    def modulate(x: jax.Array) -> jax.Array:
      gamma, beta = next(blocks)
      return ((1.0 + gamma) * x + beta).astype(x.dtype)

    features = self.backbone(reference, train=train, first_stage=self.first, modulate=modulate)
    return (self.image_vector(features.map),)
