"""Recall@K, recall within a subset, mean average precision, and their intervals.

A metric's name says what it is: "R@10", "Rsub@1" (recall within the query's subset), "mean" (of
`_MEAN`), "mAP@5". All are means over queries, in percent.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

# Rank of a target that is not ranked, because it is outside the gallery or excluded: a miss at
# every cut-off, however small the gallery.
UNRANKED = np.iinfo(np.int64).max

# Cut-offs of CIRR within subsets and of CIRCO.
SUBSET_CUTS = (1, 2, 3)
PRECISION_CUTS = (5, 10, 25, 50)

# What CIRR's papers average.
_MEAN = ("R@5", "Rsub@1")

# Of all metrics, in the order in which they are shown.
_FAMILIES = ("R", "Rsub", "mean", "mAP")

_LEVEL = 95.0  # Share of the bootstrap distribution inside an interval, in percent.


@dataclasses.dataclass(frozen=True, eq=False)  # Arrays: compared by identity.
class Outcome:
  """What queries found in a ranking.

  Attributes:
    ranks: [q] int, 0-based rank of the target in the gallery, or `UNRANKED`.
    subset_ranks: [q] int, that within the query's subset; None if there are none.
    hits: [q, k] bool, whether each of the first k images of the ranking is a right one; None if
      every query has one right image.
    n_truths: [q] int, number of right images; None with `hits`.
  """

  ranks: np.ndarray
  subset_ranks: np.ndarray | None = None
  hits: np.ndarray | None = None
  n_truths: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.ranks)

  @classmethod
  def joined(cls, parts: Sequence["Outcome"]) -> "Outcome":
    """One of several parts' queries, in their order."""
    columns = zip(
      *([getattr(p, f.name) for f in dataclasses.fields(cls)] for p in parts), strict=True
    )
    return cls(*(None if c[0] is None else np.concatenate(c) for c in columns))

  def of(self, queries: np.ndarray) -> "Outcome":
    """Of some queries: rows or a mask."""
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return Outcome(**{name: v if v is None else v[queries] for name, v in values.items()})

  def values(self, name: str) -> np.ndarray:
    """[q] float64, a metric of each query, in [0, 1]."""
    if name == "mean":
      return np.mean([self.values(part) for part in _MEAN], axis=0)
    family, _, cut = name.partition("@")
    if family == "mAP":
      return average_precision(self.hits, self.n_truths, int(cut))
    ranks = {"R": self.ranks, "Rsub": self.subset_ranks}[family]
    return (ranks < int(cut)).astype(np.float64)


def names(recall_at: Iterable[int], *, subsets: bool, truths: bool) -> list[str]:
  """Names of what is measured, in the order in which it is shown.

  Args:
    recall_at: cut-offs of the recall in the gallery.
    subsets: whether queries have subsets.
    truths: whether queries have several right images.
  """
  found = [f"R@{k}" for k in recall_at]
  if subsets:
    found += [f"Rsub@{k}" for k in SUBSET_CUTS]
    if set(_MEAN) <= set(found):
      found.append("mean")
  return found + ([f"mAP@{k}" for k in PRECISION_CUTS] if truths else [])


def order(name: str) -> tuple[int, int]:
  """By which names of metrics are sorted: R before Rsub before mAP, each by rising cut-off."""
  family, _, cut = name.partition("@")
  return _FAMILIES.index(family), int(cut or 0)


def explain(measured: Iterable[str]) -> str:
  """What metrics other than recall in the gallery mean, in sentences; "" if there are none."""
  families = {name.partition("@")[0] for name in measured}
  texts = {
    "Rsub": "Rsub@K: recall among the images of the query's subset.",
    "mean": f"mean: of {' and '.join(_MEAN)}.",
    "mAP": "mAP@K: mean over queries of the precision at each right image among the first K, "
    "summed and divided by K or, if it is less, the number of right images.",
  }
  return " ".join(text for family, text in texts.items() if family in families)


def measure(
  outcomes: Sequence[Outcome], measured: Iterable[str]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
  """Metrics in percent and their intervals; of several splits the mean of theirs.

  Args:
    outcomes: a split each, with at least one query.
    measured: names of metrics.
  """
  percent, intervals = {}, {}
  for name in measured:
    if name.startswith("R@"):
      k = int(name.partition("@")[2])
      ranks = [f.ranks for f in outcomes]
      percent[name] = float(np.mean([recall_at_k(r, [k])[k] for r in ranks]))
      intervals[name] = recall_interval(ranks, k)
    else:
      values = [f.values(name) for f in outcomes]
      percent[name] = 100.0 * float(np.mean([np.mean(v) for v in values]))
      intervals[name] = mean_interval(values)
  return percent, intervals


def average_precision(hits: np.ndarray, n_truths: np.ndarray, k: int) -> np.ndarray:
  """AP@k of every query: precision at each right image in the first k, summed, over min(n, k).

  Args:
    hits: [q, m] bool, whether each of the first m images of a ranking is a right one. With fewer
      than k columns the gallery has no more.
    n_truths: [q] int, number of right images, 1 or more.
    k: cut-off.

  Returns:
    [q] float64 in [0, 1].
  """
  first = np.asarray(hits)[:, :k]
  precision = np.cumsum(first, axis=1) / np.arange(1, first.shape[1] + 1)
  return (precision * first).sum(axis=1) / np.minimum(n_truths, k)


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


def mean_interval(values: Sequence[np.ndarray], *, draws: int = 10_000) -> tuple[float, float]:
  """95 % bootstrap interval over queries of a mean, or of the mean of several means.

  How often each distinct value comes in a resample is multinomial: drawn as such, as in
  `recall_interval`, of which this is the general case.

  Args:
    values: for each mean, [q] float, a value a query; resampled separately.
    draws: resamples.

  Returns:
    (low, high) in percent.
  """
  rng = np.random.default_rng(0)
  means = np.zeros(draws)
  for v in values:
    distinct, counts = np.unique(v, return_counts=True)
    n = len(v)
    means += rng.multinomial(n, counts / n, draws) @ distinct / n / len(values)
  low, high = 100.0 * np.quantile(means, [0.5 - _LEVEL / 200.0, 0.5 + _LEVEL / 200.0])
  return float(low), float(high)
