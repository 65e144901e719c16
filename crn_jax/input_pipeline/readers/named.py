"""From triplets that name their images to splits: what readers of fixed triplets share.

A reader parses its annotation files into `Annotated` and finds its image files; `to_dataset`
verifies the images, leaves out or refuses what is missing, counts it, and numbers the rest.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from crn_jax.input_pipeline.checks import folder, missing
from crn_jax.input_pipeline.checks.missing import ENTRIES_MALFORMED, ENTRIES_OUTSIDE_SPLIT, Problem
from crn_jax.input_pipeline.dataset import Dataset, EvalSplit, ImageStore, TrainSplit, Triplets


class Named(NamedTuple):
  """A triplet that names its images.

  Attributes:
    reference: name of the reference image.
    target: name of the target image, None where it is not published.
    captions: of the text.
    subset: names of the images among which the target is ranked, too.
    truths: names of all right images, if several may be.
    query_id: see `EvalSplit.query_ids`.
  """

  reference: str
  target: str | None
  captions: tuple[str, ...]
  subset: tuple[str, ...] = ()
  truths: tuple[str, ...] = ()
  query_id: str | None = None

  @property
  def ends(self) -> tuple[str, ...]:
    """Names of the reference and, where it is published, the target."""
    return (self.reference,) if self.target is None else (self.reference, self.target)


def parse_all(
  items: Sequence[object],
  parse: Callable[[object], Named | str],
  file: str,
  key: str,
  listed: Container[str],
  list_file: str,
) -> tuple[list[Named], list[Problem]]:
  """The good ones of a file's items, and what is wrong with the others.

  Args:
    items: of the file.
    parse: item -> a triplet with its `query_id`, or what is wrong with it.
    file: for messages.
    key: what the file calls a query's id, for messages.
    listed: names of the images there are; empty if their list is not readable: then no item is
      good, and none is outside.
    list_file: of `listed`, for messages.
  """
  good: dict[str, Named] = {}
  problems = []
  for i, item in enumerate(items):
    where, found = f"{file}, item {i}", parse(item)
    if isinstance(found, str):
      problems.append(Problem(ENTRIES_MALFORMED, where, found))
    elif found.query_id in good:
      what = f"{key} {found.query_id} stands in an earlier item, too"
      problems.append(Problem(ENTRIES_MALFORMED, where, what))
    elif listed:
      names = dict.fromkeys((*found.ends, *found.subset, *found.truths))
      if outside := [name for name in names if name not in listed]:
        what = f"{', '.join(outside)} not in {list_file}"
        problems.append(Problem(ENTRIES_OUTSIDE_SPLIT, where, what))
      else:
        good[found.query_id] = found
  return list(good.values()), problems


@dataclasses.dataclass(frozen=True)
class Annotated:
  """What the annotation files of one split ask for.

  Attributes:
    file: of the split, for messages.
    triplets: in their order, with or without image files; of a plain one (reference, target,
      captions) will do.
    gallery: names of the gallery's images in gallery order, each once; empty for training.
    problems: what is wrong with the annotation files.
    n_bad: number of items of the files that are no triplet because of their problems.
  """

  file: str
  triplets: Sequence[Named | tuple[str, str, tuple[str, ...]]]
  gallery: Sequence[str] = ()
  problems: Sequence[missing.Problem] = ()
  n_bad: int = 0

  @property
  def named(self) -> list[Named]:
    """The triplets."""
    return [Named(*triplet) for triplet in self.triplets]

  @property
  def names(self) -> tuple[str, ...]:
    """Of all images that are read, each once: the gallery's, then those of the triplets."""
    ends = (name for triplet in self.named for name in triplet.ends)
    return tuple(dict.fromkeys([*self.gallery, *ends]))


