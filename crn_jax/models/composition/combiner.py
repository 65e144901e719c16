"""The combiner of CLIP4Cir (Baldrati et al., CVPRW 2022): features of image and text -> query.

Written from its published description. With features t and i of width d, as their towers give them:

  T = drop(relu(W_t t)),  I = drop(relu(W_i i)),  c = [T; I]        T, I: 4 d
  v = W_o drop(relu(W_c c)),  lambda = sigmoid(w drop(relu(W_s c)))    hidden: 8 d
  query = v + lambda t + (1 - lambda) i, to be normalised by whoever compares it
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear
from crn_jax.models.layers import dropout

# Widths in units of the features' width.
_PROJECTION, _HIDDEN = 4, 8


class Combiner(nn.Module):
  """Query vectors of features.

  Attributes:
    dropout: share of values that are dropped in training, of all four hidden layers.
    axis_name: mapped axis over which the batch is split, if any. What is dropped does not depend on
      the number of devices.
    dtype: of the computation; parameters are float32.
  """

  dropout: float = 0.5
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array, text: jax.Array, *, train: bool) -> jax.Array:
    """Composes; training draws from the random numbers "dropout".

    Args:
      image: [batch, d] features of the reference images, not normalised.
      text: [batch, d] features of the texts, not normalised.
      train: whether to drop values.

    Returns:
      [batch, d] queries, not normalised.
    """
    d = image.shape[-1]

    def hidden(x, width, name):
      x = nn.relu(linear.torch_dense(x.shape[-1], width, self.dtype, name=name)(x))
      return dropout(self, x, self.dropout) if train else x

    projected = [
      hidden(text, _PROJECTION * d, "text_projection"),
      hidden(image, _PROJECTION * d, "image_projection"),
    ]
    both = jnp.concatenate(projected, axis=-1)
    mixed = hidden(both, _HIDDEN * d, "mixture_hidden")
    mixed = linear.torch_dense(_HIDDEN * d, d, self.dtype, name="mixture")(mixed)
    gate = hidden(both, _HIDDEN * d, "gate_hidden")
    gate = nn.sigmoid(linear.torch_dense(_HIDDEN * d, 1, self.dtype, name="gate")(gate))
    return mixed + gate * text + (1 - gate) * image
