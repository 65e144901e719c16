"""A branch of CRN whose images and words come from a pair of pretrained towers."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.crn import Branch
from crn_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from crn_jax.models.linear import torch_dense
from crn_jax.models.precision import at_least_float32


class TowerBranch(Branch):
  """As `Branch`: the map is the image tower's patches, the words are the text tower's tokens.

  HAT, which takes the maps of two stages before the last, gets those of the patches after a third
  and two thirds of the blocks.

  Attributes:
    towers: their description, for pictures of the configuration's size.
  """

  towers: DualEncoderConfig | None = None
  uses_batch_statistics: ClassVar[bool] = False

  def set_encoders(self) -> int:
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    self.encoder = DualEncoder(self.towers, c.remat, dtype)
    self.word_fc = torch_dense(self.towers.text.width, c.feature_dim, at_least_float32(dtype))
    return self.towers.image.width

  def image_maps(self, images: jax.Array, *, train: bool, undropped: int = 0) -> FeatureMaps:
    """See `Branch`; towers have no stochastic depth."""
    del train, undropped
    if self.is_initializing():  # So that all of the towers is there, as in their folder.
      self.encoder.encode_images(images)
    tower = self.towers.image
    out = self.encoder.image(images, each=True)
    patches = out.layers[:, :, tower.class_tokens :].reshape(tower.depth, *out.map.shape)
    ends = (-(-tower.depth // 3), -(-2 * tower.depth // 3))
    return FeatureMaps(out.map, (*(patches[end - 1] for end in ends), out.map))

  def word_features(self, tokens: jax.Array) -> jax.Array:
    if self.is_initializing():
      self.encoder.encode_texts(tokens)
    return self.word_fc(self.encoder.text(tokens).tokens)
