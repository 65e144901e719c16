"""Image head with the hierarchical aggregation transformer (HAT) of CRN.

A window-based multi-stage backbone loses edge information on the way to its last map; HAT adds a
projection of the image vector and of the stage means back to it (abstract of Yang et al., IEEE
TIP 2023; the paper's equations were not available, the layer is the one that the authors' PyTorch
release defines and then does not use). With ResNet-50 the stages are layer2 and layer3, the two
maps before the last: our reading.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from crn_jax.errors import UserError
from crn_jax.models import linear
from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.layers import GeM


@flax.struct.dataclass
class ImageOutput:
  """What one branch makes of an image.

  Attributes:
    map: [batch, h, w, map_dim] what composition, pooling and the perceptual loss see.
    vector: [batch, feature_dim] image vector, not normalised.
    aggregated: [batch, h, w, map_dim] HAT's map, whether it is used or not; None without HAT.
  """

  map: jax.Array
  vector: jax.Array
  aggregated: jax.Array | None


class ImageHead(nn.Module):
  """Backbone maps -> map and vector.

  Attributes:
    map_dim: width that the map is lifted to; None keeps the backbone's, without a layer.
    feature_dim: width of the vector.
    keep_map: whether positions are kept; otherwise the map is pooled to 1 x 1, as released.
    aggregation: 'used'; 'discarded' (computed without effect, as released); 'none'.
  """

  map_dim: int | None
  feature_dim: int
  keep_map: bool
  aggregation: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, features: FeatureMaps) -> ImageOutput:
    """See `ImageOutput`.

    Raises:
      UserError: on an unknown `aggregation`.
    """
    if self.aggregation not in ("used", "discarded", "none"):
      raise UserError(
        f"model.aggregation must be 'used', 'discarded' or 'none', not {self.aggregation!r}"
      )
    x = features.map if self.keep_map else jnp.mean(features.map, (1, 2), keepdims=True)
    plain = x
    if self.map_dim is not None:
      lift = linear.torch_dense(x.shape[-1], self.map_dim, self.dtype, use_bias=False, name="lift")
      plain = lift(x)
    map_dim = plain.shape[-1]
    pool = GeM(name="pool")
    to_vector = linear.torch_dense(map_dim, self.feature_dim, self.dtype, name="fc")
    vector = to_vector(pool(plain))
    if self.aggregation == "none":
      return ImageOutput(plain, vector, None)
    # The two maps before the last, or the one there is in a backbone of two stages.
    means = [jnp.mean(stage, (1, 2)) for stage in features.stages[-3:-1]]
    parts = jnp.concatenate([vector, *means], axis=-1)
    mix = linear.torch_dense(parts.shape[-1], map_dim, self.dtype, name="aggregation_fc")
    aggregated = plain + mix(parts)[:, None, None, :]
    if self.aggregation == "discarded":
      return ImageOutput(plain, vector, aggregated)
    return ImageOutput(aggregated, to_vector(pool(aggregated)), aggregated)
