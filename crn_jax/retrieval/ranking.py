"""Retrieval by dot product: ranks of the targets, the first k.

A target's rank is a count, not a position in a sorted list: the number of gallery items that score
above it. That costs little more than the score product, and blocks of queries keep memory at
block_size x gallery floats. It is the evaluation of the PyTorch release of CRN ("Composed Image
Retrieval via Cross Relation Network with Hierarchical Aggregation Transformer", IEEE TIP 2023),
except that equal scores have a defined order: the earlier gallery position comes first.

What no product of vectors can say of a query and an item may be given as `added`: scores that are
added to the products before anything is ranked. Features are compared in float32. Nothing here
knows what a query or a gallery item is.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from crn_jax.retrieval.metrics import UNRANKED

Array = jax.Array | np.ndarray

# What the release writes over the score of a query's own reference image.
EXCLUDED_SCORE = -1e11

# Queries scored at a time, and scores of each that are counted at a time.
BLOCK_SIZE = 256
_COUNT_WIDTH = 1024

# Bytes to which XLA wants the arrays of a CPU aligned.
_ALIGNMENT = 64


def empty_features(n: int, d: int) -> np.ndarray:
  """[n, d] float32, not initialised, so aligned that a CPU device uses it without a copy."""
  size = 4 * n * d
  memory = np.empty(size + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + size].view(np.float32).reshape(n, d)


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Features of a gallery that is asked many times: checked and moved to the device once.

  Attributes:
    features: [g, d] float32, finite.
  """

  features: jax.Array

  @classmethod
  def create(cls, features: Array) -> "Gallery":
    """Checks features [g, d] and moves them.

    Raises:
      ValueError: a wrong shape, no rows, or features that are not finite.
    """
    if features.ndim != 2 or len(features) == 0:
      raise ValueError(f"expected a gallery [g, d] with rows, got {features.shape}")
    # jnp.asarray would copy twice.
    return cls(jax.device_put(_finite("gallery", features)))


def target_ranks(
  queries: Array,
  gallery: Array,
  target: Array | Sequence[int],
  exclude: Array | Sequence[int],
  *,
  labels: Array | Sequence[int] | None = None,
  added: Array | None = None,
  block_size: int = BLOCK_SIZE,
) -> np.ndarray:
  """Rank of every query's target in the gallery by descending dot product.

  rank = #(items scoring above the target) + #(items scoring the same at an earlier position), which
  is where a stable sort would put it. The excluded item never counts. Where several items are
  targets, because they share a label, the rank is that of the first of them.

  Args:
    queries: [q, d] query features.
    gallery: [g, d] gallery features; moved to the device once (see `empty_features`).
    target: [q] int, gallery position of the target, -1 if it is not in the gallery. With `labels`,
      the label of the targets instead, -1 or a label that no item has if there is none.
    exclude: [q] int, gallery position to leave out (the reference image), -1 for none.
    labels: [g] int, 0 or greater; every item with the label `target` is a target (Fashion200k: the
      images of one caption).
    added: [q, g] float32 added to the products; None adds nothing.
    block_size: queries scored at a time. One program is compiled per (block_size, g, d); the last
      block is padded.

  Returns:
    [q] int64, 0-based; `metrics.UNRANKED` where no target is in the gallery, or where the only one
    is itself excluded.

  Raises:
    ValueError: wrong shapes, an empty gallery, positions outside the gallery, or features that are
      not finite (the message names the matrix and the row).
  """
  queries, gallery = _checked_features(queries, gallery)
  n_gallery = len(gallery)
  if labels is None:
    target = _checked_positions("target", target, len(queries), n_gallery)
    labels = np.arange(n_gallery)
  else:
    target, labels = _checked_labels(target, labels, len(queries), n_gallery)
  exclude = _checked_positions("exclude", exclude, len(queries), n_gallery)
  given = (queries, target, exclude)
  if added is not None:
    given += (_checked_added(added, len(queries), n_gallery),)
  targets_of = _positions_by_label(labels)
  ranks = np.empty(len(queries), np.int64)
  for rows, (block, t, e, *more) in _blocks(given, block_size):
    found = _rank_block(block, gallery, targets_of(t), e, *more)
    ranks[rows] = np.asarray(found)[: rows.stop - rows.start]
  return np.where(ranks < 0, UNRANKED, ranks)


