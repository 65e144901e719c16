"""The one interface between readers of data sets and everything behind them.

A reader (a module of `readers/`) turns files on disk into these plain values; the loader, training,
evaluation and pictures know nothing else about a data set. `DatasetSpec` is how a reader announces
its data set to `registry.py`.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import ml_collections
import numpy as np

# Streams of random numbers of one epoch, behind the seed and the epoch's number.
ORDER, AUGMENT, TRIPLETS = range(3)


@dataclasses.dataclass(frozen=True, eq=False)  # Arrays: compared and hashed by identity.
class Triplets:
  """Reference image + modification text -> target image, one row each.

  Attributes:
    reference: [n] int32, rows of the split's `image_paths`.
    target: [n] int32, rows of the split's `image_paths`; -1 where the target is not published.
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

  def check(self, paths: Sequence[str]) -> None:
    """Raises UserError unless all of these files are there, and have not changed since."""


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
    ranks_reference: protocol name -> whether queries rank their own reference image there. Where a
      protocol is not named, `eval.exclude_reference` says it.
    subsets: [queries, m] int32 or None: rows of a few images for each query among which its target
      is ranked, too, without the reference; -1 fills up. For recall within a subset.
    truths: [queries, m] int32 or None: rows of all images that are right, the target among them;
      -1 fills up. For average precision.
    query_ids: name of every query, as the data set's server wants it; None where there is none.
    store: as in `TrainSplit`.
  """

  name: str
  image_ids: tuple[str, ...]
  image_paths: tuple[str, ...]
  queries: Triplets
  galleries: dict[str, np.ndarray]
  groups: np.ndarray | None = None
  ranks_reference: Mapping[str, bool] = dataclasses.field(default_factory=dict)
  subsets: np.ndarray | None = None
  truths: np.ndarray | None = None
  query_ids: tuple[str, ...] | None = None
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

  def excludes_reference(self, protocol: str, otherwise: bool) -> bool:
    """Whether queries leave out their own reference image in a protocol's gallery.

    Args:
      protocol: name of the gallery.
      otherwise: `eval.exclude_reference`, which counts where the protocol leaves it open.
    """
    ranked = self.ranks_reference.get(protocol)
    return otherwise if ranked is None else not ranked


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set as training and evaluation see it.

  Attributes:
    name: for results, e.g. "fashioniq/dress" or "shoes".
    train: training data; None if only evaluation was asked for.
    evals: one split a category; one in all for Shoes and Fashion200k.
    ceilings: R@10 in percent that the best image-only and text-only ranking could reach, where the
      data set knows it; else None.
    skipped: counts of what `data.on_missing = 'skip'` left out, ready for JSON; empty if nothing.
      {"train": {..., "triplets", "of_triplets"}, "val": {split: {..., "queries", "of_queries",
      and of each gallery "NAME", "of_NAME"}}}: how many triplets, queries and gallery images were
      left out of how many. For "..." stand the causes:
      "entries_malformed", "entries_outside_split", "images_unreadable", "images_missing". "train"
      is absent if only evaluation was asked for. `missing.describe_skipped` says it in words.
    image_digest: of the image files' names, sizes and times of change, for `known_digest` of
      `DatasetSpec.read`; "" if some are unreadable.
    remarks: what is odd but harmless in the folder, in sentences.
    fingerprint: of `train`, see `fingerprint`; "" if only evaluation was asked for.
      `registry.open_dataset` sets it, readers need not.
  """

  name: str
  train: TrainSplit | None
  evals: tuple[EvalSplit, ...]
  ceilings: dict[str, float] | None = None
  skipped: dict = dataclasses.field(default_factory=dict)
  image_digest: str = ""
  remarks: tuple[str, ...] = ()
  fingerprint: str = ""


class Reader(Protocol):
  """Reads a data set and verifies its images."""

  def __call__(
    self,
    data: ml_collections.ConfigDict,
    *,
    train: bool,
    known_digest: str | None,
    store: ImageStore | None,
  ) -> Dataset:
    """Reads what the configuration asks for.

    Args:
      data: the `data` part of the configuration; `root` and `on_missing` concern every reader.
      train: whether the training data are needed; their files need not exist otherwise.
      known_digest: `image_digest` of an earlier call; unchanged images are not verified again.
      store: what the splits shall hold as their `store`.

    Raises:
      UserError: bad data or a bad choice; one message lists everything that is wrong.
    """


