"""Blocks of towers: one program for all of them, what they keep, what they see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax import initial_values
from crn_jax.models import remat
from crn_jax.models.transformer import Block, Blocks, Sizes

SIZES = Sizes(width=12, depth=3, heads=2, mlp_dim=20, activation="quick_gelu", epsilon=1e-5)
X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)


def test_blocks_are_those_of_their_stacked_parameters_one_after_another():
  blocks = Blocks(SIZES, causal=True)
  params = blocks.init(jax.random.key(0), X)["params"]
  (y, each) = blocks.apply({"params": params}, X, each=True)
  x = X
  for i in range(SIZES.depth):
    own = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    x = Block(SIZES, causal=True).apply({"params": own}, x)
    np.testing.assert_allclose(each[i], x, atol=2e-6)  # Order of sums, of values of order one.
  np.testing.assert_array_equal(y, each[-1])
  assert blocks.apply({"params": params}, X)[1] is None


def test_the_program_does_not_grow_with_the_depth():
  def size(depth):
    blocks = Blocks(dataclasses.replace(SIZES, depth=depth), causal=False)
    params = jax.eval_shape(lambda: blocks.init(jax.random.key(0), X))
    return len(str(jax.make_jaxpr(blocks.apply)(params, X)).splitlines())

  assert size(2) == size(9)


def test_initial_values_are_drawn_without_the_model_and_differ_by_block():
  blocks = Blocks(SIZES, causal=False)

  def init(key):
    return blocks.init(key, jnp.asarray(X))

  drawn = initial_values.draw(init, jax.random.key(3))
  jax.tree.map(np.testing.assert_array_equal, drawn, jax.jit(init)(jax.random.key(3)))
  kernel = np.asarray(drawn["params"]["blocks"]["qkv"]["kernel"])
  assert kernel.shape == (3, 12, 36)
  assert 0.015 < kernel.std() < 0.025
  assert np.abs(kernel[0] - kernel[1]).max() > 0.01


@pytest.mark.parametrize("how", remat.CHOICES)
def test_gradients_do_not_depend_on_what_is_kept(how):
  def gradient(how):
    blocks = Blocks(SIZES, causal=True, remat=how)
    params = blocks.init(jax.random.key(0), X)
    loss = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(blocks.apply(p, X)[0]))))
    return loss(params)

  jax.tree.map(
    # Of the same operations; XLA may order sums of some ten products of order ten otherwise.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    gradient(how),
    gradient("none"),
  )


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_token_does_not_see_what_follows_it(causal):
  blocks = Blocks(SIZES, causal=causal)
  params = blocks.init(jax.random.key(0), X)
  changed = X.copy()
  changed[:, 3, 0] += 1.0  # Of one channel: LayerNorm does not see a shift of all.
  before, after = (blocks.apply(params, x)[0] for x in (X, changed))
  seen = np.abs(before - after).max((0, 2)) > 0
  assert list(seen) == ([False] * 3 + [True] * 2 if causal else [True] * 5)
