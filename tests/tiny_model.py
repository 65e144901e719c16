"""A model of a few thousand parameters, for tests of behaviour rather than of numbers."""

import flax.core
import jax
import numpy as np

from configs import default
from crn_jax.methods import registry
from crn_jax.methods.base import Method, TrainState

VOCAB_SIZE = 20
_STARTS = {"p": 3.0, "logit_scale": 10.0, "vector_scale": 4.0}


def config(names: str = "crn", **backbone):
  """32 x 32 images, a 4 x 4 last map, vectors of 64."""
  c = default.get_config(names)
  c.data.image_size = 32
  c.data.max_words = 8
  c.model.remat = "none"  # Less to compile.
  if c.model.backbone.name.startswith("resnet"):
    c.model.backbone.update(depths=(1, 1), width=8)  # Maps of 32 and 64 channels.
  else:
    c.model.backbone.update(
      embed_dim=16, depths=(2, 1), num_heads=(1, 2), patch_size=4, window_size=4,
      drop_path_rate=0.1,
    )  # fmt: skip
  c.model.backbone.update(backbone)
  c.model.update(feature_dim=64, word_dim=16)
  if c.model.map_dim is not None:
    c.model.map_dim = 64
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


def model(c, axis_name: str | None = None) -> Method:
  return registry.create(c, VOCAB_SIZE, axis_name)


def _init(c):
  return lambda: model(c).init(jax.random.key(0))


def fresh_variables(c) -> dict:
  """What training starts from. Much of it is compiling random number generators: optimise less."""
  return jax.jit(_init(c), compiler_options={"xla_backend_optimization_level": 0})()


def variables(c, seed: int = 0) -> dict:
  """Made-up variables, without compiling anything."""
  rng = np.random.default_rng(seed)

  def value(path, leaf):
    name, noise = path[-1].key, rng.normal(size=leaf.shape).astype(np.float32)
    if name in ("kernel", "hidden_kernel"):
      return noise / np.sqrt(np.prod(leaf.shape[:-1]))
    if name in _STARTS:
      return np.full(leaf.shape, _STARTS[name], np.float32)
    if name == "embedding":
      return noise
    if name == "var":
      return 1 + 0.1 * np.abs(noise)
    return (name == "scale") + 0.1 * noise  # Biases, means, position tables.

  shapes = flax.core.unfreeze(jax.eval_shape(_init(c)))
  return jax.tree_util.tree_map_with_path(value, shapes)


def state(c, tx, seed: int = 0) -> TrainState:
  return TrainState.create(variables(c, seed), tx)
