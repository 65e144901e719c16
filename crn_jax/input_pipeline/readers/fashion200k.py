"""Reads Fashion200k folders (Han et al., ICCV 2017) and draws their training triplets.

Expected below the root:

  labels/*train*, labels/*test*   lines "image path TAB detection score TAB caption"
  test_queries.txt                lines "reference path target path"
  women/.../*.jpeg                the images, at those paths; a file may end in .jpg, .jpeg or .png,
                                  whichever the path says

Files of labels are read in sorted order. Triplets are made from captions as TIRG does (Vo et al.,
CVPR 2019): two captions that differ in one word share a parent, which is either without that word.
"""

import dataclasses
import os
import pathlib
import reprlib

import ml_collections
import numpy as np

from crn_jax.input_pipeline.checks import folder, missing
from crn_jax.input_pipeline.dataset import (
  TRIPLETS,
  Dataset,
  DatasetSpec,
  EvalSplit,
  ImageStore,
  TfdsSpec,
  TrainSplit,
  Triplets,
)
from crn_jax.input_pipeline.readers import files

GALLERY = "test_images"

_QUERIES = "test_queries.txt"
_LOOKED_FOR = "at the path that the label file names; .jpg, .jpeg or .png"
_SPELLED = ((".", "dotmark"), ("?", "questionmark"), ("&", "andmark"), ("*", "starmark"))


def read(
  root: str | os.PathLike,
  *,
  train: bool = True,
  on_missing: str = "error",
  known_digest: str | None = None,
  store: ImageStore | None = None,
) -> Dataset:
  """Reads the folder and verifies every image that will be read.

  Args:
    root: see the head of this module.
    train: whether the train split is wanted; its labels need not exist otherwise.
    on_missing: "error", or "skip" to leave out what missing data affect.
    known_digest: `image_digest` of an earlier call; unchanged image files are then not decoded.
    store: what the splits hold as theirs.

  Returns:
    Train: all images, and `CaptionPairs`. Test: all images are the gallery; those of one caption
    are a group.

  Raises:
    UserError: no such root, an unknown choice, or missing or damaged data, all of it in one
      message.
  """
  folder.check_choice("data.on_missing", on_missing, folder.ON_MISSING)
  root = folder.check_root(root, f"a Fashion200k folder with labels/, {_QUERIES} and women/")
  labels, problems, wrong, remarks, paths = {}, {}, {}, [], {}
  for split in ("train", "test") if train else ("test",):
    labels[split], problems[split], n_repeated = read_labels(root, split)
    wrong[split] = sum(p.sort == missing.ENTRIES_MALFORMED for p in problems[split])
    if n_repeated:
      remarks.append(f"labels of {split}: {n_repeated:,} repeated image paths, each counts once")
    found = {key: files.find_image(os.path.join(root, key)) for key in labels[split]}
    paths[split] = {key: path for key, path in found.items() if path is not None}
  verified = folder.verify_images(
    root, [path for found in paths.values() for path in found.values()], known_digest
  )
  readable = {}
  for split, found in paths.items():
    problems[split] += folder.image_problems(root, labels[split], found, verified.unreadable)
    readable[split] = {k: path for k, path in found.items() if path not in verified.unreadable}
  n_queries, queries, query_problems = _read_queries(root, labels["test"])
  problems["test"] += query_problems
  queries = [pair for pair in queries if all(path in readable["test"] for path in pair)]
  if not queries and not any(p.sort == missing.FATAL for p in problems["test"]):
    what = f"nothing is left of its {n_queries} queries"
    problems["test"].append(missing.Problem(missing.FATAL, _QUERIES, what, mend=""))
  triplets, train_part = None, None
  if train:
    triplets = CaptionPairs.create([labels["train"][key] for key in readable["train"]])
    if not len(triplets.modifiable) and not any(p.sort == missing.FATAL for p in problems["train"]):
      what = "no two captions differ in one word, so that no triplet can be drawn"
      problems["train"].append(missing.Problem(missing.FATAL, "labels of train", what))
    asked = len(labels["train"]) + wrong["train"]
    train_part = folder.Part(
      problems["train"], {"triplets": (asked - len(readable["train"]), asked)}
    )
  asked = len(labels["test"]) + wrong["test"]
  lost = {
    "queries": (n_queries - len(queries), n_queries),
    GALLERY: (asked - len(readable["test"]), asked),
  }
  skipped = folder.count_skipped(train_part, "fashion200k", folder.Part(problems["test"], lost))
  everything = [p for found in problems.values() for p in found]
  folder.check_problems(root, everything, skipped, on_missing, _LOOKED_FOR)
  train_split = None
  if train:
    # The captions of all good lines: the ids of words do not depend on what a copy lacks.
    captions = tuple(labels["train"].values())
    train_split = TrainSplit(tuple(readable["train"].values()), triplets, captions, store)
  return Dataset(
    "fashion200k",
    train_split,
    (_to_eval_split(readable["test"], labels["test"], queries, store),),
    skipped=skipped,
    image_digest=verified.digest,
    remarks=(*remarks, *verified.remarks),
  )


