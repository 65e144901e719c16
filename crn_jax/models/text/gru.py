"""Text encoder: word embedding and a one-layer bidirectional GRU (Cho et al., EMNLP 2014)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear


class BiGRU(nn.Module):
  """Token ids -> one feature per word, of what stands before and after it.

  Two GRUs, one from the first word on, one from the last word back, each of half the width. They
  are PyTorch's, of packed sequences: gates r, z, n with two bias vectors, and

    r = sigmoid(W_r x + U_r h),  z = sigmoid(W_z x + U_z h),  n = tanh(W_n x + r * (U_n h))
    h' = (1 - z) * n + z * h

  (each product with its bias; `nn.GRUCell` has one bias only in r and z). The input projection of
  all words is one matrix product before the scan.

  Attributes:
    vocab_size: rows of the embedding, id 0 (unknown, padding) included.
    word_dim: width of the embedding.
    feature_dim: width of the result, even: the first half is the GRU's that reads forwards.
    dtype: of the computation; parameters are float32, and so is, at least, the state, which adds up
      over the words.
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
      mask: [batch, words] bool, False at padding, which stands on the right.

    Returns:
      [batch, words, feature_dim], zero at padding.
    """
    if self.feature_dim % 2:
      raise ValueError(f"the width of a bidirectional GRU must be even, not {self.feature_dim}")
    embed = nn.Embed(
      self.vocab_size, self.word_dim, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype,
      name="embedding",
    )  # fmt: skip
    words = embed(tokens).swapaxes(0, 1)
    mask = mask.T[..., None]
    both = [
      self._read(words, mask, name, reverse)
      for name, reverse in (("forward", False), ("backward", True))
    ]
    return jnp.concatenate(both, axis=-1).swapaxes(0, 1)

  def _read(self, words, mask, name: str, reverse: bool):
    """One GRU: [words, batch, word_dim] -> [words, batch, feature_dim / 2]."""
    width = self.feature_dim // 2
    uniform = linear.torch_uniform(width)
    gates_of_input = linear.Dense(
      3 * width, uniform, uniform, self.dtype, name=f"{name}_input_gates"
    )(words)
    kernel = self.param(f"{name}_hidden_kernel", uniform, (width, 3 * width)).astype(self.dtype)
    bias = self.param(f"{name}_hidden_bias", uniform, (3 * width,)).astype(self.dtype)

    def step(hidden, at_word):
      x, real = at_word
      h = (hidden.astype(self.dtype) @ kernel + bias).astype(hidden.dtype)
      (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(x.astype(h.dtype), 3, -1), jnp.split(h, 3, -1)
      z = jax.nn.sigmoid(x_z + h_z)
      new = (1 - z) * jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n) + z * hidden
      # Padding leaves the state as it is, so that the backward GRU begins at the last real word.
      return jnp.where(real, new, hidden), jnp.where(real, new, 0.0).astype(self.dtype)

    state = jnp.zeros((words.shape[1], width), jnp.promote_types(self.dtype, jnp.float32))
    return jax.lax.scan(step, state, (gates_of_input, mask), reverse=reverse)[1]
