"""One backbone, one text encoder and one composition: what most methods of the field are."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from crn_jax.models.backbones import registry as backbones
from crn_jax.models.composition.registry import COMPOSITIONS
from crn_jax.models.precision import at_least_float32, widened
from crn_jax.models.text.registry import TEXT_ENCODERS

Vectors = tuple[jax.Array, ...]


class Single(nn.Module):
  """The model of `methods/single.py`.

  Attributes:
    config: the `model` part of the configuration.
    vocab_size: number of word ids.
    axis_name: mapped axis over which the batch is split, if any.
  """

  config: ml_collections.FrozenConfigDict
  vocab_size: int
  axis_name: str | None = None

  def setup(self):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    # Rematerialised blocks would hide from `initial_values` how each parameter is drawn.
    remat = "none" if self.is_initializing() else c.remat
    self.backbone = backbones.create(c.backbone, dtype, self.axis_name, remat)
    dtype = at_least_float32(dtype)
    self.text = TEXT_ENCODERS[c.text_encoder](self.vocab_size, c.word_dim, c.feature_dim, dtype)
    self.composition = COMPOSITIONS[c.composition](c, self.backbone, self.axis_name, dtype)
    # The vectors' length, as in Vo et al. (CVPR 2019): logits are cosines times its square.
    self.vector_scale = self.param("vector_scale", nn.initializers.constant(4.0), (1,))

  def encode_images(self, images: jax.Array, *, train: bool) -> tuple[Any, Vectors]:
    """Of normalised images [batch, height, width, 3]: see `Composition.image`."""
    features = widened(self.backbone(images, train=train))
    return self.composition.image(features, train=train)

  def compose(self, reference: Any, tokens: jax.Array, mask: jax.Array, *, train: bool) -> Vectors:
    """Of references and texts [batch, words]: see `Composition.compose`."""
    words = self.text(tokens, mask)
    return self.composition.compose(reference, words, mask, train=train)

  def from_vectors(self, vectors: jax.Array) -> Any:
    """See `PairScoring.from_vectors`."""
    return self.composition.from_vectors(vectors)

  def pair_query(self, reference: Any, tokens: jax.Array, mask: jax.Array) -> Any:
    """Of references and texts [batch, words]: see `PairScoring.pair_query`."""
    return self.composition.pair_query(reference, self.text(tokens, mask), mask)

  def pair_scores(self, query: Any, vectors: jax.Array) -> jax.Array:
    """Of images by their retrieval vectors: see `PairScoring.pair_scores`."""
    return self.composition.pair_scores(query, self.composition.from_vectors(vectors))

  def __call__(
    self,
    reference: jax.Array,
    target: jax.Array,
    tokens: jax.Array,
    token_mask: jax.Array,
    *,
    train: bool,
  ) -> tuple[Vectors, Vectors, dict[str, jax.Array], jax.Array]:
    """One pass over a batch of triplets.

    Args:
      reference, target: [batch, height, width, 3] normalised images.
      tokens: [batch, words] int32.
      token_mask: [batch, words] bool.
      train: batch statistics (which then move the running ones), stochastic depth, dropout.

    Returns:
      Query and target vectors, one [batch, d_k] a level; scores of pairs, see
      `Composition.compose_against`; the vectors' length [1].
    """
    # One backbone pass for both; interleaved, so that a shard of triplets is a shard of images.
    images = jnp.stack([reference, target], axis=1).reshape(-1, *reference.shape[1:])
    encoded, vectors = self.encode_images(images, train=train)
    references, targets = jax.tree.map(lambda x: x[0::2], encoded), tuple(v[1::2] for v in vectors)
    queries, pairs = self.composition.compose_against(
      references, self.text(tokens, token_mask), token_mask, targets, train=train
    )
    return queries, targets, pairs, self.vector_scale