@dataclasses.dataclass(frozen=True)
class TfdsSpec:
  """A data set as TensorFlow Datasets: what `tfds_builders.py` makes a builder of.

  Attributes:
    class_name: of the builder; CrnFashionIQ is loaded as "crn_fashion_iq".
    description: one sentence.
    homepage: address.
    manual_download_instructions: what the data folder holds.
    parts: what can be prepared on its own, e.g. categories.
    short_side: of the images in the published configurations, in pixels.
    read: (root, part, on_missing) -> the data set, with its train split if there is one.
  """

  class_name: str
  description: str
  homepage: str
  manual_download_instructions: str
  parts: tuple[str, ...]
  short_side: int
  read: Callable[[str, str, str], Dataset]


@dataclasses.dataclass(frozen=True)
class SubmissionFile:
  """The file of answers that a data set's server takes: {query id: [names of images]}.

  Attributes:
    name: of the file.
    count: names a query, best first.
    header: entries beside the queries.
    within_subset: whether the query's subset is ranked (`EvalSplit.subsets`), not the gallery.
    integers: whether names are integers.
  """

  name: str
  count: int
  header: Mapping[str, str] = dataclasses.field(default_factory=dict)
  within_subset: bool = False
  integers: bool = False


@dataclasses.dataclass(frozen=True)
class SubmissionSpec:
  """What a data set's server takes.

  Attributes:
    read: (data part of the configuration) -> a data set with one split, that of the server's
      queries, with `query_ids`; the targets are -1.
    files: what is sent.
    server: address.
  """

  read: Callable[[ml_collections.ConfigDict], Dataset]
  files: tuple[SubmissionFile, ...]
  server: str


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
  """All that the program knows of a data set by name; its reader's module ends with it.

  Attributes:
    name: value of `data.dataset`.
    read: the reader.
    protocols: name of a gallery -> what is ranked and what counts as a hit, to go on after
      "NAME ranks ".
    tfds: how its images are prepared (`data.prepared`); None if they cannot be.
    part: the `data` part of the configuration -> which of `tfds.parts` it reads.
    trains: whether there is a train split; without one the data set is for evaluation only.
    has_subsets: whether its splits have `subsets`, hence recalls within them.
    has_truths: whether its splits have `truths`, hence average precision.
    submission: what its server takes, if it has one.
  """

  name: str
  read: Reader
  protocols: Mapping[str, str]
  tfds: TfdsSpec | None = None
  part: Callable[[ml_collections.ConfigDict], str] | None = None
  trains: bool = True
  has_subsets: bool = False
  has_truths: bool = False
  submission: SubmissionSpec | None = None


def evaluation_fingerprint(splits: Sequence[EvalSplit]) -> str:
  """Digest of what is asked and what is ranked, by ids: see `fingerprint`."""
  digest = hashlib.sha256()
  for split in splits:
    queries = split.queries
    texts = [list(text) for text in queries.texts]
    digest.update(json.dumps([split.name, split.image_ids, texts]).encode())
    for rows in (queries.reference, queries.target, *split.galleries.values()):
      digest.update(np.asarray(rows, np.int64).tobytes())
  return digest.hexdigest()


def fingerprint(split: TrainSplit) -> str:
  """Digest of what decides the course of a training: triplets in their order, and captions.

  Images are named by their ids, not by their paths: another copy of the data, in another layout,
  has the same fingerprint. Pixels are not looked at. Where triplets are drawn anew each epoch, one
  draw stands for all.
  """
  ids = [pathlib.PurePath(path).stem for path in split.image_paths]
  triplets = split.triplets.draw(seed=0, epoch=0)
  rows = zip(triplets.reference.tolist(), triplets.target.tolist(), triplets.texts, strict=True)
  content = [[[ids[r], ids[t], texts] for r, t, texts in rows], split.captions]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()
