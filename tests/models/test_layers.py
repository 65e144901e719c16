"""Pooling and the text encoder where numbers are extreme or few-bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax.models import layers
from crn_jax.models.text.lstm import TextEncoder

P = [3.0, 6.5, 10.0, 50.0]
CHANNELS = {
  "all small": [1e-7, 3e-7, 9e-7, 5e-8],
  "all zero": [0.0, 0.0, 0.0, 0.0],
  "negative": [-1.0, -2.0, -3.0, -1e-9],
  "mixed": [0.0, 1e-7, 2.0, 0.5],
  "large": [300.0, 1e4, 2e3, 1.0],
  "around the clamp": [1e-6, 2e-6, 3e-6, 1e-5],
}


def channels(dtype):
  """[1, 4 positions, channels]."""
  return jnp.asarray(np.stack(list(CHANNELS.values()), -1)[None], dtype)


def expected_gem(x, p, mask=None):
  """In float64, by logarithms; [batch, channels]."""
  logs = p * np.log(np.maximum(np.asarray(x, np.float64), 1e-6))
  weight = np.ones(logs.shape[:2]) if mask is None else np.asarray(mask, np.float64)
  weight = weight[..., None] / weight.sum(1)[:, None, None]
  return np.exp(np.log((np.exp(logs - logs.max(1, keepdims=True)) * weight).sum(1)) / p
                + logs.max(1) / p)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("p", P)
def test_gem_has_a_finite_gradient_everywhere(p, dtype):
  """Of every channel, by input and by exponent, with and without a mask."""
  x = channels(dtype)
  module = layers.GeM()
  for mask in (None, jnp.asarray([[True, True, False, True]])):

    def total(p, x, mask=mask):
      out = module.apply({"params": {"p": p}}, x, mask)
      return out.astype(jnp.float32).sum(), out

    (_, out), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(jnp.full(1, p), x)
    assert out.dtype == x.dtype
    for value in (out, *grads):
      assert np.isfinite(np.asarray(value, np.float32)).all()
    # Where a channel's largest value is below the clamp, the clamp is the result: no gradient.
    assert not np.asarray(grads[1][..., :3], np.float32).any()
    if mask is None:
      assert np.asarray(grads[1], np.float32)[0, :, 3:].any(axis=0).all()


@pytest.mark.parametrize("p", P)
def test_gem_is_the_mean_of_powers(p):
  """1e-6 relative: a few roundings of float32, of which the p-th root leaves one or two."""
  x = channels("float32")
  np.testing.assert_allclose(layers.gem_pool(x, p), expected_gem(x, p), rtol=1e-6)
  mask = np.asarray([[True, True, False, True]])
  # A masked value beyond all others neither counts nor overflows.
  hidden = x.at[:, 2].set(1e30)
  np.testing.assert_allclose(
    layers.gem_pool(hidden, p, jnp.asarray(mask)), expected_gem(x, p, mask), rtol=1e-6
  )
  grads = jax.grad(lambda x: layers.gem_pool(x, p, jnp.asarray(mask)).sum())(hidden)
  assert np.isfinite(grads).all()
  assert not grads[:, 2].any()


@pytest.mark.parametrize("p", [2.0, 3.0, 6.5])
def test_gradients_of_gem_are_those_of_its_definition(p):
  """1e-5 relative, where the definition itself is computed without loss."""
  x = jnp.asarray(np.random.default_rng(0).uniform(0.2, 2, (2, 3, 3, 5)), jnp.float32)

  def plain(x, p):
    return jnp.mean(x**p, (1, 2)) ** (1 / p)

  def weighted(pool):
    return lambda x, p: jnp.sum(pool(x, p) * jnp.arange(1.0, 6.0))

  got = jax.grad(weighted(layers.gem_pool), (0, 1))(x, jnp.float32(p))
  expected = jax.grad(weighted(plain), (0, 1))(x, jnp.float32(p))
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_cell_of_a_bfloat16_text_encoder_adds_up_in_float32():
  """A first word sets the cell to tanh(3), 512 more add 2^-10 each: a bfloat16 cell stands still.

  Input, forget and output gate are open. 1e-2: what bfloat16 leaves of the hidden vector, and what
  512 times the rounding of 2^-10 in the candidate makes.
  """
  encoder = TextEncoder(vocab_size=2, word_dim=1, feature_dim=1, dtype=jnp.bfloat16)
  tokens = jnp.asarray([[0] + 512 * [1]], jnp.int32)
  shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), tokens)["params"])
  params = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
  params["embedding"]["embedding"] = jnp.asarray([[3.0], [2.0**-10]])
  params["input_gates"]["kernel"] = jnp.asarray([[0.0, 0.0, 1.0, 0.0]])  # Gates i, f, g, o.
  params["input_gates"]["bias"] = jnp.asarray([30.0, 30.0, 0.0, 30.0])
  out = encoder.apply({"params": params}, tokens)
  assert out.dtype == jnp.bfloat16
  expected = np.tanh(np.tanh(3.0) + 512 * 2.0**-10)
  assert float(out[0, -1, 0]) == pytest.approx(expected, abs=1e-2)
  assert float(out[0, 0, 0]) == pytest.approx(np.tanh(np.tanh(3.0)), abs=1e-2)
