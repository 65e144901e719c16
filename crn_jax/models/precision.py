"""What a model of `model.dtype` = bfloat16 keeps in float32.

Backbones and towers compute in `model.dtype`, up to their last block; everything else is float32,
and so is what transformer blocks add to. Images that are nearly alike differ by less than
bfloat16's 8 bits resolve: there differences would be rounded away, while within a block LayerNorm
makes them larger. ResNets have a BatchNorm for it behind every convolution.
"""

from typing import Any

import jax
import jax.numpy as jnp


def at_least_float32(dtype) -> jnp.dtype:
  """The dtype of what stands behind blocks that compute in `dtype`."""
  return jnp.promote_types(dtype, jnp.float32)


def numerics(dtype: str) -> str:
  """A name of how models of a `model.dtype` compute: another one once their numbers are others."""
  return dtype if dtype == "float32" else f"{dtype} blocks"


def widened(tree: Any) -> Any:
  """A tree of arrays, each in `at_least_float32` of its dtype."""
  return jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), tree)
