"""Recall@K and its intervals, from ranks."""

from collections.abc import Iterable, Sequence

import numpy as np

# Rank of a target that is not ranked, because it is outside the gallery or excluded: a miss at
# every cut-off, however small the gallery.
UNRANKED = np.iinfo(np.int64).max

_LEVEL = 95.0  # Share of the bootstrap distribution inside an interval, in percent.


def recall_at_k(ranks: np.ndarray, ks: Iterable[int]) -> dict[int, float]:
  """Share of queries whose target is among the first k of their ranking.

  Args:
    ranks: [q] int, 0-based rank of the target, or `UNRANKED`, as from `target_ranks`.
    ks: cut-offs, e.g. (1, 10, 50).

  Returns:
    {k: percent in [0, 100]} of all queries.

  Raises:
    ValueError: there are no queries.
  """
  ranks = np.asarray(ranks)
  if ranks.size == 0:
    raise ValueError("recall of no queries is undefined: ranks is empty")
  return {k: 100.0 * float(np.mean(ranks < k)) for k in ks}


def recall_interval(
  ranks: Sequence[np.ndarray], k: int, *, draws: int = 10_000
) -> tuple[float, float]:
  """95 % bootstrap interval over queries of a recall, or of the mean of several recalls.

  The number of hits in a resample of n queries, drawn with replacement, is binomial: it is drawn
  as such, which is the same bootstrap without the resampling. Reproducible (fixed seed).

  Args:
    ranks: for each recall of the mean, [q] int 0-based ranks of the targets; resampled separately.
    k: cut-off.
    draws: resamples.

  Returns:
    (low, high) in percent.

  Raises:
    ValueError: there are no queries.
  """
  rng = np.random.default_rng(0)
  means = np.zeros(draws)
  for r in ranks:
    (share,) = recall_at_k(r, [k]).values()
    means += rng.binomial(len(r), share / 100.0, draws) / len(r) / len(ranks)
  low, high = 100.0 * np.quantile(means, [0.5 - _LEVEL / 200.0, 0.5 + _LEVEL / 200.0])
  return float(low), float(high)
