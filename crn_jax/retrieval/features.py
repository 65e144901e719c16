"""Features of frozen towers: of every image and text of a data set once, and queries made of them.

Features are kept on disk (`kept_features`). The program holds the tables alone: four bytes a value,
140 MB for FashionIQ's 46,000 training images at a width of 768.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from crn_jax.input_pipeline import loader
from crn_jax.input_pipeline.dataset import Dataset, EvalSplit, ImageStore, TripletSource
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.methods import losses
from crn_jax.methods.features import FeatureMethod, half
from crn_jax.parallel import AXIS, REPLICATED, DataParallel
from crn_jax.retrieval import kept_features, ranking
from crn_jax.retrieval.encode import AHEAD, Encoded, picture_sizing
from crn_jax.retrieval.kept_features import KeptFeatures

Text = tuple[str, ...]  # The captions of one query.


@dataclasses.dataclass(frozen=True)
class TrainFeatures:
  """Features of the training data, float32.

  Attributes:
    images: [images, d], a row an image of the split.
    texts: [texts, d], or None if the text tower is not frozen.
    text_rows: text -> its row; every text that an epoch may draw.
  """

  images: np.ndarray
  texts: np.ndarray | None
  text_rows: Mapping[Text, int]


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
  """Features of a split, float32.

  Attributes:
    images: [images, d], a row an image of the split.
    texts: [queries, d], or None if the text tower is not frozen.
  """

  images: np.ndarray
  texts: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Features:
  """Features of a data set.

  Attributes:
    train: None if the training data were not read.
    evals: by the splits' names.
  """

  train: TrainFeatures | None
  evals: Mapping[str, SplitFeatures]


def digests(method: FeatureMethod, towers: dict) -> dict[str, str]:
  """'image', 'text' -> digest of a frozen tower's weights, of the parameters of both."""
  return {kind: kept_features.digest(half(towers, kind)) for kind in method.frozen}


def compute(
  method: FeatureMethod,
  towers: dict,
  weights: Mapping[str, str],
  parallel: DataParallel,
  dataset: Dataset,
  tokenizer: Tokenizer,
) -> Features:
  """Computes the features that are not kept yet in `config.data.features`, with progress bars.

  Args:
    method: says which towers are frozen.
    towers: their parameters.
    weights: the towers' `digests`.
    parallel: layout over devices.
    dataset: what is trained on, or evaluated only.
    tokenizer: of the towers.

  Raises:
    UserError: an image that cannot be decoded; a folder of features that was changed.
  """
  frozen = _Frozen.create(method, towers, weights, parallel, tokenizer)
  of_texts = "text" in method.frozen
  train = None
  if dataset.train is not None:
    config, split = method.config, dataset.train
    texts = drawn_texts(split.triplets, config.seed, config.num_epochs) if of_texts else ()
    train = TrainFeatures(
      frozen.images(split.image_paths, split.store, "train"),
      frozen.texts(texts, "train") if of_texts else None,
      {text: row for row, text in enumerate(texts)},
    )
  evals = {
    split.name: SplitFeatures(
      frozen.images(split.image_paths, split.store, split.name),
      frozen.texts(split.queries.texts, split.name) if of_texts else None,
    )
    for split in dataset.evals
  }
  return Features(train, evals)


def place(features: TrainFeatures, parallel: DataParallel) -> dict[str, jax.Array]:
  """The tables of the training data spread over the devices, see `methods.features.TABLES`."""
  tables = {
    "images": features.images,
    "counts": np.ones(len(features.images), bool),
    "texts": features.texts,
  }
  return {
    name: parallel.shard(_own_rows(table, len(parallel.devices)))
    for name, table in tables.items()
    if table is not None
  }


