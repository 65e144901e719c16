"""LayerNorm: flax's values, PyTorch's gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from crn_jax.models.layer_norm import LayerNorm, normalized


def inputs(shape=(3, 5, 24)):
  rng = np.random.default_rng(0)
  x = 3 + 2 * rng.normal(size=shape)
  return x, rng.normal(size=shape[-1]), rng.normal(size=shape[-1]), rng.normal(size=shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_initial_values_are_those_of_flax(dtype):
  x = jnp.asarray(inputs()[0], dtype)
  ours = LayerNorm(1e-5, jnp.dtype(dtype))
  flax = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.dtype(dtype))
  params = ours.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, params, flax.init(jax.random.key(0), x))
  params = {"params": dict(zip(("scale", "bias"), map(jnp.float32, inputs()[1:3]), strict=True))}
  got, expected = ours.apply(params, x), flax.apply(params, x)
  assert got.dtype == expected.dtype == dtype
  np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))


def test_gradients_are_those_of_pytorch_in_float64():
  x, scale, bias, of_out = inputs()
  leaves = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
  out = torch.nn.functional.layer_norm(leaves[0], x.shape[-1:], *leaves[1:], 1e-5)
  out.backward(torch.tensor(of_out))
  with jax.enable_x64():
    got, pull_back = jax.vjp(lambda *a: normalized(*a, 1e-5, jnp.dtype("float64")), x, scale, bias)
    np.testing.assert_allclose(got, out.detach().numpy(), atol=1e-12)
    for ours, theirs in zip(pull_back(jnp.asarray(of_out)), leaves, strict=True):
      np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=1e-12)


def test_the_gradient_in_bfloat16_is_that_of_float32_rounded_once():
  x, scale, bias, of_out = (jnp.asarray(a, jnp.bfloat16) for a in inputs())
  scale, bias = jnp.float32(scale), jnp.float32(bias)

  def gradient(x, of_out):
    _, pull_back = jax.vjp(lambda x: normalized(x, scale, bias, 1e-5, x.dtype), x)
    return np.asarray(pull_back(of_out)[0], np.float64)

  exact = gradient(x.astype(jnp.float32), of_out.astype(jnp.float32))
  np.testing.assert_allclose(gradient(x, of_out), exact, rtol=2**-8, atol=2**-8 * 1e-3)


def test_a_constant_row_has_a_finite_gradient():
  """As of a zero image behind a layer without bias: the variance is zero."""
  x, scale, bias = jnp.zeros((2, 8)), jnp.ones(8), jnp.zeros(8)
  gradient = jax.grad(lambda x: normalized(x, scale, bias, 1e-5, x.dtype)[0, 0])(x)
  assert np.isfinite(gradient).all()
