"""Reads FashionIQ folders (Wu et al., "Fashion IQ", CVPR 2021) into the plain values of `dataset`.

Expected below the root:

  captions/cap.{category}.{split}.json        [{"candidate": id, "target": id, "captions": [a, b]}]
  image_splits/split.{category}.{split}.json  [id, ...]
  resized_image/{category}/{id}.jpg           or images/{category}/, or flat images/;
                                              .jpg, .jpeg or .png

The candidate is the reference image. Other keys of an entry are ignored, except an optional
string "kind" (kind of text), which is kept when every entry read has it.

Copies of FashionIQ lack images. All that is missing or damaged is found before anything is handed
out (`missing`), and either ends the reading with one message or is left out and counted.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence

import ml_collections
import numpy as np

from crn_jax.input_pipeline import sentences
from crn_jax.input_pipeline.checks import folder, missing
from crn_jax.input_pipeline.dataset import (
  Dataset,
  DatasetSpec,
  EvalSplit,
  ImageStore,
  TfdsSpec,
  TrainSplit,
  Triplets,
)
from crn_jax.input_pipeline.readers import files
from crn_jax.input_pipeline.readers.annotations import (
  Annotations,
  Entry,
  captions_file,
  read_annotations,
  split_file,
  used_ids,
)

CATEGORIES = ("dress", "shirt", "toptee")
# The protocol in which a query always ranks its own reference image.
WITH_REFERENCE = "original_with_reference"
CAPTION_USES = ("joined", "both_orders", "separate", "mixed")

# Folders in which images of a category may lie; an earlier one wins over a later one.
_IMAGE_FOLDERS = ("resized_image/{}", "images/{}", "images")
_LOOKED_FOR = "ID.jpg, .jpeg or .png in resized_image/CATEGORY/, images/CATEGORY/ or images/"


def read(
  root: str | os.PathLike,
  category: str,
  caption_use: str = "joined",
  *,
  train: bool = True,
  on_missing: str = "error",
  known_digest: str | None = None,
  store: ImageStore | None = None,
) -> Dataset:
  """Reads one category, or all three together, and verifies every image that will be read.

  Args:
    root: folder with captions/, image_splits/ and the images.
    category: "dress", "shirt", "toptee", or "all" for the three in this order: one train split,
      three val splits.
    caption_use: "joined" (an entry is one triplet with both captions: VAL split papers, CRN),
      "both_orders" (two triplets, the captions in either order: CoSMo, ARTEMIS),
      "separate" (two triplets with one caption each: VAL) or "mixed" (one triplet with one
      sentence, see `sentences`: CLIP4Cir).
    train: whether the train split is wanted; its files need not exist otherwise.
    on_missing: "error", or "skip" to leave out the triplets, queries and gallery entries that
      missing data affect. Images of queries that are left out stay in the galleries, so that these
      are as close to the published ones as the files allow.
    known_digest: `image_digest` of an earlier call; unchanged image files are then not decoded.
    store: what the splits hold as theirs.

  Returns:
    Train: `image_paths` holds the images that triplets use, in order of first appearance,
    reference before target. Evals: the val split of every category, with the galleries of the
    three published protocols: "val_split", the reference and target images of the queries in order
    of first appearance, reference before target (VAL, CLVC-Net, CRN, TG-CIR); "original_split",
    the whole split list (DCNet); and "original_with_reference", the same, where a query always
    ranks its own reference image (CLIP4Cir, SPRC).

  Raises:
    UserError: no such root, unknown category, caption_use or on_missing, or missing or damaged
      data, all of it in one message.
  """
  folder.check_choice("caption_use", caption_use, CAPTION_USES)
  folder.check_choice("on_missing", on_missing, folder.ON_MISSING)
  folder.check_choice("category", category, (*CATEGORIES, "all"))
  root = folder.check_root(
    root, "a FashionIQ folder with captions/, image_splits/ and resized_image/ or images/"
  )
  categories = CATEGORIES if category == "all" else (category,)
  annotations = [
    read_annotations(root, c, split)
    for split in (("train", "val") if train else ("val",))
    for c in categories
  ]
  paths = locate_images(
    root, {c: [i for a in annotations if a.category == c for i in a.needed_ids] for c in categories}
  )
  used = [path for found in paths.values() for path in (found or {}).values()]
  verified = folder.verify_images(root, used, known_digest)
  parts = [_to_part(root, a, paths[a.category], verified.unreadable) for a in annotations]
  problems = [p for part in parts for p in part.problems]
  skipped = _count_skipped(parts, caption_use) if problems else {}
  folder.check_problems(root, problems, skipped, on_missing, _LOOKED_FOR)
  train_parts = [p for p in parts if p.split == "train"]
  return Dataset(
    name=f"fashioniq/{category}",
    train=_to_train_split(train_parts, caption_use, store) if train else None,
    evals=tuple(_to_eval_split(p, caption_use, store) for p in parts if p.split == "val"),
    skipped=skipped,
    image_digest=verified.digest,
    remarks=(
      *(
        f"{split_file(a.category, a.split)}: {a.n_repeated:,} repeated ids, each counts once"
        for a in annotations
        if a.n_repeated
      ),
      *verified.remarks,
    ),
  )


def gallery_ids(annotations: Annotations) -> dict[str, tuple[str, ...]]:
  """Ids of the two galleries, in gallery order: {"val_split", "original_split"}."""
  return {"val_split": annotations.named_ids, "original_split": annotations.image_ids}


def use_captions(captions: tuple[str, str], caption_use: str) -> tuple[tuple[str, ...], ...]:
  """The texts that one entry gives rise to: one for "joined" and "mixed", two otherwise.

  Those of "mixed" are what queries are asked with; training draws its own.

  Raises:
    UserError: unknown caption_use.
  """
  folder.check_choice("caption_use", caption_use, CAPTION_USES)
  first, second = captions
  return {
    "joined": ((first, second),),
    "both_orders": ((first, second), (second, first)),
    "separate": ((first,), (second,)),
    "mixed": ((sentences.query(captions),),),
  }[caption_use]


def locate_images(
  root: str | os.PathLike, ids: dict[str, Sequence[str]]
) -> dict[str, dict[str, str] | None]:
  """Finds image files by listing every folder once.

  Args:
    root: the data folder.
    ids: category -> image ids to find.

  Returns:
    category -> {id: path} of the images found, or None if there is no folder for the category.
  """
  root = pathlib.Path(root)
  listings = {
    name: files.list_images(root / name)
    for name in dict.fromkeys(f.format(category) for category in ids for f in _IMAGE_FOLDERS)
  }
  paths = {}
  for category, wanted in ids.items():
    folders = [listings[f.format(category)] for f in _IMAGE_FOLDERS]
    present = [listing for listing in folders if listing is not None]
    found = {
      i: next((listing[i] for listing in present if i in listing), None)
      for i in dict.fromkeys(wanted)
    }
    paths[category] = {i: p for i, p in found.items() if p is not None} if present else None
  return paths


@dataclasses.dataclass(frozen=True)
class _Part:
  """A category of a split: what its annotations ask for and what is left of it.

  Attributes:
    annotations: of the category and split.
    paths: id -> path of the readable images.
    entries: the entries of which both images are readable.
    problems: all that is wrong with the part.
  """

  annotations: Annotations
  paths: dict[str, str]
  entries: tuple[Entry, ...]
  problems: tuple[missing.Problem, ...]

  @property
  def split(self) -> str:
    return self.annotations.split


def _to_part(
  root: pathlib.Path, a: Annotations, paths: dict[str, str] | None, unreadable: dict[str, str]
) -> _Part:
  problems = list(a.problems)
  if paths is None:
    tried = ", ".join(f"{f.format(a.category)}/" for f in _IMAGE_FOLDERS)
    where = f"images of {a.category}"
    problems.append(missing.Problem(missing.FATAL, where, f"none of the folders {tried} exists"))
    return _Part(a, {}, (), tuple(problems))
  readable = {}
  for image_id in a.needed_ids:
    path = paths.get(image_id)
    if path is None:
      problems.append(missing.Problem(missing.IMAGES_MISSING, f"{a.category} {image_id}"))
    elif path in unreadable:
      problems.append(folder.unreadable_problem(root, path, unreadable[path]))
    else:
      readable[image_id] = path
  entries = tuple(e for e in a.entries if e.reference in readable and e.target in readable)
  if not entries and not any(p.sort == missing.FATAL for p in problems):
    where = captions_file(a.category, a.split)
    what = f"nothing is left of its {a.n_items} entries"
    problems.append(missing.Problem(missing.FATAL, where, what, mend=""))
  return _Part(a, readable, entries, tuple(problems))


def _count_skipped(parts: Sequence[_Part], caption_use: str) -> dict:
  """See `dataset.Dataset.skipped`."""
  n_texts = len(use_captions(("", ""), caption_use))
  skipped = {}
  train = [p for p in parts if p.split == "train"]
  if train:
    n_items = sum(p.annotations.n_items for p in train)
    skipped["train"] = {
      **missing.count([problem for p in train for problem in p.problems]),
      "triplets": n_texts * (n_items - sum(len(p.entries) for p in train)),
      "of_triplets": n_texts * n_items,
    }
  skipped["val"] = {}
  for p in parts:
    if p.split != "val":
      continue
    counts = missing.count(p.problems)
    counts["queries"] = n_texts * (p.annotations.n_items - len(p.entries))
    counts["of_queries"] = n_texts * p.annotations.n_items
    for protocol, ids in gallery_ids(p.annotations).items():
      counts[protocol] = sum(i not in p.paths for i in ids)
      counts[f"of_{protocol}"] = len(ids)
    skipped["val"][p.annotations.category] = counts
  return skipped


def _to_train_split(
  parts: Sequence[_Part], caption_use: str, store: ImageStore | None
) -> TrainSplit:
  rows: dict[str, int] = {}  # By path: in the flat layout categories share files.
  triplets = []
  mixed = caption_use == "mixed"
  for p in parts:
    ids = used_ids(p.entries)
    row = {i: rows.setdefault(p.paths[i], len(rows)) for i in ids}
    triplets.append(_to_triplets(p.entries, row, "joined" if mixed else caption_use))
  joined = _concatenate(triplets)
  return TrainSplit(
    image_paths=tuple(rows),
    triplets=sentences.DrawnSentences(joined) if mixed else joined,
    # Of all good entries, with or without images: the ids of words do not depend on which image
    # files a copy of the data lacks.
    captions=tuple(c for p in parts for entry in p.annotations.entries for c in entry.captions),
    store=store,
  )


def _to_triplets(entries: Iterable[Entry], row: dict[str, int], caption_use: str) -> Triplets:
  items = [(e, text) for e in entries for text in use_captions(e.captions, caption_use)]
  kinds = tuple(e.kind for e, _ in items)
  return Triplets(
    reference=np.array([row[e.reference] for e, _ in items], np.int32),
    target=np.array([row[e.target] for e, _ in items], np.int32),
    texts=tuple(text for _, text in items),
    kinds=None if None in kinds else kinds,
  )


def _concatenate(parts: Sequence[Triplets]) -> Triplets:
  has_kinds = all(p.kinds is not None for p in parts)
  return Triplets(
    reference=np.concatenate([p.reference for p in parts]),
    target=np.concatenate([p.target for p in parts]),
    texts=tuple(text for p in parts for text in p.texts),
    kinds=tuple(kind for p in parts for kind in p.kinds) if has_kinds else None,
  )


def _to_eval_split(part: _Part, caption_use: str, store: ImageStore | None) -> EvalSplit:
  row = {image_id: i for i, image_id in enumerate(part.paths)}
  galleries = {
    protocol: np.array([row[i] for i in ids if i in row], np.int32)
    for protocol, ids in gallery_ids(part.annotations).items()
  }
  return EvalSplit(
    name=part.annotations.category,
    image_ids=tuple(part.paths),
    image_paths=tuple(part.paths.values()),
    queries=_to_triplets(part.entries, row, caption_use),
    galleries=galleries | {WITH_REFERENCE: galleries["original_split"]},
    ranks_reference={WITH_REFERENCE: True},
    store=store,
  )


def _read_configured(data: ml_collections.ConfigDict, **options) -> Dataset:
  return read(data.root, data.category, data.captions, on_missing=data.on_missing, **options)


SPEC = DatasetSpec(
  name="fashioniq",
  read=_read_configured,
  protocols={
    "val_split": "the union of the queries' images (VAL, CLVC-Net, CRN, TG-CIR)",
    "original_split": "the whole list of the category (DCNet)",
    WITH_REFERENCE: "the same with the query's own reference (CLIP4Cir, SPRC)",
  },
  tfds=TfdsSpec(
    class_name="CrnFashionIQ",
    description="FashionIQ (Wu et al., CVPR 2021): a reference image and two captions -> a target.",
    homepage="https://github.com/XiaoxiaoGuo/fashion-iq",
    manual_download_instructions=(
      "A folder with captions/, image_splits/ and resized_image/CATEGORY/."
    ),
    parts=(*CATEGORIES, "all"),
    short_side=256,
    read=lambda root, part, on_missing: read(root, part, on_missing=on_missing),
  ),
  part=lambda data: data.category,
)
