"""What every backbone gives to the image head."""

import flax.struct
import jax


@flax.struct.dataclass
class FeatureMaps:
  """Feature maps of one backbone pass.

  Attributes:
    map: [batch, h, w, dim] last feature map.
    stages: [batch, h_k, w_k, dim_k] map of each stage, in order. HAT takes the two before the last.
  """

  map: jax.Array
  stages: tuple[jax.Array, ...]