def top_k(
  queries: Array,
  gallery: Array | Gallery,
  k: int,
  exclude: Array | Sequence[int],
  *,
  allowed: Array | None = None,
  added: Array | None = None,
  block_size: int = BLOCK_SIZE,
) -> tuple[np.ndarray, np.ndarray]:
  """The k best gallery items of every query, best first; equal scores in gallery order.

  Args:
    queries: [q, d] query features.
    gallery: [g, d] gallery features.
    k: how many; at most g are returned.
    exclude: [q] int, gallery position to leave out, -1 for none. It scores EXCLUDED_SCORE, so it
      shows up, last, only when more is asked for than there is beside it.
    allowed: [q, g] bool, False where an item is left out like an excluded one; None allows all.
    added: as in `target_ranks`.
    block_size: queries scored at a time, as in `target_ranks`.

  Returns:
    (indices, scores): [q, min(k, g)] int64 gallery positions and [q, min(k, g)] float32.

  Raises:
    ValueError: as `target_ranks`, or k < 1.
  """
  if k < 1:
    raise ValueError(f"k must be at least 1, got {k}")
  queries, gallery = _checked_features(queries, gallery)
  exclude = _checked_positions("exclude", exclude, len(queries), len(gallery))
  optional = {}
  if allowed is not None:
    allowed = np.asarray(allowed)
    if allowed.shape != (len(queries), len(gallery)) or allowed.dtype != bool:
      raise ValueError(
        f"allowed: expected bool [{len(queries)}, {len(gallery)}], got {allowed.dtype} "
        f"{list(allowed.shape)}"
      )
    optional["allowed"] = allowed
  if added is not None:
    optional["added"] = _checked_added(added, len(queries), len(gallery))
  k = min(k, len(gallery))
  indices = np.empty((len(queries), k), np.int64)
  scores = np.empty((len(queries), k), np.float32)
  for rows, (block, e, *more) in _blocks((queries, exclude, *optional.values()), block_size):
    named = dict(zip(optional, more, strict=True))
    best_scores, best = _top_k_block(block, gallery, e, **named, k=k)
    indices[rows] = np.asarray(best)[: rows.stop - rows.start]
    scores[rows] = np.asarray(best_scores)[: rows.stop - rows.start]
  return indices, scores


def subset_order(
  queries: np.ndarray, items: np.ndarray, subsets: np.ndarray, added: np.ndarray | None = None
) -> np.ndarray:
  """Rankings of a few items of its own for every query, by descending dot product.

  Args:
    queries: [q, d] query features.
    items: [n, d] item features.
    subsets: [q, m] int rows of items, -1 for none.
    added: [q, n] float32 added to the products; None adds nothing.

  Returns:
    [q, m] int, the rows best first, equal scores in their order; -1 stands last.
  """
  queries, items = np.asarray(queries, np.float32), np.asarray(items, np.float32)
  scores = np.empty(subsets.shape, np.float32)
  for start in range(0, len(queries), BLOCK_SIZE):
    rows = slice(start, start + BLOCK_SIZE)
    # A sum of its own for each pair, so that equal items score the same.
    np.einsum("qd,qmd->qm", queries[rows], items[subsets[rows]], out=scores[rows])
  if added is not None:
    scores += np.take_along_axis(added, subsets, axis=1)  # -1 takes what is not ranked below.
  scores[subsets < 0] = -np.inf
  order = np.lexsort((subsets, -scores), axis=1)
  return np.take_along_axis(subsets, order, axis=1)


