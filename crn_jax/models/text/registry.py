"""Text encoders by name."""

import flax.linen as nn

from crn_jax.models.text.convolution import Convolution
from crn_jax.models.text.gru import BiGRU
from crn_jax.models.text.lstm import TextEncoder

# Made of (vocab_size, word_dim, feature_dim, dtype), called with tokens and their mask.
TEXT_ENCODERS: dict[str, type[nn.Module]] = {
  "lstm": TextEncoder,
  "bigru": BiGRU,
  "convolution": Convolution,
}
