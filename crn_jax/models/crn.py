"""A branch of CRN, local or global, over the (reference, text, target) triplet.

Yang, Ye, Cai, Su, Du: "Composed Image Retrieval via Cross Relation Network with Hierarchical
Aggregation Transformer", IEEE TIP 32, 2023; grown from CLVC-Net (Wen et al., SIGIR 2021). The two
branches share nothing but their form; they differ in their composition module.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections

from crn_jax.models.aggregation import ImageHead, ImageOutput
from crn_jax.models.backbones import registry
from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.composition.crn import GlobalComposition, LocalComposition
from crn_jax.models.layers import GeM
from crn_jax.models.linear import torch_dense
from crn_jax.models.precision import at_least_float32, widened
from crn_jax.models.relation import Relation
from crn_jax.models.text.lstm import TextEncoder, max_over_words

BRANCHES = ("local", "global")


@flax.struct.dataclass
class QueryOutput:
  """A composed query.

  Attributes:
    vector: [batch, feature_dim] query vector, not normalised.
    composed: [batch, h, w, map_dim] (local) or [batch, words, feature_dim] (global).
    attention: [batch, words, h, w]; sums to 1 over the words (local) or the positions (global).
  """

  vector: jax.Array
  composed: jax.Array
  attention: jax.Array


@flax.struct.dataclass
class BranchOutput:
  """Everything that losses need of one branch. Vectors are [batch, feature_dim].

  Attributes:
    query_vector: composed query.
    target_vector: target image.
    logit_scale: [1] trained inverse temperature of the classification.
    composed_map: local branch: composed map [batch, h, w, map_dim]; global: None.
    target_map: local branch: map of the target; global: None.
    difference: relation of query and target, or None if not asked for.
    text_vector: maximum over the text's words, or None if not asked for.
    auxiliary_vector: composition of a zero image with the text, or None if not asked for.
  """

  query_vector: jax.Array
  target_vector: jax.Array
  logit_scale: jax.Array
  composed_map: jax.Array | None = None
  target_map: jax.Array | None = None
  difference: jax.Array | None = None
  text_vector: jax.Array | None = None
  auxiliary_vector: jax.Array | None = None


class Branch(nn.Module):
  """One branch: backbone, text encoder, image head, composition, relation.

  Attributes:
    kind: 'local' or 'global'.
    config: the `model` part of the configuration; see `configs/default.py`.
    vocab_size: number of word ids.
    axis_name: mapped axis over which the batch is split, if any.
  """

  kind: str
  config: ml_collections.FrozenConfigDict
  vocab_size: int
  axis_name: str | None = None

  def setup(self):
    c, dtype = self.config, at_least_float32(self.config.dtype)
    image_dim = self.set_encoders()
    self.head = ImageHead(c.map_dim, c.feature_dim, c.keep_map, c.aggregation, dtype)
    composition = {"local": LocalComposition, "global": GlobalComposition}[self.kind]
    self.composition = composition(
      c.feature_dim,
      c.attention_temperature[self.kind],
      self.axis_name,
      dtype,
    )
    self.query_pool = GeM()
    map_dim = c.map_dim if c.map_dim is not None else image_dim
    pooled = map_dim if self.kind == "local" else c.feature_dim
    self.query_fc = torch_dense(pooled, c.feature_dim, dtype)
    self.relation = Relation(dtype)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(10.0), (1,))

  def set_encoders(self) -> int:
    """Part of `setup`: what `image_maps` and `word_features` need; the width of the last map."""
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    # Rematerialised blocks would hide from `initial_values` how each parameter is drawn.
    remat = "none" if self.is_initializing() else c.remat
    self.backbone = registry.create(c.backbone, dtype, self.axis_name, remat)
    self.text = TextEncoder(self.vocab_size, c.word_dim, c.feature_dim, at_least_float32(dtype))
    return self.backbone.map_dim

  @property
  def uses_batch_statistics(self) -> bool:
    """Whether, in training, an image's features depend on the batch."""
    return self.backbone.uses_batch_statistics

  def image_maps(self, images: jax.Array, *, train: bool, **options) -> FeatureMaps:
    """Feature maps of normalised images [batch, height, width, 3]; see `backbones.registry`."""
    return widened(self.backbone(images, train=train, **options))

  def word_features(self, tokens: jax.Array) -> jax.Array:
    """[batch, words] int32 -> [batch, words, feature_dim]."""
    return self.text(tokens)

  def encode_image(self, images: jax.Array, *, train: bool) -> ImageOutput:
    """Encodes normalised images [batch, height, width, 3].

    Training moves the running statistics of a backbone that has some.
    """
    return self.head(self.image_maps(images, train=train))

  def encode_zero_image(self, height: int, width: int) -> ImageOutput:
    """The image that says nothing: zero after normalisation, i.e. the mean colour. Batch of 1.

    Without stochastic depth and batch statistics: it is a constant for given variables.
    """
    return self.encode_image(jnp.zeros((1, height, width, 3)), train=False)

  def _encode_with_zero_image(self, images: jax.Array, *, train: bool) -> tuple:
    """`encode_image(images)`, and the map of `encode_zero_image` [1, h, w, map_dim].

    One backbone pass for both, unless the zero image would be counted in batch statistics.
    """
    if self.uses_batch_statistics:
      # First: it takes the running statistics from before the pass that moves them.
      zero = self.encode_zero_image(*images.shape[1:3])
      return self.encode_image(images, train=train), zero.map
    # Twice: of an odd number of images XLA for GPUs copies what goes into every bfloat16 product,
    # to fill its rows up to a multiple of 8.
    images = jnp.concatenate([images, jnp.zeros_like(images[:2])])
    out = self.head(self.image_maps(images, train=train, undropped=2))
    return jax.tree.map(lambda x: x[:-2], out), out.map[-1:]

  def encode_text(self, tokens: jax.Array, token_mask: jax.Array):
    """Word features [batch, words, feature_dim] and the mask of the words that take part."""
    mask = token_mask if self.config.mask_padding else jnp.ones_like(token_mask)
    return self.word_features(tokens), mask

  def compose(
    self,
    image_map: jax.Array,
    words: jax.Array,
    word_mask: jax.Array,
    *,
    train: bool,
    update_stats: bool = False,
  ) -> QueryOutput:
    """Composes maps [batch, h, w, map_dim] with words; see `LocalComposition`."""
    composed, attention, mask = self.composition(
      image_map, words, word_mask, train=train, update_stats=update_stats
    )
    vector = self.query_fc(self.query_pool(composed, mask))
    return QueryOutput(vector, composed, attention)

  def compose_zero_image(self, zero_map, words, word_mask, *, train: bool) -> jax.Array:
    """Text-only query vector [batch, feature_dim]: the zero image's map [1, ...] with each text."""
    zero_map = jnp.broadcast_to(zero_map, (words.shape[0], *zero_map.shape[1:]))
    return self.compose(zero_map, words, word_mask, train=train).vector

  def __call__(
    self,
    reference: jax.Array,
    target: jax.Array,
    tokens: jax.Array,
    token_mask: jax.Array,
    *,
    train: bool,
    modification: bool,
    auxiliary: bool,
  ) -> BranchOutput:
    """One pass over a batch of triplets.

    Args:
      reference, target: [batch, height, width, 3] normalised images.
      tokens: [batch, words] int32.
      token_mask: [batch, words] bool.
      train: batch statistics (which then move the running ones) and stochastic depth.
      modification: whether to compute `difference` and `text_vector`.
      auxiliary: whether to compute `auxiliary_vector`.
    """
    batch = reference.shape[0]
    # One backbone pass for both; interleaved, so that a shard of triplets is a shard of images.
    images = jnp.stack([reference, target], axis=1).reshape(2 * batch, *reference.shape[1:])
    if auxiliary:
      encoded, zero_map = self._encode_with_zero_image(images, train=train)
    else:
      encoded = self.encode_image(images, train=train)
    words, mask = self.encode_text(tokens, token_mask)
    query = self.compose(encoded.map[0::2], words, mask, train=train, update_stats=train)
    out = BranchOutput(query.vector, encoded.vector[1::2], self.logit_scale)
    if self.kind == "local":
      out = out.replace(composed_map=query.composed, target_map=encoded.map[1::2])
    if modification:
      difference = self.relation(out.query_vector, out.target_vector)
      out = out.replace(difference=difference, text_vector=max_over_words(words, mask))
    if auxiliary:
      out = out.replace(
        auxiliary_vector=self.compose_zero_image(zero_map, words, mask, train=train)
      )
    return out
