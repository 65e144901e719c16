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
    gates_of_input = linear.Dense(4 * width, uniform, uniform, self.dtype, name="input_gates")(
      embed(tokens)
    )
    kernel = self.param("hidden_kernel", uniform, (width, 4 * width)).astype(self.dtype)
    bias = self.param("hidden_bias", uniform, (4 * width,)).astype(self.dtype)
    return lstm(gates_of_input.swapaxes(0, 1), kernel, bias).swapaxes(0, 1)


@jax.custom_vjp
def lstm(inputs: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """An LSTM over inputs that are projected already, from zeros on; its cell is float32 at least.

  Found by differentiating the scan, the gradient of the kernel would be a small product at every
  word, added to a sum that is rounded at every word. Here it is one product over all words and
  texts, and the gates are kept instead of all that they become.

  Args:
    inputs: [words, batch, 4 * width], for gates i, f, g, o.
    kernel: [width, 4 * width], by which the last hidden vector is multiplied.
    bias: [4 * width].

  Returns:
    Hidden vectors [words, batch, width].
  """
  return _forward(inputs, kernel, bias)[0]


def _forward(inputs, kernel, bias):
  def step(carry, gates):
    hidden, cell = carry
    gates = gates + (hidden @ kernel + bias)
    hidden, next_cell = _cell(gates, cell)
    return (hidden, next_cell), (hidden, gates, cell)

  hidden = jnp.zeros((inputs.shape[1], kernel.shape[0]), inputs.dtype)
  cell = hidden.astype(jnp.promote_types(inputs.dtype, jnp.float32))
  _, (hidden, gates, cells) = jax.lax.scan(step, (hidden, cell), inputs)
  return hidden, (kernel, hidden, gates, cells)


def _cell(gates, cell):
  i, f, g, o = jnp.split(gates.astype(cell.dtype), 4, axis=-1)
  cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
  return (jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(gates.dtype), cell


def _backward(saved, of_hidden):
  kernel, hidden, gates, cells = saved

  def step(carry, at_word):
    by_next, of_cell = carry
    of_hidden, gates, cell = at_word
    of_gates, of_cell = jax.vjp(_cell, gates, cell)[1]((of_hidden + by_next, of_cell))
    return (of_gates @ kernel.T, of_cell), of_gates

  nothing = jnp.zeros_like(hidden[0]), jnp.zeros_like(cells[0])
  _, of_gates = jax.lax.scan(step, nothing, (of_hidden, gates, cells), reverse=True)
  before = jnp.concatenate([jnp.zeros_like(hidden[:1]), hidden[:-1]])
  before, rows = (x.reshape(-1, x.shape[-1]) for x in (before, of_gates))
  return of_gates, before.T @ rows, jnp.sum(rows, 0)


lstm.defvjp(_forward, _backward)


def max_over_words(words: jax.Array, mask: jax.Array) -> jax.Array:
  """Maximum over the words of a text: the text vector of the modification relation.

  Args:
    words: [batch, words, dim].
    mask: [batch, words] bool, False at padding; at least one True a row.

  Returns:
    [batch, dim].
  """
  return jnp.max(jnp.where(mask[..., None], words, -math.inf), axis=1)
