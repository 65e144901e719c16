"""A made-up evaluation, for tests of what is shown: random vectors, no model, no training."""

import pathlib

import numpy as np
from PIL import Image

from configs import default
from crn_jax import evaluate
from crn_jax.input_pipeline.dataset import Dataset, EvalSplit, Triplets
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods.crn import CRN
from crn_jax.reports.cases import Cases
from crn_jax.retrieval.encode import Encoded

CAPTIONS = (("is blue", "has <b>long</b> sleeves"), ("is red",))
IMAGES, QUERIES = 30, 20


def config(preset: str = "crn"):
  c = default.get_config(preset)
  c.name = "made up"
  c.data.update(image_size=32, resize=32, max_words=8, root="nowhere")
  c.eval.recall_at = (1, 10)
  return c


def vocabulary(c) -> Vocabulary:
  words = ("is blue", "has long sleeves")
  return Vocabulary.build(words, markers=c.data.markers, max_words=c.data.max_words)


def split(folder: pathlib.Path, name: str = "dress") -> EvalSplit:
  """Thirty plain images; the last five are in the whole list only. Twenty queries."""
  rng = np.random.default_rng(0)
  (folder / name).mkdir(parents=True)
  paths = [folder / name / f"{i}.png" for i in range(IMAGES)]
  for path in paths:
    Image.new("RGB", (48, 40), tuple(rng.integers(0, 256, 3).tolist())).save(path)
  reference = np.arange(QUERIES, dtype=np.int32)
  return EvalSplit(
    name=name,
    image_ids=tuple(p.stem for p in paths),
    image_paths=tuple(map(str, paths)),
    queries=Triplets(
      reference,
      (reference + 5).astype(np.int32),
      tuple(CAPTIONS[i % 2] for i in range(QUERIES)),
      tuple(("modification", "auxiliary")[i % 2] for i in range(QUERIES)),
    ),
    galleries={"val_split": np.arange(IMAGES - 5), "original_split": np.arange(IMAGES)},
  )


def dataset(*splits: EvalSplit, **facts) -> Dataset:
  category = splits[0].name if len(splits) == 1 else "all"
  return Dataset(f"fashioniq/{category}", None, splits, **facts)


class Encoder:
  """Stands for `encode.Encoder`: vectors of a query near its target for half of the queries."""

  def __init__(self, c):
    self.method = CRN(c, vocab_size=2)

  def encode(self, variables, split, vocabulary) -> Encoded:
    del variables, vocabulary
    rng = np.random.default_rng(1)
    images = rng.normal(size=(len(split.image_paths), 16))
    queries = rng.normal(size=(len(split.queries), 16))
    queries[::2] += 4 * images[split.queries.target[::2]]
    images, queries = (
      (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in (images, queries)
    )
    return Encoded(images, queries, queries[::-1].copy())

  def attention(self, variables, split, queries, vocabulary) -> dict[str, np.ndarray]:
    del variables, split
    grid = (4, 4) if self.method.config.model.keep_map else (1, 1)
    rng = np.random.default_rng(2)
    weights = rng.random((len(queries), vocabulary.max_words, *grid)).astype(np.float32)
    by_position = weights / weights.sum(axis=(2, 3), keepdims=True)
    return {"local": weights / weights.sum(axis=1, keepdims=True), "global": by_position}


def evaluation(c, data: Dataset, step: int = 7, selection: str = "last") -> evaluate.Evaluation:
  return evaluate.evaluate(Encoder(c), None, data, vocabulary(c), step, selection)


def cases(c, data: Dataset, found: evaluate.Evaluation) -> list[Cases]:
  return [evaluate.cases(Encoder(c), None, vocabulary(c), s, found) for s in data.evals]