def _own_rows(table: np.ndarray, n_devices: int) -> np.ndarray:
  """This process's rows of a table filled up with zeros to a multiple of the devices."""
  filled = np.zeros((-(-len(table) // n_devices) * n_devices, *table.shape[1:]), table.dtype)
  filled[: len(table)] = table
  return np.split(filled, jax.process_count())[jax.process_index()]


def drawn_texts(triplets: TripletSource, seed: int, epochs: int) -> tuple[Text, ...]:
  """Every text that training draws, in the order of first appearance: with more epochs, more come
  behind, and what is kept stays of use."""
  texts, before = {}, None
  for epoch in range(epochs):
    drawn = triplets.draw(seed, epoch)
    if drawn is before:  # The same in every epoch.
      break
    texts.update(dict.fromkeys(drawn.texts))
    before = drawn
  return tuple(texts)


@dataclasses.dataclass(frozen=True)
class _Frozen:
  """Compiled towers, and where their features are kept.

  Attributes:
    method, parallel, tokenizer: as of `compute`.
    placed: kind -> parameters on the devices.
    encode: kind -> (parameters, rows of pictures or of ids) -> features, on all devices.
    kept: kind -> what is on disk.
  """

  method: FeatureMethod
  parallel: DataParallel
  tokenizer: Tokenizer
  placed: Mapping[str, Any]
  encode: Mapping[str, Callable]
  kept: Mapping[str, KeptFeatures]

  @classmethod
  def create(cls, method, towers, weights, parallel, tokenizer) -> "_Frozen":
    """Arguments as of `compute`."""
    config, description = method.config, method.encoder_config
    preprocessing, sizing = method.preprocessing, picture_sizing(method)
    pictures = [sizing.resize, sizing.image_size, sizing.max_ratio, sizing.interpolation]
    facts = {
      "image": {
        # Without a word where nothing is squeezed, as older features have it.
        "pictures": [*pictures, "squeezed"] if sizing.squeeze else pictures,
        "normalised": [preprocessing.mean, preprocessing.std],
      },
      "text": {},
    }
    halves = {kind: half(towers, kind) for kind in method.frozen}
    kept = {
      kind: KeptFeatures.of(
        config.data.features,
        facts[kind] | {
          "kind": kind,
          "weights": weights[kind],
          "tower": dataclasses.asdict(getattr(description, kind)),
          "dtype": method.numerics,
        },
        method.vector_dim,
      )
      for kind in halves
    }  # fmt: skip

    def encoder(kind):
      prepare = {"image": preprocessing.normalize, "text": lambda ids: ids}[kind]
      return lambda params, rows: _gathered(method.features(kind, params, prepare(rows)))

    encode = {kind: parallel.map(method.precise(encoder(kind)), REPLICATED) for kind in halves}
    placed = {kind: parallel.replicate(params) for kind, params in halves.items()}
    return cls(method, parallel, tokenizer, placed, encode, kept)

  def images(self, paths: Sequence[str], store: ImageStore | None, show: str) -> np.ndarray:
    """[images, d] features of image files."""
    config = self.method.config

    def batches(first, last):
      return loader.eval_image_batches(
        paths[first:last],
        batch_size=config.eval.batch_size,
        sizing=picture_sizing(self.method),
        store=store,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )

    keys = [kept_features.image_key(path) for path in paths]
    return self._rows("image", keys, batches, show)

  def texts(self, texts: Sequence[Text], show: str) -> np.ndarray:
    """[texts, d] features of texts."""
    ids, _ = self.tokenizer.encode_all(texts)
    batch = self.method.config.eval.batch_size

    def batches(first, last):
      for start in range(first, last, batch):
        rows = np.resize(np.arange(start, min(start + batch, last)), batch)  # One compiled shape.
        yield ids[np.split(rows, jax.process_count())[jax.process_index()]]

    return self._rows("text", [row.tobytes().hex() for row in ids], batches, show)

  def _rows(self, kind: str, keys: Sequence[str], batches: Callable, show: str) -> np.ndarray:
    def compute(first, last):
      placed = loader.under_way(batches(first, last), self.parallel.shard)
      encode = functools.partial(self.encode[kind], self.placed[kind])
      encoded = loader.under_way(placed, encode, AHEAD)
      found = [self.parallel.fetch(features) for features in encoded]
      return np.concatenate(found)[: last - first]

    return self.kept[kind].rows(kind, keys, compute, show)


def _gathered(tree):
  return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)


@dataclasses.dataclass(frozen=True)
class FeatureEncoder:
  """As `encode.Encoder`, of kept features.

  Attributes:
    parallel: layout over devices.
    method: built with the axis `parallel.AXIS`.
    features: of the data set.
    compose: (variables, references, texts) -> `QueryVectors`, see `compose_features`.
  """

  parallel: DataParallel
  method: FeatureMethod
  features: Features
  compose: Callable

  @classmethod
  def create(
    cls, method: FeatureMethod, parallel: DataParallel, features: Features
  ) -> "FeatureEncoder":
    """Builds the encoder.

    Raises:
      UserError: if eval.batch_size does not split over the devices.
    """
    parallel.check_batch_size(method.config.eval.batch_size, "eval.batch_size")

    def compose(variables, references, texts):
      return _gathered(method.compose_features(variables, references, texts))

    return cls(parallel, method, features, parallel.map(method.precise(compose), REPLICATED))

  def encode(self, variables, split: EvalSplit, vocabulary: Tokenizer) -> Encoded:
    """See `Encoder.encode`."""
    features, batch = self.features.evals[split.name], self.method.config.eval.batch_size
    tokens, _ = vocabulary.encode_all(split.queries.texts)
    texts = tokens if features.texts is None else features.texts
    n, width = len(split.queries), self.method.vector_dim
    composed, text_only = np.zeros((n, width), np.float32), np.zeros((n, width), np.float32)

    def start(first):
      due = np.arange(first, min(first + batch, n))
      # Padded by repetition to the one compiled shape.
      local = np.split(np.resize(due, batch), jax.process_count())[jax.process_index()]
      rows = (features.images[split.queries.reference[local]], texts[local])
      out = self.compose(variables, *self.parallel.shard(rows))
      return due, (out.composed, out.text_only)

    for due, values in loader.under_way(range(0, n, batch), start, AHEAD):
      composed[due], text_only[due] = (v[: len(due)] for v in self.parallel.fetch(values))
    images = ranking.empty_features(*features.images.shape)
    images[:] = losses.normalize(features.images)
    return Encoded(images, composed, text_only)

  def attention(self, variables, split, queries, vocabulary) -> dict[str, np.ndarray]:
    """Features have no positions to attend to."""
    del variables, split, queries, vocabulary
    return {}
