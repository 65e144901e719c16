"""Composition of a reference image and a modification text (CLVC-Net's two fusion modules).

Both attend between words and positions of the map and modulate the image side by an affine
transformation whose scale and shift are Inception units of image and text. The local composition
works at each position of the map, the global one at each word.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear
from crn_jax.models.layers import InceptionUnit, inception


class _Composition(nn.Module):
  """What both compositions share.

  Attributes:
    feature_dim: width of the words.
    temperature: divisor of the attention logits (published: local 7, global 4).
  """

  feature_dim: int
  temperature: float
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  def _embed_and_match(self, image_map, words):
    """Map in the words' space [batch, positions, dim]; logits [batch, words, positions]."""
    embed = linear.torch_dense(
      image_map.shape[-1], self.feature_dim, self.dtype, use_bias=False, name="embed"
    )
    e = embed(image_map).reshape(image_map.shape[0], -1, self.feature_dim)
    return e, jnp.einsum("bld,bpd->blp", words, e) / self.temperature

  def _modulate(self, base, context, mask, **mode):
    """gamma(context) * base + beta(context)."""
    units = [
      InceptionUnit(base.shape[-1], self.axis_name, self.dtype, name=name)
      for name in ("gamma", "beta")
    ]
    gamma, beta = inception(units, context, mask, **mode)
    return gamma * base + beta


class LocalComposition(_Composition):
  """Each position gathers the words that concern it (softmax over words)."""

  @nn.compact
  def __call__(self, image_map, words, word_mask, *, train: bool, update_stats: bool):
    """Composes.

    Args:
      image_map: [batch, h, w, map_dim].
      words: [batch, words, feature_dim].
      word_mask: [batch, words] bool, False where a word takes no part.
      train, update_stats: see `BatchNorm`.

    Returns:
      composed map [batch, h, w, map_dim], attention [batch, words, h, w], None (every position
      of the composed map counts).
    """
    grid = image_map.shape[1:3]
    e, logits = self._embed_and_match(image_map, words)
    logits = jnp.where(word_mask[:, :, None], logits, jnp.finfo(logits.dtype).min)
    attention = jax.nn.softmax(logits, axis=1)
    sentence = jnp.einsum("blp,bld->bpd", attention.astype(self.dtype), words)
    context = jnp.concatenate([e, sentence], axis=-1)
    context = context.reshape(-1, *grid, context.shape[-1])
    composed = self._modulate(image_map, context, None, train=train, update_stats=update_stats)
    return composed, attention.reshape(*attention.shape[:2], *grid), None


class GlobalComposition(_Composition):
  """Each word gathers the positions that concern it (softmax over positions)."""

  @nn.compact
  def __call__(self, image_map, words, word_mask, *, train: bool, update_stats: bool):
    """Composes; arguments as in `LocalComposition`.

    Returns:
      composed words [batch, words, feature_dim], attention [batch, words, h, w], and the mask of
      the composed words that count [batch, words].
    """
    e, logits = self._embed_and_match(image_map, words)
    attention = jax.nn.softmax(logits, axis=2)
    seen = jnp.einsum("blp,bpd->bld", attention.astype(self.dtype), e)
    context = jnp.concatenate([words, seen], axis=-1)
    composed = self._modulate(seen, context, word_mask, train=train, update_stats=update_stats)
    return composed, attention.reshape(*attention.shape[:2], *image_map.shape[1:3]), word_mask
