"""Relation module: the difference between query and target, to be matched with the text.

The class `FusDiff` of the authors' PyTorch release, which evaluates it and leaves it out of the
loss. That it is the paper's modification relation is inferred from its name and the abstract.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear


class Relation(nn.Module):
  """Difference vector of two vectors of the same width."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, query: jax.Array, target: jax.Array) -> jax.Array:
    """[batch, dim], [batch, dim] -> [batch, dim], not negative."""
    dim = query.shape[-1]

    def fc(name, *parts):
      x = jnp.concatenate(parts, axis=-1)
      return nn.relu(linear.torch_dense(x.shape[-1], dim, self.dtype, name=name)(x))

    common = query * target
    own_query, own_target = fc("query_fc", common, query), fc("target_fc", common, target)
    return fc("fc", query, own_target - own_query, target)
