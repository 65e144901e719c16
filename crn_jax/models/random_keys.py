"""Keys of many modules, made by one operation."""

import hashlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np


def of_children(module: nn.Module, stream: str, names: Sequence[str], draws: int) -> jax.Array:
  """Keys that a module's children would draw one after another.

  Equal to `child.make_rng(stream)`, called `draws` times first of all by each child, with Flax's
  way of hashing paths that is its default (`flax_fix_rng_separator` is off). Flax folds a
  hash of the child's path and of the number of the draw into the stream's key; a program that does
  so key by key spends more on it, written down and compiled, than on drawing.

  Args:
    module: bound, with the stream.
    stream: name of the PRNG stream.
    names: of the children.
    draws: keys a child.

  Returns:
    [children * draws] typed keys, a child's one after another.
  """
  of_module = module.scope.rngs[stream]
  hashes = [
    _hash((*of_module.suffix, name), draw) for name in names for draw in range(1, draws + 1)
  ]
  return jax.vmap(jax.random.fold_in, (None, 0))(of_module.rng, np.array(hashes, np.uint32))


def _hash(path: tuple[str, ...], draw: int) -> int:
  """Flax's, of 32 bits, for a number of one byte."""
  digest = hashlib.sha1("".join(path).encode() + draw.to_bytes(1, "big")).digest()
  return int.from_bytes(digest[:4], "big")
