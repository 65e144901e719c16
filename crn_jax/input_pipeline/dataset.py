"""The one interface between readers of data sets and everything behind them.

A reader (`fashioniq.py`, `shoes.py`, `fashion200k.py`) turns files on disk into these plain values;
the loader, training, evaluation and pictures know nothing else about a data set.
"""

import dataclasses
from typing import Protocol

import numpy as np

# Streams of random numbers of one epoch, behind the seed and the epoch's number.
ORDER, AUGMENT, TRIPLETS = range(3)


@dataclasses.dataclass(frozen=True, eq=False)  # Arrays: compared and hashed by identity.
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

  def draw(self, seed: int, epoch: int) -> "Triplets":
    """The same in every epoch, see `TripletSource`."""
    del seed, epoch
    return self


class ImageStore(Protocol):
  """Images with their short side resized, by the path of the file they were made of."""

  def read(self, path: str) -> np.ndarray:
    """[h, w, 3] uint8, the pixels of decoding and resizing that file."""


class TripletSource(Protocol):
  """Training triplets of any epoch: fixed ones (`Triplets`) or ones drawn anew."""

  def __len__(self) -> int:
    """Number of triplets of every epoch."""

  def draw(self, seed: int, epoch: int) -> Triplets:
    """The triplets of an epoch, a pure function of its arguments.

    So a run that is resumed, or spread over any number of processes, sees the same ones.
    """


@dataclasses.dataclass(frozen=True)
class TrainSplit:
  """What training reads.

  Attributes:
    image_paths: path of every image that a triplet may use, each once.
    triplets: the training triplets of every epoch.
    captions: bare captions in file order, from which the vocabulary is built.
    store: the images once more, resized, from which they are read; None reads `image_paths`.
  """

  image_paths: tuple[str, ...]
  triplets: TripletSource
  captions: tuple[str, ...]
  store: ImageStore | None = None


@dataclasses.dataclass(frozen=True)
class EvalSplit:
  """Queries and galleries of one evaluation (one category of FashionIQ).

  Attributes:
    name: e.g. "dress".
    image_ids: id of every image, gallery or reference, each once.
    image_paths: their paths, in the same order.
    queries: the queries; rows refer to `image_paths`.
    galleries: protocol name -> [g] int32 rows of `image_paths`, in gallery order.
    groups: [n images] int32 or None. Any image of the target's group is a hit; with None only the
      target itself is.
    store: as in `TrainSplit`.
  """

  name: str
  image_ids: tuple[str, ...]
  image_paths: tuple[str, ...]
  queries: Triplets
  galleries: dict[str, np.ndarray]
  groups: np.ndarray | None = None
  store: ImageStore | None = None

  @property
  def labels(self) -> np.ndarray:
    """[n images] int; images of one label are the same target."""
    return np.arange(len(self.image_paths)) if self.groups is None else self.groups

  @property
  def target_labels(self) -> np.ndarray:
    """[queries] int, label of every query's target."""
    return self.labels[self.queries.target]

  def reference_positions(self, protocol: str) -> np.ndarray:
    """[queries] int, position of every query's reference image in a gallery, or -1."""
    position = np.full(len(self.image_paths), -1)
    gallery = self.galleries[protocol]
    position[gallery] = np.arange(len(gallery))
    return position[self.queries.reference]
