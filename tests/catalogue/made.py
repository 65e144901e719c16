"""Catalogues to test with: drawn pictures, a run with made-up weights, encoders without a model."""

import hashlib
import pathlib
import types

import numpy as np
from PIL import Image

from crn_jax import state
from crn_jax.catalogue.store import About, Row, Store
from crn_jax.input_pipeline.tokenizers.words import RESERVED, Vocabulary
from crn_jax.methods import registry
from crn_jax.workdir import run
from crn_jax.workdir.checkpoint import Checkpoints
from tests import tiny_model

DIM = 8
_WORDS = ("is", "red", "blue", "with", "long", "sleeves", "in", "a", "dress", "shirt", "no", "and",
          "more", "less", "green", "black")  # fmt: skip


def picture(path: pathlib.Path, seed: int, size=(40, 48)) -> pathlib.Path:
  """Writes a picture of coloured squares; another one for each seed."""
  path.parent.mkdir(parents=True, exist_ok=True)
  squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
  Image.fromarray(squares).resize(size, Image.Resampling.NEAREST).save(path)
  return path


def folder(root: pathlib.Path, n: int) -> pathlib.Path:
  """A folder of n pictures, 0.png and so on."""
  for i in range(n):
    picture(root / f"{i}.png", i)
  return root


def trained(workdir: pathlib.Path, seed: int = 0) -> pathlib.Path:
  """The work directory of a run whose weights are made up."""
  config = tiny_model.config()
  config.data.resize = 32
  config.name = "made_up"
  workdir.mkdir(parents=True)
  vocabulary = Vocabulary((*RESERVED, *_WORDS), config.data.markers, config.data.max_words)
  assert len(vocabulary) == tiny_model.VOCAB_SIZE
  method = registry.create(config, len(vocabulary))
  tx = method.optimizer(steps_per_epoch=1, total_steps=1)
  run.save_config(config, workdir)
  vocabulary.save(workdir / "vocab.json")
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    checkpoints.save(state.of_variables(method, tx, tiny_model.variables(config, seed)))
  return workdir


class FakeEncoders:
  """In the place of `encoders.Encoders`: vectors are hashes of the pictures."""

  def __init__(self, digest: str = "a", bad: tuple[int, ...] = ()):
    """`bad` are seeds of pictures that get no finite vector."""
    self.model = types.SimpleNamespace(
      path="/models/made_up", digest=digest * 64, method=types.SimpleNamespace(vector_dim=DIM)
    )
    self.encoded = 0
    self._bad = {
      np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)[0, 0].tobytes()
      for seed in bad
    }

  def fit(self, pixels: np.ndarray) -> np.ndarray:
    return pixels

  def image_vectors(self, pictures, batch_size: int) -> np.ndarray:
    assert 0 < len(pictures) <= batch_size
    self.encoded += len(pictures)
    return np.stack([self.vector(p) for p in pictures])

  def vector(self, pixels: np.ndarray) -> np.ndarray:
    if pixels[0, 0].tobytes() in self._bad:
      return np.full(DIM, np.nan, np.float32)
    seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:4], "big")
    return unit_vectors(1, seed)[0]


def unit_vectors(n: int, seed: int, dim: int = DIM) -> np.ndarray:
  """[n, dim] float32."""
  vectors = np.random.default_rng(seed).normal(size=(n, dim))
  return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def about(**changes) -> About:
  return About(**{"model": "m", "digest": "d", "dim": DIM, "generation": "g"} | changes)


def row(identifier: str, **metadata) -> Row:
  return Row(identifier, f"/p/{identifier}", "0" * 64, 1, 2, 3, metadata)


def content(store: Store) -> dict:
  """All that a store holds: id -> (row, vector)."""
  vectors = {}
  for keys, values in store.vectors(DIM):
    vectors |= {key: value.tobytes() for key, value in zip(keys, values, strict=True)}
  return {row.id: (row, vectors[row.key]) for row in store.rows()}