def to_dataset(
  name: str,
  root: pathlib.Path,
  train: Annotated | None,
  val: Annotated,
  paths: Mapping[str, str],
  *,
  protocol: str,
  looked_for: str,
  on_missing: str,
  known_digest: str | None = None,
  store: ImageStore | None = None,
  remarks: Sequence[str] = (),
  ranks_reference: bool | None = None,
) -> Dataset:
  """Verifies every image that will be read, and makes the splits.

  Args:
    name: of the data set and of its one evaluation split.
    root: the data folder.
    train: what training asks for, if it is wanted.
    val: what evaluation asks for.
    paths: name -> path of the image files there are.
    protocol: name of the gallery.
    looked_for: where image files were looked for, for messages.
    on_missing: "error", or "skip" to leave out what missing data affect.
    known_digest: see `dataset.Reader`.
    store: see `dataset.Reader`.
    remarks: what the reader found odd but harmless.
    ranks_reference: whether queries rank their own reference image in the gallery; None leaves it
      to the configuration.

  Raises:
    UserError: data are missing or damaged; all of it in one message.
  """
  folder.check_choice("data.on_missing", on_missing, folder.ON_MISSING)
  asked = ([train] if train else []) + [val]
  files = [paths[key] for split in asked for key in split.names if key in paths]
  verified = folder.verify_images(root, files, known_digest)
  left = [_Left.create(root, split, paths, verified.unreadable) for split in asked]
  part = left[-1]
  lost = sum(key not in part.paths for key in val.gallery)
  skipped = folder.count_skipped(
    left[0].count("triplets") if train else None,
    name,
    part.count("queries", **{protocol: (lost, len(val.gallery))}),
  )
  problems = [p for split in left for p in split.problems]
  folder.check_problems(root, problems, skipped, on_missing, looked_for)
  row = {key: i for i, key in enumerate(part.paths)}
  return Dataset(
    name,
    left[0].to_train_split(store) if train else None,
    (
      EvalSplit(
        name=name,
        image_ids=tuple(part.paths),
        image_paths=tuple(part.paths.values()),
        queries=_to_triplets(part.triplets, row),
        galleries={protocol: np.array([row[key] for key in val.gallery if key in row], np.int32)},
        ranks_reference={} if ranks_reference is None else {protocol: ranks_reference},
        subsets=_rows([t.subset for t in part.triplets], row),
        truths=_rows([t.truths for t in part.triplets], row),
        query_ids=_query_ids(part.triplets),
        store=store,
      ),
    ),
    skipped=skipped,
    image_digest=verified.digest,
    remarks=(*remarks, *verified.remarks),
  )


@dataclasses.dataclass(frozen=True)
class _Left:
  """A split without what cannot be read.

  Attributes:
    asked: the whole split.
    triplets: those of which reference and target can be read.
    paths: name -> path of the images that can be read.
    problems: all that is wrong with the split.
  """

  asked: Annotated
  triplets: Sequence[Named]
  paths: Mapping[str, str]
  problems: Sequence[missing.Problem]

  @classmethod
  def create(
    cls,
    root: pathlib.Path,
    asked: Annotated,
    paths: Mapping[str, str],
    unreadable: Mapping[str, str],
  ) -> "_Left":
    problems = [*asked.problems, *folder.image_problems(root, asked.names, paths, unreadable)]
    good = {k: paths[k] for k in asked.names if k in paths and paths[k] not in unreadable}
    triplets = [t for t in asked.named if all(name in good for name in t.ends)]
    if not triplets and not any(p.sort == missing.FATAL for p in problems):
      what = f"nothing is left of its {len(asked.triplets) + asked.n_bad} triplets"
      problems.append(missing.Problem(missing.FATAL, asked.file, what, mend=""))
    return cls(asked, triplets, good, problems)

  def count(self, what: str, **galleries: tuple[int, int]) -> folder.Part:
    n = len(self.asked.triplets) + self.asked.n_bad
    return folder.Part(self.problems, {what: (n - len(self.triplets), n), **galleries})

  def to_train_split(self, store: ImageStore | None) -> TrainSplit:
    used = tuple(dict.fromkeys(name for triplet in self.triplets for name in triplet.ends))
    return TrainSplit(
      image_paths=tuple(self.paths[name] for name in used),
      triplets=_to_triplets(self.triplets, {name: i for i, name in enumerate(used)}),
      # With or without images: the ids of words do not depend on what a copy of the data lacks.
      captions=tuple(caption for triplet in self.asked.named for caption in triplet.captions),
      store=store,
    )


def _to_triplets(triplets: Sequence[Named], row: Mapping[str, int]) -> Triplets:
  return Triplets(
    reference=np.array([row[t.reference] for t in triplets], np.int32),
    target=np.array([-1 if t.target is None else row[t.target] for t in triplets], np.int32),
    texts=tuple(t.captions for t in triplets),
  )


def _rows(names: Sequence[Sequence[str]], row: Mapping[str, int]) -> np.ndarray | None:
  """[n, m] int32 rows of the names that have one, -1 behind them; None if there are no names."""
  found = [[row[name] for name in several if name in row] for several in names]
  width = max(map(len, found), default=0)
  if not width:
    return None
  return np.array([rows + [-1] * (width - len(rows)) for rows in found], np.int32)


def _query_ids(triplets: Sequence[Named]) -> tuple[str, ...] | None:
  ids = tuple(t.query_id for t in triplets if t.query_id is not None)
  return ids if len(ids) == len(triplets) > 0 else None
