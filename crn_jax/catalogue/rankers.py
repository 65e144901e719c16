"""The best pictures for a vector: two ways with the same answers.

Milvus Lite visits each row in Python; a matrix in memory takes a fraction of that, whatever the
width. It is mapped from a file beside the rows, so that it is loaded once, not at every start.
"""

import abc
import functools
import json
from collections.abc import Sequence

import numpy as np

from crn_jax.catalogue.store import About, Store
from crn_jax.retrieval import ranking
from crn_jax.workdir import files

# Embedded catalogues of more rows are ranked by the store.
MATRIX_ROWS = 100_000

# Filters whose answers are kept.
_FILTERS = 64

# Below every cosine, and above the score of what is left out.
_LEAST = -2.0

Ranking = list[tuple[str, float]]


class Ranker(abc.ABC):
  """Ranks the pictures of a store by cosine."""

  @abc.abstractmethod
  def rank(self, vectors: np.ndarray, k: int, filters: Sequence[str]) -> list[Ranking]:
    """The k best pictures of each query: (key, cosine), best first.

    Args:
      vectors: [n, dim] float32, of unit length.
      k: how many; fewer if there are fewer.
      filters: n expressions of Milvus; "" for all pictures.

    Raises:
      UserError: a filter is none.
    """


def create(store: Store, about: About, block_size: int) -> Ranker:
  """The ranker for a store: a matrix up to `MATRIX_ROWS` embedded rows, else the store itself."""
  count = store.count()
  if store.embedded and 0 < count <= MATRIX_ROWS:
    return MatrixRanker(store, about, count, block_size)
  return StoreRanker(store)


class StoreRanker(Ranker):
  """The store ranks: for what is too large for one machine."""

  def __init__(self, store: Store):
    self._store = store

  def rank(self, vectors: np.ndarray, k: int, filters: Sequence[str]) -> list[Ranking]:
    found: list[Ranking] = [[] for _ in filters]
    for filter_ in dict.fromkeys(filters):
      rows = [i for i, f in enumerate(filters) if f == filter_]
      for i, best in zip(rows, self._store.search(vectors[rows], k, filter_), strict=True):
        found[i] = best
    return found


class MatrixRanker(Ranker):
  """One matrix of all vectors, ranked by `ranking.top_k`; the store filters."""

  def __init__(self, store: Store, about: About, count: int, block_size: int):
    """Maps the matrix, which is written first where there is none of the store's generation.

    Args:
      store: embedded.
      about: of the store.
      count: of its rows, 1 or more.
      block_size: queries that one program ranks.
    """
    keys, vectors = _load(store, about, count)
    self._keys, self._block_size = keys, block_size
    self._gallery = ranking.Gallery.create(vectors)
    self._positions = functools.lru_cache(_FILTERS)(
      lambda filter_: np.isin(keys, np.asarray(store.matching(filter_), keys.dtype))
    )

  def rank(self, vectors: np.ndarray, k: int, filters: Sequence[str]) -> list[Ranking]:
    masks = [self._positions(f) if f else np.ones(len(self._keys), bool) for f in filters]
    indices, scores = ranking.top_k(
      vectors, self._gallery, k, np.full(len(vectors), -1),
      allowed=np.stack(masks) if any(filters) else None, block_size=self._block_size,
    )  # fmt: skip
    return [
      [(str(self._keys[i]), float(s)) for i, s in zip(row, of_row, strict=True) if s >= _LEAST]
      for row, of_row in zip(indices, scores, strict=True)
    ]


def _load(store: Store, about: About, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Keys [n] and vectors [n, dim], mapped from their file."""
  folder = store.cache / "matrix"
  wanted = {"generation": about.generation, "count": count, "dim": about.dim}
  try:
    there = json.loads((folder / "about.json").read_text()) == wanted
  except (OSError, ValueError):
    there = False
  if not there:
    with files.replacing_folder(folder) as partial:
      partial.mkdir()
      matrix = np.lib.format.open_memmap(
        partial / "vectors.npy", "w+", np.float32, (count, about.dim)
      )
      keys = np.empty(count, "U32")
      start = 0
      for names, vectors in store.vectors(about.dim):
        stop = start + len(names)
        keys[start:stop], matrix[start:stop] = names, vectors
        start = stop
      matrix.flush()
      np.save(partial / "keys.npy", keys)
      (partial / "about.json").write_text(json.dumps(wanted))
  return np.load(folder / "keys.npy"), np.load(folder / "vectors.npy", mmap_mode="r")