def clean_caption(text: str) -> str:
  """The caption with four characters spelled out, which the tokeniser would delete."""
  text = text.strip()
  for character, word in _SPELLED:
    text = text.replace(character, word)
  return text


def parent_captions(caption: str) -> tuple[str, ...]:
  """The caption without each of its words, each result once.

  A word is removed as a string wherever it occurs, also inside other words, as in the release:
  without "red", "red tiered dress" is "tie dress".
  """
  parents = (caption.replace(w, "").replace("  ", " ").strip() for w in caption.split())
  return tuple(dict.fromkeys(parents))


def modification_text(source: str, target: str) -> str:
  """ "replace A with B": the first word of each caption that the other lacks, or its last word."""
  return _modification_text(source.split(), target.split())


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionPairs:
  """Draws training triplets: two images whose captions differ in one word.

  Lists of lists are flat arrays: list i of `x` is x[x_start[i] : x_start[i + 1]]. Only parents
  with two or more children are kept.

  Attributes:
    captions: the different captions.
    caption_of: [n images] int32, caption of an image.
    modifiable: int32, the images whose captions have a parent.
    images, images_start: images of a caption.
    parents, parents_start: parents of a caption.
    positions: the caption's position among the children of each of its `parents`.
    children, children_start: captions of a parent.
  """

  captions: tuple[str, ...]
  caption_of: np.ndarray
  modifiable: np.ndarray
  images: np.ndarray
  images_start: np.ndarray
  parents: np.ndarray
  parents_start: np.ndarray
  positions: np.ndarray
  children: np.ndarray
  children_start: np.ndarray

  @classmethod
  def create(cls, captions_of_images: list[str]) -> "CaptionPairs":
    """From the caption of every image."""
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions_of_images))}
    caption_of = np.array([ids[caption] for caption in captions_of_images], np.int32)
    images = np.argsort(caption_of, kind="stable").astype(np.int32)
    images_start = _starts(np.bincount(caption_of, minlength=len(ids)))
    by_name: dict[str, list[int]] = {}
    for caption, i in ids.items():
      for parent in parent_captions(caption):
        by_name.setdefault(parent, []).append(i)
    families = [family for family in by_name.values() if len(family) > 1]
    sizes = np.array([len(family) for family in families], np.int64)
    children = np.array([i for family in families for i in family], np.int32)
    children_start = _starts(sizes)
    parent_of = np.repeat(np.arange(len(families), dtype=np.int32), sizes)
    position_of = np.arange(len(children)) - np.repeat(children_start[:-1], sizes)
    order = np.argsort(children, kind="stable")
    n_parents = np.bincount(children, minlength=len(ids))
    return cls(
      captions=tuple(ids),
      caption_of=caption_of,
      modifiable=np.flatnonzero(n_parents[caption_of]).astype(np.int32),
      images=images,
      images_start=images_start,
      parents=parent_of[order],
      parents_start=_starts(n_parents),
      positions=position_of[order],
      children=children,
      children_start=children_start,
    )

  def __len__(self) -> int:
    return len(self.caption_of)

  def draw(self, seed: int, epoch: int) -> Triplets:
    """One triplet an image, with that image as the reference.

    An image that is not modifiable is replaced by a uniformly drawn one that is. Then the release
    draws a parent of its caption uniformly, a child of that uniformly, and both again while the
    child is its own caption; the target is a uniformly drawn image of the child. Here each of
    these is drawn once, from the distribution that the repetition leads to: of k children, k - 1
    are others, so a parent is kept with probability (k - 1) / k.

    Args:
      seed: 0 or greater.
      epoch: counted from 0.
    """
    uniform = np.random.default_rng([seed, epoch, TRIPLETS]).random((4, len(self)))
    reference = np.arange(len(self), dtype=np.int32)
    is_modifiable = np.zeros(len(self), bool)
    is_modifiable[self.modifiable] = True
    replacement = self.modifiable[_below(uniform[0], len(self.modifiable))]
    reference = np.where(is_modifiable, reference, replacement)
    source = self.caption_of[reference]

    sizes = np.diff(self.children_start)[self.parents]
    total = np.concatenate([[0.0], np.cumsum((sizes - 1) / sizes)])
    first, end = self.parents_start[source], self.parents_start[source + 1]
    wanted = total[first] + uniform[1] * (total[end] - total[first])
    # Rounding must not lead to the neighbouring caption's parents.
    entry = np.clip(np.searchsorted(total, wanted, side="right") - 1, first, end - 1)
    others = _below(uniform[2], sizes[entry] - 1)
    others += others >= self.positions[entry]
    child = self.children[self.children_start[self.parents[entry]] + others]

    n_images = np.diff(self.images_start)[child]
    target = self.images[self.images_start[child] + _below(uniform[3], n_images)]
    words = [caption.split() for caption in self.captions]
    texts = tuple(
      (_modification_text(words[s], words[t]),)
      for s, t in zip(source.tolist(), child.tolist(), strict=True)
    )
    return Triplets(reference, target, texts)


