"""From triplets that name their images to splits: what readers of fixed triplets share.

A reader parses its annotation files into `Annotated` and finds its image files; `to_dataset`
verifies the images, leaves out or refuses what is missing, counts it, and numbers the rest.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from crn_jax.input_pipeline.checks import folder, missing
from crn_jax.input_pipeline.dataset import Dataset, EvalSplit, ImageStore, TrainSplit, Triplets

# (name of the reference, name of the target, captions of the text)
Named = tuple[str, str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Annotated:
  """What the annotation files of one split ask for.

  Attributes:
    file: of the split, for messages.
    triplets: in their order, with or without image files.
    gallery: names of the gallery's images in gallery order, each once; empty for training.
    problems: what is wrong with the annotation files.
  """

  file: str
  triplets: Sequence[Named]
  gallery: Sequence[str] = ()
  problems: Sequence[missing.Problem] = ()

  @property
  def names(self) -> tuple[str, ...]:
    """Of all images that are read, each once: the gallery's, then those of the triplets."""
    ends = (name for triplet in self.triplets for name in triplet[:2])
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
    triplets: those of which both images can be read.
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
    triplets = [t for t in asked.triplets if t[0] in good and t[1] in good]
    if not triplets and not any(p.sort == missing.FATAL for p in problems):
      what = f"nothing is left of its {len(asked.triplets)} triplets"
      problems.append(missing.Problem(missing.FATAL, asked.file, what, mend=""))
    return cls(asked, triplets, good, problems)

  def count(self, what: str, **galleries: tuple[int, int]) -> folder.Part:
    n = len(self.asked.triplets)
    return folder.Part(self.problems, {what: (n - len(self.triplets), n), **galleries})

  def to_train_split(self, store: ImageStore | None) -> TrainSplit:
    used = tuple(dict.fromkeys(name for triplet in self.triplets for name in triplet[:2]))
    return TrainSplit(
      image_paths=tuple(self.paths[name] for name in used),
      triplets=_to_triplets(self.triplets, {name: i for i, name in enumerate(used)}),
      # With or without images: the ids of words do not depend on what a copy of the data lacks.
      captions=tuple(caption for *_, captions in self.asked.triplets for caption in captions),
      store=store,
    )


def _to_triplets(triplets: Sequence[Named], row: Mapping[str, int]) -> Triplets:
  return Triplets(
    reference=np.array([row[reference] for reference, _, _ in triplets], np.int32),
    target=np.array([row[target] for _, target, _ in triplets], np.int32),
    texts=tuple(captions for _, _, captions in triplets),
  )
