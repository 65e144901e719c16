"""Towers of a few thousand parameters that start from random values, and runs on them."""

import pathlib

import ml_collections
import numpy as np

from configs import default
from crn_jax.methods import registry

VOCAB_SIZE = 300


def description(image_size: int = 32, length: int = 20) -> ml_collections.ConfigDict:
  """Of `model.encoder`; texts are rows of a word table, whose end mark is 3."""
  sizes = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32, "activation": "quick_gelu",
           "epsilon": 1e-5}  # fmt: skip
  return ml_collections.ConfigDict({
    "family": "clip",
    "image": {**sizes, "patch_size": 8, "image_size": image_size, "pooling": "class_token"},
    "text": {**sizes, "vocab_size": VOCAB_SIZE, "length": length, "pooling": "end", "end_id": 3},
    "vector_dim": 16,
    "project_image": True,
    "project_text": True,
    "project_bias": False,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
  })  # fmt: skip


def config(root, preset: str):
  """As `tiny.config`: 40 triplets, two steps of 16 an epoch, before and in the last training."""
  c = default.get_config(preset)
  c.name = "tiny"
  c.data.root = str(root)
  c.data.category = "dress"
  c.data.features = str(pathlib.Path(root) / "features")
  c.data.max_words = 20
  c.data.image_size = c.data.resize = 32
  c.model.encoder = description()
  c.num_epochs = c.finetune.num_epochs = 2
  c.batch_size = c.finetune.batch_size = 16
  c.optimizer.learning_rate = c.finetune.optimizer.learning_rate = 1e-3
  c.eval.batch_size = 16
  c.eval.recall_at = (1, 10)
  c.eval.every_epochs = 1
  return c


def method(name: str, axis_name: str | None = None):
  """A method of `registry.METHODS` on the towers."""
  c = config("nowhere", "bank" if name == "bank" else "clip4cir")
  c.method = name
  return registry.create(c, VOCAB_SIZE, axis_name)


def pictures(n: int, seed: int = 0) -> np.ndarray:
  """[n, 32, 32, 3] uint8."""
  return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def ids(n: int, seed: int = 0) -> np.ndarray:
  """[n, 20] int32 rows of a word table: words, the end mark 3, padding."""
  rng = np.random.default_rng(seed)
  rows = np.zeros((n, 20), np.int32)
  for row in rows:
    length = rng.integers(1, 18)
    row[: length + 2] = [2, *rng.integers(4, VOCAB_SIZE, length), 3]
  return rows
