"""The convolution over words against its equation in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax.models.text.convolution import Convolution

VOCAB, WORD_DIM, WIDTH = 9, 4, 6
LENGTHS = np.array([5, 1, 3])
MASK = np.arange(5) < LENGTHS[:, None]
TOKENS = np.where(MASK, np.random.default_rng(0).integers(1, VOCAB, MASK.shape), 0)


@pytest.fixture(scope="module")
def variables():
  return Convolution(VOCAB, WORD_DIM, WIDTH).init(jax.random.key(0), TOKENS, MASK)


def test_it_computes_its_equation(variables):
  """Of each text by itself, without padding."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
  with jax.enable_x64():
    wide = jax.tree.map(jnp.asarray, params)
    found = Convolution(VOCAB, WORD_DIM, WIDTH, jnp.float64).apply({"params": wide}, TOKENS, MASK)
    found = np.asarray(found)
  for row, n in enumerate(LENGTHS):
    words = params["embedding"]["embedding"][TOKENS[row, :n]]
    padded = np.pad(words, ((1, 1), (0, 0)))
    beside = sum(padded[i : i + n] @ params["conv"]["kernel"][i] for i in range(3))
    both = np.concatenate([beside + params["conv"]["bias"], words], axis=-1)
    expected = np.maximum(both @ params["fc"]["kernel"] + params["fc"]["bias"], 0)
    # float64, sums of a dozen products of numbers about one.
    np.testing.assert_allclose(found[row, :n], expected, atol=1e-14)


def test_what_stands_at_padding_has_no_influence(variables):
  module = Convolution(VOCAB, WORD_DIM, WIDTH)
  others = np.where(MASK, TOKENS, 3)
  longer, mask = (
    np.pad(a, ((0, 0), (0, 3)), constant_values=c) for a, c in ((others, 5), (MASK, 0))
  )
  expected = np.asarray(module.apply(variables, TOKENS, MASK))[MASK]
  found = np.asarray(module.apply(variables, longer, mask))[:, :5][MASK]
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_a_gradient_reaches_every_parameter(variables):
  def loss(params):
    words = Convolution(VOCAB, WORD_DIM, WIDTH).apply({"params": params}, TOKENS, MASK)
    return jnp.sum(jnp.square(words) * MASK[..., None])

  grads = jax.grad(loss)(variables["params"])
  assert all(np.any(g) for g in jax.tree.leaves(grads))
