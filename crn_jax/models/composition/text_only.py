"""The text alone: what a method must beat to have seen the reference image."""

from crn_jax.models.composition.base import Composition, ImageVector, TextVector


class TextOnly(Composition):
  """f = t."""

  def setup(self):
    self.image_vector = ImageVector(self.config.feature_dim, self.dtype)
    self.text_vector = TextVector(self.config.feature_dim, self.axis_name, self.dtype)

  def image(self, features, *, train):
    vector = self.image_vector(features.map)
    return vector, (vector,)

  def compose(self, reference, words, mask, *, train):
    return (self.text_vector(words, mask, train=train),)