@jax.jit
def _rank_block(queries, gallery, targets, exclude, added=None):
  # (block, g); the only large value, read once by the count.
  scores = _scores(queries, gallery, added)
  n_gallery = gallery.shape[0]
  exclude = exclude[:, None]
  # Taken from the same product as all others: a dot product of its own could differ in the last bit
  # and put the target before or behind itself.
  target_scores = jnp.take_along_axis(scores, jnp.maximum(targets, 0), axis=1)  # (block, m)
  ranked = (targets >= 0) & (targets != exclude)
  target_scores = jnp.where(ranked, target_scores, -jnp.inf)
  best = jnp.max(target_scores, axis=1, keepdims=True)
  is_best = (target_scores == best) & ranked
  first = jnp.min(jnp.where(is_best, targets, n_gallery), axis=1, keepdims=True)

  def count(i, rank):
    # The last piece starts early to be as wide as the others: what it repeats is masked.
    start = jnp.minimum(i * width, n_gallery - width)
    piece = jax.lax.dynamic_slice_in_dim(scores, start, width, axis=1)
    column = start + jnp.arange(width, dtype=jnp.int32)[None, :]
    ahead = (piece > best) | ((piece == best) & (column < first))
    counted = ahead & (column != exclude) & (column >= i * width)
    return rank + jnp.sum(counted, axis=1, dtype=jnp.int32)

  # By pieces, as XLA would store what a sum runs over in a second array of the size of `scores`.
  width = min(_COUNT_WIDTH, n_gallery)
  rank = jax.lax.fori_loop(0, -(-n_gallery // width), count, jnp.zeros(len(queries), jnp.int32))
  return jnp.where(first[:, 0] == n_gallery, -1, rank)


@functools.partial(jax.jit, static_argnames="k")
def _top_k_block(queries, gallery, exclude, allowed=None, added=None, *, k):
  scores = _scores(queries, gallery, added)
  column = jnp.arange(gallery.shape[0], dtype=jnp.int32)[None, :]
  left_out = column == exclude[:, None]
  if allowed is not None:
    left_out |= ~allowed
  return jax.lax.top_k(jnp.where(left_out, EXCLUDED_SCORE, scores), k)


def _scores(queries, gallery, added):
  # Default precision is TF32 or bfloat16 on accelerators, which reorders close neighbours.
  products = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)
  return products if added is None else products + added


def _positions_by_label(labels: np.ndarray):
  """[n] labels -> [n, m] int32 positions of the items that have them, -1 for none."""
  order = np.argsort(labels, kind="stable").astype(np.int32)
  in_order = labels[order]
  _, counts = np.unique(in_order, return_counts=True)
  place = np.arange(counts.max())

  def positions(wanted):
    start = np.searchsorted(in_order, wanted)
    count = np.searchsorted(in_order, wanted, side="right") - start
    rows = np.minimum(start[:, None] + place, len(order) - 1)
    return np.where(place < count[:, None], order[rows], np.int32(-1))

  return positions


def _blocks(
  arrays: tuple[np.ndarray, ...], block_size: int
) -> Iterator[tuple[slice, tuple[np.ndarray, ...]]]:
  """Yields (rows, blocks of block_size rows); the last blocks are filled up with zeros."""
  if block_size < 1:
    raise ValueError(f"block_size must be at least 1, got {block_size}")
  n = len(arrays[0])
  for start in range(0, n, block_size):
    rows = slice(start, min(start + block_size, n))
    pad = start + block_size - rows.stop
    yield rows, tuple(np.pad(a[rows], ((0, pad),) + ((0, 0),) * (a.ndim - 1)) for a in arrays)


def _checked_features(queries: Array, gallery: Array | Gallery) -> tuple[np.ndarray, jax.Array]:
  """Both in float32: queries on the host, from where blocks leave; gallery on the device."""
  checked = gallery if isinstance(gallery, Gallery) else None
  features = checked.features if checked else gallery
  if queries.ndim != 2 or features.ndim != 2 or queries.shape[1] != features.shape[1]:
    raise ValueError(
      f"expected queries [q, d] and gallery [g, d], got {queries.shape} and {features.shape}"
    )
  if len(features) == 0:
    raise ValueError("the gallery is empty")
  return _finite("queries", queries), (checked or Gallery.create(gallery)).features


def _checked_added(added: Array, n_queries: int, n_gallery: int) -> np.ndarray:
  if added.shape != (n_queries, n_gallery):
    raise ValueError(f"added: expected [{n_queries}, {n_gallery}], got {list(added.shape)}")
  return _finite("added", added)


def _finite(name: str, features: Array) -> np.ndarray:
  """Features in float32 on the host, of which all rows are finite."""
  features = np.asarray(features, dtype=np.float32)
  finite = _finite_rows(features)
  bad = np.flatnonzero(~finite)
  if bad.size:
    raise ValueError(
      f"{name}: {bad.size} of {len(finite)} rows are not finite in float32, first row {bad[0]}"
    )
  return features


def _finite_rows(features: np.ndarray) -> np.ndarray:
  # By blocks: a mask of the whole matrix would be a quarter of its size.
  finite = np.zeros(len(features), bool)
  for start in range(0, len(features), BLOCK_SIZE):
    rows = slice(start, start + BLOCK_SIZE)
    finite[rows] = np.isfinite(features[rows]).all(axis=1)
  return finite


def _checked_positions(name: str, positions, n_queries: int, n_gallery: int) -> np.ndarray:
  positions = np.asarray(positions)
  if positions.shape != (n_queries,):
    raise ValueError(f"{name}: expected shape ({n_queries},), got {positions.shape}")
  if n_queries and not np.issubdtype(positions.dtype, np.integer):
    raise ValueError(f"{name}: expected integers, got {positions.dtype}")
  bad = np.flatnonzero((positions < -1) | (positions >= n_gallery))
  if bad.size:
    raise ValueError(
      f"{name}: expected -1 or a position in a gallery of {n_gallery}, "
      f"got {positions[bad[0]]} at query {bad[0]}"
    )
  return positions.astype(np.int32)


def _checked_labels(target, labels, n_queries: int, n_gallery: int):
  target, labels = np.asarray(target), np.asarray(labels)
  for name, values, n in (("target", target, n_queries), ("labels", labels, n_gallery)):
    if values.shape != (n,):
      raise ValueError(f"{name}: expected shape ({n},), got {values.shape}")
    if n and not np.issubdtype(values.dtype, np.integer):
      raise ValueError(f"{name}: expected integers, got {values.dtype}")
  if labels.min() < 0:
    raise ValueError(f"labels: expected 0 or greater, got {labels.min()}")
  return target.astype(np.int32), labels.astype(np.int32)
