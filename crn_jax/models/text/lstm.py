"""Text encoder: word embedding and a one-layer LSTM (CLVC-Net, CRN)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear


class TextEncoder(nn.Module):
  """Token ids -> one feature per word.

  The LSTM is PyTorch's: gates i, f, g, o, and two bias vectors, which `nn.OptimizedLSTMCell`
  merges into one (Adam moves two by twice as much, so one would not train the same). The input
  projection of all words is one matrix product before the scan.

  Attributes:
    vocab_size: rows of the embedding, id 0 (unknown, padding) included.
    word_dim: width of the embedding.
    feature_dim: width of the LSTM.
    dtype: of the computation; parameters are float32, and so is, at least, the cell, which adds up
      over the words.
  """

  vocab_size: int
  word_dim: int
  feature_dim: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """[batch, words] int -> [batch, words, feature_dim].

    Other encoders need the mask of the words. Here padding stands on the right, so the features of
    real words never depend on it.
    """
    del mask
    width = self.feature_dim
    uniform = linear.torch_uniform(width)
    embed = nn.Embed(
      self.vocab_size, self.word_dim, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype,
      name="embedding",
    )  # fmt: skip
    gates_of_input = linear.dense(4 * width, uniform, uniform, self.dtype, name="input_gates")(
      embed(tokens)
    )
    kernel = self.param("hidden_kernel", uniform, (width, 4 * width)).astype(self.dtype)
    bias = self.param("hidden_bias", uniform, (4 * width,)).astype(self.dtype)

    def step(carry, gates):
      hidden, cell = carry
      gates = (gates + (hidden @ kernel + bias)).astype(cell.dtype)
      i, f, g, o = jnp.split(gates, 4, axis=-1)
      cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
      hidden = (jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(hidden.dtype)
      return (hidden, cell), hidden

    hidden = jnp.zeros((tokens.shape[0], width), self.dtype)
    cell = hidden.astype(jnp.promote_types(self.dtype, jnp.float32))
    _, hidden = jax.lax.scan(step, (hidden, cell), gates_of_input.swapaxes(0, 1))
    return hidden.swapaxes(0, 1)


def max_over_words(words: jax.Array, mask: jax.Array) -> jax.Array:
  """Maximum over the words of a text: the text vector of the modification relation.

  Args:
    words: [batch, words, dim].
    mask: [batch, words] bool, False at padding; at least one True a row.

  Returns:
    [batch, dim].
  """
  return jnp.max(jnp.where(mask[..., None], words, -math.inf), axis=1)
