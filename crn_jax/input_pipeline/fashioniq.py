"""Reads FashionIQ folders (Wu et al., "Fashion IQ", CVPR 2021) into the plain values of `dataset`.

Expected below the root:

  captions/cap.{category}.{split}.json        [{"candidate": id, "target": id, "captions": [a, b]}]
  image_splits/split.{category}.{split}.json  [id, ...]
  resized_image/{category}/{id}.jpg           or images/{category}/, or flat images/;
                                              .jpg, .jpeg or .png

The candidate is the reference image. Other keys of an entry are ignored, except an optional
string "kind" (kind of text), which is kept when every entry read has it.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from crn_jax.input_pipeline.dataset import EvalSplit, TrainSplit, Triplets

CATEGORIES = ("dress", "shirt", "toptee")
CAPTION_USES = ("joined", "both_orders", "separate")

_EXTENSIONS = (".jpg", ".jpeg", ".png")
_MAX_LISTED = 10


@dataclasses.dataclass(frozen=True)
class Entry:
  """One item of a captions file.

  Attributes:
    reference: id of the candidate image.
    target: id of the target image.
    captions: the two captions, as written.
    kind: kind of text, or None if not recorded.
  """

  reference: str
  target: str
  captions: tuple[str, str]
  kind: str | None = None


@dataclasses.dataclass(frozen=True)
class Annotations:
  """The two annotation files of one category and split.

  Attributes:
    category: "dress", "shirt" or "toptee".
    entries: items of the captions file, in file order.
    image_ids: ids of the split list, in file order, each once.
  """

  category: str
  entries: tuple[Entry, ...]
  image_ids: tuple[str, ...]


def read_train(root: str | os.PathLike, category: str, caption_use: str = "joined") -> TrainSplit:
  """Reads the train split of one category, or of all three together.

  Args:
    root: folder with captions/, image_splits/ and the images.
    category: "dress", "shirt", "toptee", or "all" for the three in this order.
    caption_use: "joined" (an entry is one triplet with both captions: VAL split papers, CRN),
      "both_orders" (two triplets, the captions in either order: CoSMo, ARTEMIS) or
      "separate" (two triplets with one caption each: VAL).

  Returns:
    The split. `image_paths` holds the images that triplets use, in order of first appearance,
    reference before target.

  Raises:
    FileNotFoundError: an annotation file, the image folder or images are missing.
    ValueError: unknown category or caption_use, or an annotation file that is not as expected.
  """
  _check_caption_use(caption_use)
  root = _check_root(root)
  annotations = _read_all(root, category, "train")
  paths, missing = locate_images(root, {a.category: _used_ids(a.entries) for a in annotations})
  _require_no_missing(root, "train", missing)

  rows: dict[str, int] = {}  # By path: in the flat layout categories share files.
  row_of = {}
  for a in annotations:
    for image_id in _used_ids(a.entries):
      path = paths[a.category][image_id]
      row_of[a.category, image_id] = rows.setdefault(path, len(rows))
  parts = [
    _to_triplets(a.entries, {i: row_of[a.category, i] for i in _used_ids(a.entries)}, caption_use)
    for a in annotations
  ]
  return TrainSplit(
    image_paths=tuple(rows),
    triplets=_concatenate(parts),
    captions=tuple(c for a in annotations for entry in a.entries for c in entry.captions),
  )


def read_val(
  root: str | os.PathLike, category: str, caption_use: str = "joined"
) -> tuple[EvalSplit, ...]:
  """Reads the val split: queries and the galleries of both published protocols.

  Galleries: "val_split", the reference and target images of the queries in order of first
  appearance, reference before target (VAL, CLVC-Net, CRN); "original_split", the whole split
  list (CLIP4Cir, the challenge).

  Args:
    root: folder with captions/, image_splits/ and the images.
    category: "dress", "shirt", "toptee", or "all".
    caption_use: as in `read_train`.

  Returns:
    One split per category, so three for "all". All images of the split list are in it.

  Raises:
    FileNotFoundError: an annotation file, the image folder or images are missing.
    ValueError: unknown category or caption_use, or an annotation file that is not as expected.
  """
  _check_caption_use(caption_use)
  root = _check_root(root)
  annotations = _read_all(root, category, "val")
  paths, missing = locate_images(root, {a.category: a.image_ids for a in annotations})
  _require_no_missing(root, "val", missing)
  return tuple(_to_eval_split(a, paths[a.category], caption_use) for a in annotations)


def read_annotations(root: str | os.PathLike, category: str, split: str) -> Annotations:
  """Reads and checks the captions and the split list of one category; images are not needed.

  Args:
    root: folder with captions/ and image_splits/.
    category: "dress", "shirt" or "toptee".
    split: "train" or "val".

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is malformed, or an entry names an image outside the split list.
  """
  root = pathlib.Path(root)
  split_path = root / "image_splits" / f"split.{category}.{split}.json"
  captions_path = root / "captions" / f"cap.{category}.{split}.json"
  ids = _read_json_list(split_path, "image ids")
  for i, image_id in enumerate(ids):
    if not isinstance(image_id, str):
      raise ValueError(
        f"{split_path}: expected a list of image ids (strings); item {i} is {image_id!r}"
      )
  image_ids = tuple(dict.fromkeys(ids))
  entries = tuple(
    _parse_entry(item, i, captions_path)
    for i, item in enumerate(_read_json_list(captions_path, "entries"))
  )
  known = frozenset(image_ids)
  for i, entry in enumerate(entries):
    for key, image_id in (("candidate", entry.reference), ("target", entry.target)):
      if image_id not in known:
        raise ValueError(
          f"{captions_path}: {key} {image_id!r} of item {i} is not in the split "
          f"list {split_path}; take both files from the same release of FashionIQ"
        )
  return Annotations(category=category, entries=entries, image_ids=image_ids)


def gallery_rows(annotations: Annotations) -> dict[str, np.ndarray]:
  """Galleries of both protocols.

  Returns:
    {"val_split": [g] int32, "original_split": [n] int32}, positions in the split list.
  """
  row = {image_id: i for i, image_id in enumerate(annotations.image_ids)}
  return {
    "val_split": np.array([row[i] for i in _used_ids(annotations.entries)], np.int32),
    "original_split": np.arange(len(row), dtype=np.int32),
  }


def use_captions(captions: tuple[str, str], caption_use: str) -> tuple[tuple[str, ...], ...]:
  """The texts that one entry gives rise to: one for "joined", two otherwise.

  Raises:
    ValueError: unknown caption_use.
  """
  _check_caption_use(caption_use)
  first, second = captions
  return {
    "joined": ((first, second),),
    "both_orders": ((first, second), (second, first)),
    "separate": ((first,), (second,)),
  }[caption_use]


def image_folders(root: pathlib.Path, category: str) -> tuple[pathlib.Path, ...]:
  """Folders in which images of a category may lie; an earlier one wins over a later one."""
  return root / "resized_image" / category, root / "images" / category, root / "images"


def locate_images(
  root: str | os.PathLike, ids: dict[str, Sequence[str]]
) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
  """Finds image files by listing every folder once.

  Args:
    root: the data folder.
    ids: category -> image ids to find.

  Returns:
    paths: category -> {id: path} of the images found.
    missing: category -> ids without a file; only categories that miss some.

  Raises:
    FileNotFoundError: none of the folders exists for a category.
  """
  root = pathlib.Path(root)
  listings = {
    folder: _list_images(folder)
    for folder in dict.fromkeys(f for category in ids for f in image_folders(root, category))
  }
  paths, missing = {}, {}
  for category, wanted in ids.items():
    folders = image_folders(root, category)
    present = [listings[f] for f in folders if listings[f] is not None]
    if not present:
      tried = ", ".join(f"{f}/" for f in folders)
      raise FileNotFoundError(
        f"no image folder for {category}: tried {tried}; put the images "
        "there as <id>.jpg, .jpeg or .png"
      )
    paths[category] = {}
    absent = []
    for image_id in dict.fromkeys(wanted):
      path = next((listing[image_id] for listing in present if image_id in listing), None)
      if path is None:
        absent.append(image_id)
      else:
        paths[category][image_id] = path
    if absent:
      missing[category] = absent
  return paths, missing


def _check_caption_use(caption_use: str) -> None:
  if caption_use not in CAPTION_USES:
    raise ValueError(f"caption_use: expected one of {CAPTION_USES}, got {caption_use!r}")


def _check_root(root: str | os.PathLike) -> pathlib.Path:
  # Shells leave the ~ of --config.data.root=~/x as it is.
  path = pathlib.Path(root).expanduser()
  if not path.is_dir():
    raise FileNotFoundError(
      f"{path}: no such folder; expected a FashionIQ folder with captions/, "
      "image_splits/ and resized_image/ or images/"
    )
  return path


def _read_all(root: pathlib.Path, category: str, split: str) -> list[Annotations]:
  if category != "all" and category not in CATEGORIES:
    raise ValueError(f"category: expected one of {(*CATEGORIES, 'all')}, got {category!r}")
  categories = CATEGORIES if category == "all" else (category,)
  return [read_annotations(root, c, split) for c in categories]


def _read_json_list(path: pathlib.Path, what: str) -> list:
  try:
    with open(path, encoding="utf-8") as f:
      value = json.load(f)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{path}: no such file; the annotations are published at "
      "https://github.com/XiaoxiaoGuo/fashion-iq"
    ) from error
  except ValueError as error:  # Malformed JSON or UTF-8.
    raise ValueError(f"{path}: not valid JSON ({error}); fetch the file again") from error
  if not isinstance(value, list) or not value:
    found = "an empty list" if value == [] else f"a JSON value of type {type(value).__name__}"
    raise ValueError(f"{path}: expected a list of {what}, found {found}")
  return value


def _parse_entry(item: object, i: int, path: pathlib.Path) -> Entry:
  expected = f"{path}: expected a list of objects with keys candidate, target, captions; item {i}"
  if not isinstance(item, dict):
    raise ValueError(f"{expected} is {item!r}")
  if not {"candidate", "target", "captions"} <= item.keys():
    raise ValueError(f"{expected} has keys {sorted(item)}")
  for key in ("candidate", "target"):
    if not isinstance(item[key], str):
      raise ValueError(
        f"{path}: expected an image id (string) as {key}; item {i} has {item[key]!r}"
      )
  captions = item["captions"]
  if (
    not isinstance(captions, list)
    or len(captions) != 2
    or not all(isinstance(c, str) for c in captions)
  ):
    raise ValueError(f"{path}: expected two strings as captions; item {i} has {captions!r}")
  kind = item.get("kind")
  return Entry(
    reference=item["candidate"],
    target=item["target"],
    captions=tuple(captions),
    kind=kind if isinstance(kind, str) else None,
  )


def _used_ids(entries: Iterable[Entry]) -> tuple[str, ...]:
  """Ids in order of first appearance, reference before target."""
  return tuple(dict.fromkeys(i for entry in entries for i in (entry.reference, entry.target)))


def _list_images(folder: pathlib.Path) -> dict[str, str] | None:
  """id -> path of the images in a folder, or None if there is no such folder."""
  if not folder.is_dir():
    return None
  found: dict[str, tuple[int, str]] = {}
  with os.scandir(folder) as entries:
    for entry in entries:
      stem, extension = os.path.splitext(entry.name)
      if extension.lower() not in _EXTENSIONS:
        continue
      # Listings come in any order: the extension decides which of two files of one id is taken.
      candidate = (_EXTENSIONS.index(extension.lower()), entry.path)
      if stem not in found or candidate < found[stem]:
        found[stem] = candidate
  return {stem: path for stem, (_, path) in found.items()}


def _require_no_missing(root: pathlib.Path, split: str, missing: dict[str, list[str]]) -> None:
  if not missing:
    return
  names = [f"{category}/{i}" for category, ids in missing.items() for i in ids]
  listed = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")
  folders = "; ".join(
    " or ".join(f"{f}/" for f in image_folders(root, category)) for category in missing
  )
  raise FileNotFoundError(
    f"{len(names)} images of the {split} split have no file: {listed}; "
    f"expected <id>.jpg, .jpeg or .png in {folders}"
  )


def _to_triplets(entries: Sequence[Entry], row: dict[str, int], caption_use: str) -> Triplets:
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


def _to_eval_split(annotations: Annotations, paths: dict[str, str], caption_use: str) -> EvalSplit:
  row = {image_id: i for i, image_id in enumerate(annotations.image_ids)}
  return EvalSplit(
    name=annotations.category,
    image_ids=annotations.image_ids,
    image_paths=tuple(paths[i] for i in annotations.image_ids),
    queries=_to_triplets(annotations.entries, row, caption_use),
    galleries=gallery_rows(annotations),
  )
