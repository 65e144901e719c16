"""Random bits by a program of our own: JAX's, for every key, width and shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax import threefry

KEYS = [0, 599, 2**31 + 7]


def data(key) -> np.ndarray:
  return np.asarray(jax.random.key_data(key))


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5, 3, 7), (2, 4096)])
def test_bits_are_those_of_jax(shape, dtype, partitionable):
  def bits(key):
    return jax.random.bits(key, shape, dtype)

  with jax.threefry_partitionable(partitionable):
    for seed in KEYS:
      key = jax.random.key(seed)
      found = jax.jit(bits)(threefry.unrolled(key))
      assert found.dtype == jnp.dtype(dtype)
      np.testing.assert_array_equal(found, bits(key))


def test_keys_made_of_it_are_those_of_jax():
  key = jax.random.key(599)
  own = threefry.unrolled(key)
  np.testing.assert_array_equal(data(own), data(key))
  np.testing.assert_array_equal(data(jax.random.split(own, 3)), data(jax.random.split(key, 3)))
  np.testing.assert_array_equal(
    data(jax.random.fold_in(own, 2**32 - 1)), data(jax.random.fold_in(key, 2**32 - 1))
  )


def test_for_many_keys_at_once():
  keys = jax.random.split(jax.random.key(5), 4)
  found = jax.vmap(lambda key: jax.random.normal(threefry.unrolled(key), (3, 2)))(keys)
  np.testing.assert_array_equal(found, jax.vmap(lambda key: jax.random.normal(key, (3, 2)))(keys))


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_a_key_of_another_generator_is_left_as_it_is(kind):
  key = jax.random.key(1, impl=kind)
  assert threefry.unrolled(key) is key


def test_rounds_are_not_a_loop():
  def lowered(key):
    return jax.jit(jax.random.bits).lower(key).as_text()

  assert "stablehlo.while" not in lowered(threefry.unrolled(jax.random.key(0)))
