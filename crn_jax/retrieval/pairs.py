"""Scores of pairs that no product of vectors gives: a network's pass for every query and image.

Made block by block: some queries on each device with some images, so that what the network holds of
the pairs stays small however many there are and however wide.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from crn_jax.input_pipeline import loader
from crn_jax.methods.base import Method
from crn_jax.parallel import AXIS, REPLICATED, SHARDED, DataParallel, is_primary

# Of a block on each device: queries, images at most, and bytes of a vector for each pair, of which
# the network holds a few at a time. What depends on one of a pair is done once a block.
_QUERIES = 32
_MAX_IMAGES = 256
_BYTES = 2**25

# Blocks that the devices are given beyond the one that is waited for.
_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class PairScores:
  """Compiled programs of fixed shapes; built once, they serve every split and checkpoint.

  Attributes:
    parallel: layout over devices.
    images: number of images of a block.
    ask: "composed", "text_only" -> ((variables, constants), vectors of references, tokens, mask) ->
      what is known of queries, spread over the devices.
    score: ((variables, vectors of all images, first of a block), what is known of queries) ->
      [queries, images of the block].
  """

  parallel: DataParallel
  images: int
  ask: Mapping[str, Callable]
  score: Callable

  @classmethod
  def create(cls, method: Method, parallel: DataParallel) -> "PairScores":
    """Builds the programs of a method that has `scores_pairs`."""
    images = min(max(1, _BYTES // (4 * method.vector_dim * _QUERIES)), _MAX_IMAGES)

    def composed(shared, references, tokens, mask):
      return method.pair_query(*shared, references, tokens, mask)

    def text_only(shared, references, tokens, mask):
      del references
      return method.pair_query(*shared, None, tokens, mask)

    def score(shared, queries):
      variables, vectors, first = shared
      block = jax.lax.dynamic_slice_in_dim(vectors, first, images)
      scores = method.pair_scores(variables, queries, block)
      return jax.lax.all_gather(scores, AXIS, tiled=True)

    ask = {"composed": composed, "text_only": text_only}
    return cls(
      parallel,
      images,
      {kind: parallel.map(method.precise(program), SHARDED) for kind, program in ask.items()},
      parallel.map(method.precise(score), REPLICATED),
    )

  def compute(
    self, kind: str, shared: Any, images: np.ndarray, queries: tuple, rows: np.ndarray
  ) -> np.ndarray:
    """Scores of queries with all images; with several processes, called by all alike.

    Args:
      kind: of the queries, a key of `ask`.
      shared: (variables, constants), placed by `parallel.replicate`.
      images: [n, vector_dim] vectors.
      queries: of all queries the reference [q], rows of the images; tokens and mask [q, words].
      rows: [r] those of the queries that are meant.

    Returns:
      [r, n] float32.
    """
    variables, _ = shared
    reference, tokens, mask = queries
    step = _QUERIES * len(self.parallel.devices)
    # Padded by repetition to blocks of one compiled shape, as are queries below.
    n_padded = -(-len(images) // self.images) * self.images
    placed = self.parallel.replicate(images[np.resize(np.arange(len(images)), n_padded)])

    def start(block):
      """A block: the rows and columns that it fills, device array."""
      at, first, known = block
      columns = slice(first, min(first + self.images, len(images)))
      place = self.parallel.replicate(np.int32(first))
      return at, columns, self.score((variables, placed, place), known)

    def blocks():
      for first in range(0, len(rows), step):
        at = slice(first, min(first + step, len(rows)))
        padded = np.resize(rows[at], step)
        local = np.split(padded, jax.process_count())[jax.process_index()]
        asked = self.parallel.shard((images[reference[local]], tokens[local], mask[local]))
        known = self.ask[kind](shared, *asked)
        yield from ((at, column, known) for column in range(0, len(images), self.images))

    scores = np.empty((len(rows), len(images)), np.float32)
    progress = tqdm.tqdm(
      total=len(rows), desc=f"pairs, {kind}", unit="query", leave=False,
      disable=None if is_primary() else True,
    )  # fmt: skip
    for at, columns, values in loader.under_way(blocks(), start, _AHEAD):
      found = self.parallel.fetch(values)
      scores[at, columns] = found[: at.stop - at.start, : columns.stop - columns.start]
      if columns.stop == len(images):
        progress.update(at.stop - at.start)
    progress.close()
    return scores
