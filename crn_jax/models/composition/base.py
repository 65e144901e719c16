"""What every composition offers that `models/single.py` trains: image and text -> query vector."""

import abc
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from crn_jax.models import linear
from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.layers import dropout


class Composition(nn.Module, abc.ABC):
  """How a method makes vectors of images, and of a reference image and a text.

  Attributes:
    config: the `model` part of the configuration.
    backbone: of the images, shared. A composition that conditions it on the text calls it again;
      the others see its maps only.
    axis_name: mapped axis over which the batch is split, if any.
    dtype: of the computation; parameters are float32.
    normalised: whether queries are compared by their cosine; otherwise by the dot product of the
      query as it is with the target's unit vector.
    backbones: names of the backbones that it works with; empty: all.
    pair_losses: names of the losses, fields of `loss`, of scores that `compose_against` gives.
    pair_modules: names of the modules that no other loss reaches.
    uses_text: whether the text has a part in it.
  """

  config: ml_collections.FrozenConfigDict
  backbone: nn.Module
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32
  normalised: ClassVar[bool] = True
  backbones: ClassVar[tuple[str, ...]] = ()
  pair_losses: ClassVar[tuple[str, ...]] = ()
  pair_modules: ClassVar[tuple[str, ...]] = ()
  uses_text: ClassVar[bool] = True

  @abc.abstractmethod
  def image(self, features: FeatureMaps, *, train: bool) -> tuple[Any, tuple[jax.Array, ...]]:
    """Encodes images.

    Args:
      features: of the backbone.
      train: batch statistics, dropout.

    Returns:
      What `compose` needs of a reference image, a tree of arrays [batch, ...]; the vectors by which
      it is found, one a level: [batch, d_k], not normalised.
    """

  @abc.abstractmethod
  def compose(
    self, reference: Any, words: jax.Array, mask: jax.Array, *, train: bool
  ) -> tuple[jax.Array, ...]:
    """Composes queries.

    Args:
      reference: as from `image`, a row a query.
      words: [batch, words, feature_dim] of the text encoder.
      mask: [batch, words] bool, False at padding.
      train: batch statistics (which then move the running ones), dropout.

    Returns:
      Query vectors, one a level, as wide as the images' of that level.
    """

  def compose_against(
    self,
    reference: Any,
    words: jax.Array,
    mask: jax.Array,
    targets: tuple[jax.Array, ...],
    *,
    train: bool,
  ) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """Composes queries where their targets are known: in training, for losses that need both.

    Args:
      reference, words, mask, train: as for `compose`.
      targets: vectors of the targets, as from `image`, a row a query.

    Returns:
      As `compose`; for each of `pair_losses` the scores [batch, batch over all devices] of queries
      with targets, of which each query's own should be the largest.
    """
    del targets
    return self.compose(reference, words, mask, train=train), {}


class PairScoring(Composition):
  """A composition that ranks by more than a product of vectors, where a run is evaluated.

  Attributes:
    ranking_loss: the one of `pair_losses` that trains `pair_scores`; without it images are not
      ranked by them.
  """

  ranking_loss: ClassVar[str]

  @abc.abstractmethod
  def from_vectors(self, vectors: jax.Array) -> Any:
    """What `compose` needs of images, [n, ...], from their retrieval vectors.

    Args:
      vectors: [n, sum of d_k] float32: of all levels, of unit length.
    """

  @abc.abstractmethod
  def pair_query(self, reference: Any, words: jax.Array, mask: jax.Array) -> Any:
    """What `pair_scores` needs of queries, a tree of arrays [batch, ...].

    Args:
      reference: as from `image`, a row a query, or one row that is every query's.
      words, mask: as for `compose`.
    """

  @abc.abstractmethod
  def pair_scores(self, query: Any, images: Any) -> jax.Array:
    """What is added to the product of a query's and an image's retrieval vectors.

    Args:
      query: as from `pair_query`.
      images: as from `from_vectors`.

    Returns:
      [queries, images], in the units of a product of vectors of unit length.
    """


class ImageVector(nn.Module):
  """Mean over the positions [batch, h, w, c], then a linear layer: -> [batch, features]."""

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image_map: jax.Array) -> jax.Array:
    pooled = jnp.mean(image_map, (1, 2))
    return linear.torch_dense(pooled.shape[-1], self.features, self.dtype, name="fc")(pooled)


class TextVector(nn.Module):
  """The last word's feature, dropout 0.1, then a linear layer: -> [batch, features]."""

  features: int
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, words: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
    last = last_word(words, mask)
    if train:
      last = dropout(self, last, 0.1)
    return linear.torch_dense(last.shape[-1], self.features, self.dtype, name="fc")(last)


def last_word(words: jax.Array, mask: jax.Array) -> jax.Array:
  """Feature of each text's last word: [batch, words, d], mask [batch, words] -> [batch, d]."""
  last = jnp.maximum(jnp.sum(mask, axis=1) - 1, 0)
  return jnp.take_along_axis(words, last[:, None, None], axis=1)[:, 0]