def read_labels(
  root: pathlib.Path, split: str
) -> tuple[dict[str, str], list[missing.Problem], int]:
  """image path -> caption of a split, what is wrong, and the number of repeated paths."""
  try:
    names = sorted(n for n in os.listdir(root / "labels") if split in n and n.endswith(".txt"))
  except OSError as error:
    return {}, [missing.Problem(missing.FATAL, "labels", f"cannot be listed ({error.strerror})")], 0
  if not names:
    return {}, [missing.Problem(missing.FATAL, f"labels/*{split}*.txt", "no such file")], 0
  labels, problems, n_repeated = {}, [], 0
  for name in names:
    lines, found = files.read_lines(root, f"labels/{name}")
    problems += found
    for i, line in enumerate(lines, 1):
      if not line.strip():
        continue
      fields = line.split("\t")
      path = fields[0].strip()
      what = None
      if len(fields) != 3 or not path:
        what = f"expected path, score and caption with tabs between, found {reprlib.repr(line)}"
      elif files.leaves_root(path):
        what = f"the path leads outside the data folder: {path!r}"
      if what:
        where = f"labels/{name}, line {i}"
        problems.append(missing.Problem(missing.ENTRIES_MALFORMED, where, what))
      elif path in labels:
        n_repeated += 1
      else:
        labels[path] = clean_caption(fields[2])
  return labels, problems, n_repeated


def _read_queries(
  root: pathlib.Path, labels: dict[str, str]
) -> tuple[int, list[tuple[str, str]], list[missing.Problem]]:
  """Number of queries, (reference path, target path) of those with labels, what is wrong."""
  lines, problems = files.read_lines(root, _QUERIES)
  n_queries, queries = 0, []
  for i, line in enumerate(lines, 1):
    pair = line.split()
    if not pair:
      continue
    n_queries += 1
    where = f"{_QUERIES}, line {i}"
    if len(pair) != 2:
      what = f"expected a reference and a target path, found {reprlib.repr(line)}"
      problems.append(missing.Problem(missing.ENTRIES_MALFORMED, where, what))
      continue
    unknown = [path for path in pair if path not in labels]
    if unknown and labels:  # Without labels no path can be outside them.
      what = f"{' and '.join(unknown)} not in the labels of test"
      problems.append(missing.Problem(missing.ENTRIES_OUTSIDE_SPLIT, where, what))
    else:
      queries.append((pair[0], pair[1]))
  return n_queries, queries, problems


def _to_eval_split(
  paths: dict[str, str],
  labels: dict[str, str],
  queries: list[tuple[str, str]],
  store: ImageStore | None,
) -> EvalSplit:
  row = {key: i for i, key in enumerate(paths)}
  groups: dict[str, int] = {}
  return EvalSplit(
    name="fashion200k",
    image_ids=tuple(paths),
    image_paths=tuple(paths.values()),
    queries=Triplets(
      np.array([row[reference] for reference, _ in queries], np.int32),
      np.array([row[target] for _, target in queries], np.int32),
      tuple((modification_text(labels[r], labels[t]),) for r, t in queries),
    ),
    galleries={GALLERY: np.arange(len(paths), dtype=np.int32)},
    groups=np.array([groups.setdefault(labels[key], len(groups)) for key in paths], np.int32),
    store=store,
  )


def _modification_text(source: list[str], target: list[str]) -> str:
  def differing(words, others):
    return next((w for w in words if w not in others), words[-1] if words else "")

  return f"replace {differing(source, target)} with {differing(target, source)}"


def _starts(sizes: np.ndarray) -> np.ndarray:
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _below(uniform: np.ndarray, n: np.ndarray | int) -> np.ndarray:
  """Uniform numbers in [0, 1) as integers in 0 .. n - 1."""
  return np.minimum((uniform * n).astype(np.int64), np.asarray(n) - 1)


def _read_configured(data: ml_collections.ConfigDict, **options) -> Dataset:
  return read(data.root, on_missing=data.on_missing, **options)


SPEC = DatasetSpec(
  name="fashion200k",
  read=_read_configured,
  protocols={GALLERY: "all test images; any image with the target's caption is a hit"},
  tfds=TfdsSpec(
    class_name="CrnFashion200k",
    # Its train triplets are one draw, those of seed 0, epoch 0.
    description=(
      "Fashion200k (Han et al., ICCV 2017): a reference image, a changed word -> a target."
    ),
    homepage="https://github.com/xthan/fashion-200k",
    manual_download_instructions=f"A folder with labels/, {_QUERIES} and women/.",
    parts=("all",),
    short_side=224,
    read=lambda root, part, on_missing: read(root, on_missing=on_missing),
  ),
  part=lambda data: "all",
)
