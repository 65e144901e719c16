"""Text encoders by name."""

import flax.linen as nn

from crn_jax.models.text.lstm import TextEncoder

# Called with (vocab_size, word_dim, feature_dim, dtype).
TEXT_ENCODERS: dict[str, type[nn.Module]] = {"lstm": TextEncoder}
