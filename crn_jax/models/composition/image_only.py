"""The reference image alone: what a method must beat to have read the text."""

from crn_jax.models.composition.base import Composition, ImageVector


class ImageOnly(Composition):
  """f = i."""

  uses_text = False

  def setup(self):
    self.image_vector = ImageVector(self.config.feature_dim, self.dtype)

  def image(self, features, *, train):
    vector = self.image_vector(features.map)
    return vector, (vector,)

  def compose(self, reference, words, mask, *, train):
    return (reference,)
