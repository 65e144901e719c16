"""The one interface between readers of data sets and everything behind them.

A reader (`fashioniq.py`, later others) turns files on disk into these plain values; the loader,
training, evaluation and pictures know nothing else about a data set.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Triplets:
  """Reference image + modification text -> target image, one row each.

  Attributes:
    reference: [n] int32, rows of the split's `image_paths`.
    target: [n] int32, rows of the split's `image_paths`.
    texts: n tuples of captions; the vocabulary joins the captions of one text.
    kinds: n names of the kind of text ("modification", "auxiliary"), or None if not recorded.
  """

  reference: np.ndarray
  target: np.ndarray
  texts: tuple[tuple[str, ...], ...]
  kinds: tuple[str, ...] | None = None

  def __len__(self) -> int:
    return len(self.texts)


@dataclasses.dataclass(frozen=True)
class TrainSplit:
  """What training reads.

  Attributes:
    image_paths: path of every image that a triplet uses, each once.
    triplets: the training triplets.
    captions: bare captions in file order, from which the vocabulary is built.
  """

  image_paths: tuple[str, ...]
  triplets: Triplets
  captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class EvalSplit:
  """Queries and galleries of one evaluation (one category of FashionIQ).

  Attributes:
    name: e.g. "dress".
    image_ids: id of every image, gallery or reference, each once.
    image_paths: their paths, in the same order.
    queries: the queries; rows refer to `image_paths`.
    galleries: protocol name -> [g] int32 rows of `image_paths`, in gallery order.
  """

  name: str
  image_ids: tuple[str, ...]
  image_paths: tuple[str, ...]
  queries: Triplets
  galleries: dict[str, np.ndarray]
