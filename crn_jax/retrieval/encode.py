"""Retrieval vectors of images and queries, every distinct image encoded once.

Maps of reference images are large (7 x 7 x 2048 floats a branch), so queries are composed right
after the batch of images that holds their references, and no map outlives its batch. Vectors are
fetched a batch later, so that the device need not wait.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from crn_jax.input_pipeline import images, loader
from crn_jax.input_pipeline.dataset import EvalSplit, ImageStore
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.methods.base import Method, QueryVectors
from crn_jax.parallel import AXIS, REPLICATED, SHARDED, DataParallel, is_primary
from crn_jax.retrieval import ranking
from crn_jax.retrieval.pairs import PairScores

# Batches that the device is given beyond the one whose vectors are fetched.
AHEAD = 1


def picture_sizing(method: Method) -> images.Sizing:
  """How the pictures of a method are brought to its size: the one place that says it."""
  data, preprocessing = method.config.data, method.preprocessing
  return images.Sizing(
    data.image_size, data.resize, preprocessing.interpolation, data.max_ratio, preprocessing.squeeze
  )


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Unit vectors of a split, [n, vector_dim] float32, and what is added to their products.

  Attributes:
    images: one row an image of the split; also the image-only query of a reference.
    composed: one row a query.
    text_only: one row a query, of its text alone.
    added: "composed", "text_only" -> what is added to the products of such queries with images:
      rows of the split's queries [r] -> [r, images] float32, computed when asked for, by all
      processes together. Empty for a method that ranks by vectors alone.
  """

  images: np.ndarray
  composed: np.ndarray
  text_only: np.ndarray
  added: Mapping[str, Callable[[np.ndarray], np.ndarray]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Compiled per-device encoders; build it once, its programs serve every split and checkpoint.

  Attributes:
    parallel: layout over devices.
    method: built with the axis `parallel.AXIS`.
    constants: variables -> what all queries share.
    encode_images: (variables, pictures) -> (what composing needs of references, vectors).
    compose: ((variables, constants), references, rows, tokens, mask) -> `QueryVectors`.
    pairs: programs of the method's scores of pairs; None if it has none.
  """

  parallel: DataParallel
  method: Method
  constants: Callable
  encode_images: Callable
  compose: Callable
  pairs: PairScores | None = None

  @classmethod
  def create(cls, method: Method, parallel: DataParallel) -> "Encoder":
    """Builds the encoders.

    Raises:
      UserError: if eval.batch_size does not split over the devices.
    """
    parallel.check_batch_size(method.config.eval.batch_size, "eval.batch_size")

    def gathered(tree):
      return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)

    def encode_images(variables, pictures):
      references, vectors = method.encode_images(
        variables, method.preprocessing.normalize(pictures)
      )
      return references, gathered(vectors)

    def compose(shared, references, rows, tokens, mask):
      variables, constants = shared
      wanted = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), gathered(references))
      return gathered(method.compose(variables, constants, wanted, tokens, mask))

    return cls(
      parallel,
      method,
      parallel.map(method.precise(method.constants), REPLICATED),
      parallel.map(method.precise(encode_images), (SHARDED, REPLICATED)),
      parallel.map(method.precise(compose), REPLICATED),
      PairScores.create(method, parallel) if method.scores_pairs else None,
    )

  def encode(self, variables, split: EvalSplit, vocabulary: Tokenizer) -> Encoded:
    """Encodes a split.

    Args:
      variables: {'params', 'batch_stats'}, placed by `parallel.replicate`.
      split: images and queries.
      vocabulary: of the run.
    """
    batch = self.method.config.eval.batch_size
    tokens, mask = vocabulary.encode_all(split.queries.texts)
    shared = (variables, self.constants(variables))
    n_images, width = len(split.image_paths), self.method.vector_dim
    vectors = ranking.empty_features(n_images, width)
    composed = np.zeros((len(split.queries), width), np.float32)
    text_only = np.zeros_like(composed)
    progress = tqdm.tqdm(
      total=n_images, desc=f"encode {split.name}", unit="image", leave=False,
      disable=None if is_primary() else True,  # None: a log file needs no animation.
    )  # fmt: skip

    def start(numbered):
      """A batch of images, with its queries: [(array to fill, rows, device array)]."""
      i, placed = numbered
      references, image_vectors = self.encode_images(variables, placed)
      started = [(vectors, np.arange(i * batch, min((i + 1) * batch, n_images)), image_vectors)]
      due = np.flatnonzero(split.queries.reference // batch == i)
      for first in range(0, len(due), batch):
        queries = due[first : first + batch]
        rows = split.queries.reference[queries] % batch
        out = self._compose(shared, references, rows, tokens[queries], mask[queries])
        started += [(composed, queries, out.composed), (text_only, queries, out.text_only)]
      return started

    placed = enumerate(self._pictures(split.image_paths, split.store))
    for started in loader.under_way(placed, start, AHEAD):
      for array, rows, values in started:
        array[rows] = self.parallel.fetch(values)[: len(rows)]
      progress.update(min(batch, n_images - progress.n))
    progress.close()
    added = {}
    if self.pairs is not None:
      asked = (split.queries.reference, tokens, mask)
      added = {
        kind: functools.partial(self.pairs.compute, kind, shared, vectors, asked)
        for kind in self.pairs.ask
      }
    return Encoded(vectors, composed, text_only, added)

  def attention(
    self, variables, split: EvalSplit, queries: Sequence[int], vocabulary: Tokenizer
  ) -> dict[str, np.ndarray]:
    """Attention of chosen queries, by the programs of `encode`: nothing more is compiled.

    Args:
      variables: {'params', 'batch_stats'}, placed by `parallel.replicate`.
      split: images and queries.
      queries: rows of `split.queries`, one or more.
      vocabulary: of the run.

    Returns:
      part -> [n, words, h, w] float32; empty for a method without attention.
    """
    batch = self.method.config.eval.batch_size
    queries = np.asarray(queries)
    encoded = [vocabulary.encode(split.queries.texts[q]) for q in queries]
    tokens, mask = (np.stack(part) for part in zip(*encoded, strict=True))
    paths = [split.image_paths[r] for r in split.queries.reference[queries]]
    shared = (variables, self.constants(variables))
    found = []
    for i, placed in enumerate(self._pictures(paths, split.store)):
      references, _ = self.encode_images(variables, placed)
      due = slice(i * batch, (i + 1) * batch)
      rows = np.arange(len(queries[due]))
      out = self._compose(shared, references, rows, tokens[due], mask[due])
      found.append({n: a[: len(rows)] for n, a in self.parallel.fetch(out.attention).items()})
    return {n: np.concatenate([f[n] for f in found]) for n in found[0]}

  def _pictures(self, paths: Sequence[str], store: ImageStore | None) -> Iterator:
    """Batches of the images, placed on the devices; the last one is filled up."""
    batches = loader.eval_image_batches(
      paths,
      batch_size=self.method.config.eval.batch_size,
      sizing=picture_sizing(self.method),
      store=store,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    return loader.under_way(batches, self.parallel.shard)

  def _compose(self, shared, references, rows, tokens, mask) -> QueryVectors:
    """Composes up to a batch of queries whose references are `rows` of a batch of images."""
    # Padded by repetition to the one compiled shape.
    padded = np.resize(np.arange(len(rows)), self.method.config.eval.batch_size)
    local = np.split(padded, jax.process_count())[jax.process_index()]
    args = (rows[local].astype(np.int32), tokens[local], mask[local])
    return self.compose(shared, references, *self.parallel.shard(args))
