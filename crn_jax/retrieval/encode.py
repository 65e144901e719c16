"""Retrieval vectors of images and queries, every distinct image encoded once.

Maps of reference images are large (7 x 7 x 2048 floats a branch), so queries are composed right
after the batch of images that holds their references, and no map outlives its batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import tqdm

from crn_jax.input_pipeline import images, loader
from crn_jax.input_pipeline.dataset import EvalSplit, ImageStore
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.models.crn import BRANCHES, CRN, Branch
from crn_jax.parallel import AXIS, REPLICATED, SHARDED, DataParallel
from crn_jax.retrieval import ranking


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Unit vectors of both branches joined (`ranking.combine`), [n, 2 * feature_dim] float32.

  Attributes:
    images: one row an image of the split; also the image-only query of a reference.
    composed: one row a query.
    text_only: one row a query, composed of its text and the zero image.
  """

  images: np.ndarray
  composed: np.ndarray
  text_only: np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoder:
  """Compiled per-device encoders; build it once, its programs serve every split and checkpoint.

  Attributes:
    parallel: layout over devices.
    config: the whole configuration.
    zero_maps: variables -> maps of the zero image.
    encode_images: (variables, pictures) -> (maps, joined vectors).
    compose: ((variables, zero maps), maps, rows, tokens, mask) -> joined vectors of composed and
      text-only queries, and the attention of the composed ones by branch.
  """

  parallel: DataParallel
  config: ml_collections.ConfigDict
  zero_maps: Callable
  encode_images: Callable
  compose: Callable

  @classmethod
  def create(cls, crn: CRN, config: ml_collections.ConfigDict, parallel: DataParallel) -> "Encoder":
    """Builds the encoders; `crn` must be built with the axis `parallel.AXIS`.

    Raises:
      ValueError: if eval.batch_size does not split over the devices.
    """
    parallel.check_batch_size(config.eval.batch_size, "eval.batch_size")
    size = config.data.image_size

    def apply(variables, name, method, *args, **kwargs):
      own = {collection: tree[name] for collection, tree in variables.items()}
      return crn.branches[name].apply(own, *args, **kwargs, method=method)

    def gathered(vectors):
      joined = ranking.combine(vectors["local"], vectors["global"])
      return jax.lax.all_gather(joined, AXIS, tiled=True)

    def zero_maps(variables):
      return {n: apply(variables, n, Branch.encode_zero_image, size, size).map for n in BRANCHES}

    def encode_images(variables, pictures):
      pictures = images.normalize(pictures)
      out = {n: apply(variables, n, Branch.encode_image, pictures, train=False) for n in BRANCHES}
      return {n: o.map for n, o in out.items()}, gathered({n: o.vector for n, o in out.items()})

    def compose(constants, maps, rows, tokens, mask):
      variables, zero = constants
      composed, text_only, attention = {}, {}, {}
      for n in BRANCHES:
        words = apply(variables, n, Branch.encode_text, tokens, mask)
        all_maps = jax.lax.all_gather(maps[n], AXIS, tiled=True)
        references = jnp.take(all_maps, rows, axis=0)
        query = apply(variables, n, Branch.compose, references, *words, train=False)
        composed[n] = query.vector
        attention[n] = jax.lax.all_gather(query.attention, AXIS, tiled=True)
        text_only[n] = apply(variables, n, Branch.compose_zero_image, zero[n], *words, train=False)
      return gathered(composed), gathered(text_only), attention

    return cls(
      parallel,
      config,
      parallel.map(zero_maps, REPLICATED),
      parallel.map(encode_images, (SHARDED, REPLICATED)),
      parallel.map(compose, (REPLICATED, REPLICATED, REPLICATED)),
    )

  def encode(self, variables, split: EvalSplit, vocabulary: Vocabulary) -> Encoded:
    """Encodes a split.

    Args:
      variables: {'params', 'batch_stats'}, placed by `parallel.replicate`.
      split: images and queries.
      vocabulary: of the run.
    """
    batch = self.config.eval.batch_size
    tokens, mask = vocabulary.encode_all(split.queries.texts)
    constants = (variables, self.zero_maps(variables))
    n_images, width = len(split.image_paths), 2 * self.config.model.feature_dim
    vectors = ranking.empty_features(n_images, width)
    composed = np.zeros((len(split.queries), width), np.float32)
    text_only = np.zeros_like(composed)
    progress = tqdm.tqdm(total=n_images, desc=f"encode {split.name}", unit="image", leave=False)
    for i, placed in enumerate(self._pictures(split.image_paths, split.store)):
      maps, image_vectors = self.encode_images(variables, placed)
      rows = slice(i * batch, min((i + 1) * batch, n_images))
      vectors[rows] = self.parallel.fetch(image_vectors)[: rows.stop - rows.start]
      due = np.flatnonzero(split.queries.reference // batch == i)
      for start in range(0, len(due), batch):
        queries = due[start : start + batch]
        rows = split.queries.reference[queries] % batch
        out = self._compose(constants, maps, rows, tokens[queries], mask[queries])
        out = self.parallel.fetch(out[:2])
        composed[queries], text_only[queries] = (x[: len(queries)] for x in out)
      progress.update(min(batch, n_images - i * batch))
    progress.close()
    return Encoded(vectors, composed, text_only)

  def attention(
    self, variables, split: EvalSplit, queries: Sequence[int], vocabulary: Vocabulary
  ) -> dict[str, np.ndarray]:
    """Attention of chosen queries, by the programs of `encode`: nothing more is compiled.

    Args:
      variables: {'params', 'batch_stats'}, placed by `parallel.replicate`.
      split: images and queries.
      queries: rows of `split.queries`, one or more.
      vocabulary: of the run.

    Returns:
      branch -> [n, words, h, w] float32; sums to 1 over words (local) or positions (global).
    """
    batch = self.config.eval.batch_size
    queries = np.asarray(queries)
    encoded = [vocabulary.encode(split.queries.texts[q]) for q in queries]
    tokens, mask = (np.stack(part) for part in zip(*encoded, strict=True))
    references = [split.image_paths[r] for r in split.queries.reference[queries]]
    constants = (variables, self.zero_maps(variables))
    found = []
    for i, placed in enumerate(self._pictures(references, split.store)):
      maps, _ = self.encode_images(variables, placed)
      due = slice(i * batch, (i + 1) * batch)
      rows = np.arange(len(queries[due]))
      out = self._compose(constants, maps, rows, tokens[due], mask[due])
      found.append({n: a[: len(rows)] for n, a in self.parallel.fetch(out[2]).items()})
    return {n: np.concatenate([f[n] for f in found]) for n in BRANCHES}

  def _pictures(self, paths: Sequence[str], store: ImageStore | None) -> Iterator:
    """Batches of the images, placed on the devices; the last one is filled up."""
    data = self.config.data
    batches = loader.eval_image_batches(
      paths,
      batch_size=self.config.eval.batch_size,
      image_size=data.image_size,
      resize=data.resize,
      store=store,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    return loader.prefetch_to_device(batches, self.parallel.shard)

  def _compose(self, constants, maps, rows, tokens, mask):
    """Composes up to a batch of queries whose references are `rows` of a batch of maps."""
    # Padded by repetition to the one compiled shape.
    padded = np.resize(np.arange(len(rows)), self.config.eval.batch_size)
    local = np.split(padded, jax.process_count())[jax.process_index()]
    args = (rows[local].astype(np.int32), tokens[local], mask[local])
    return self.compose(constants, maps, *self.parallel.shard(args))
