"""Text encoder of DCNet (Kim et al., AAAI 2021, section 3.1): words and their neighbours.

Eq. (3): w = FC([Conv1d(w*); w*]) of the word embeddings w*, with the ReLU of the paper's FC layers.
The paper does not say how wide the convolution is, nor how many channels it has: 3, and as many as
w*. It takes w* from GloVe; here the embedding is trained from the start.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear

_WIDTH = 3


class Convolution(nn.Module):
  """Token ids -> one feature per word, of it and the words beside it.

  Attributes:
    vocab_size: rows of the embedding, id 0 (unknown, padding) included.
    word_dim: width of the embedding.
    feature_dim: width of the result.
    dtype: of the computation; parameters are float32.
  """

  vocab_size: int
  word_dim: int
  feature_dim: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Encodes texts.

    Args:
      tokens: [batch, words] int.
      mask: [batch, words] bool, False at padding, which is zeros to the convolution.

    Returns:
      [batch, words, feature_dim], not negative; at padding, whatever.
    """
    embed = nn.Embed(
      self.vocab_size, self.word_dim, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype,
      name="embedding",
    )  # fmt: skip
    words = jnp.where(mask[..., None], embed(tokens), 0.0)
    uniform = linear.torch_uniform(_WIDTH * self.word_dim)
    beside = nn.Conv(
      self.word_dim, (_WIDTH,), dtype=self.dtype, kernel_init=uniform, bias_init=uniform,
      name="conv",
    )(words)  # fmt: skip
    both = jnp.concatenate([beside, words], axis=-1)
    fc = linear.torch_dense(2 * self.word_dim, self.feature_dim, self.dtype, name="fc")
    return nn.relu(fc(both))
