"""A model of a few thousand parameters, for tests of behaviour rather than of numbers."""

import jax
import numpy as np

from configs import default
from crn_jax import train_step
from crn_jax.models import crn

VOCAB_SIZE = 20


def config(preset: str = "crn", **backbone):
  """32 x 32 images, a 2 x 2 last map, vectors of 64."""
  c = default.get_config(preset)
  c.data.image_size = 32
  c.data.max_words = 8
  c.model.backbone.update(
    embed_dim=16, depths=(2, 1, 1), num_heads=(1, 2, 2), patch_size=4, window_size=4,
    drop_path_rate=0.1,
  )  # fmt: skip
  c.model.backbone.update(backbone)
  c.model.update(map_dim=64, feature_dim=64, word_dim=16)
  return c


def batch(c, size: int, seed: int = 0) -> dict:
  """Random uint8 pictures with texts of 2 to `max_words` words, as the loader gives them."""
  rng = np.random.default_rng(seed)
  side, words = c.data.image_size, c.data.max_words
  lengths = rng.integers(2, words + 1, (size, 1))
  mask = np.arange(words) < lengths
  return {
    "reference": rng.integers(0, 256, (size, side, side, 3), np.uint8),
    "target": rng.integers(0, 256, (size, side, side, 3), np.uint8),
    "tokens": np.where(mask, rng.integers(1, VOCAB_SIZE, mask.shape), 0).astype(np.int32),
    "token_mask": mask,
  }


def model(c, axis_name: str | None = None) -> crn.CRN:
  return crn.build(c.model, VOCAB_SIZE, axis_name)


def variables(c, seed: int = 0) -> dict:
  """Fresh variables; the same for every `axis_name`."""
  init = jax.jit(lambda key: model(c).init(key, c.data.image_size, c.data.max_words))
  return init(jax.random.key(seed))


def state(c, tx, seed: int = 0) -> train_step.TrainState:
  return train_step.TrainState.create(variables(c, seed), tx)
