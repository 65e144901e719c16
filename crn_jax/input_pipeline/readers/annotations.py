"""Parses the annotation files of FashionIQ; what is wrong with them is collected, not raised."""

import dataclasses
import os
import pathlib
import reprlib
from collections.abc import Iterable

from crn_jax.input_pipeline.checks.missing import (
  ENTRIES_MALFORMED,
  ENTRIES_OUTSIDE_SPLIT,
  FATAL,
  Problem,
)
from crn_jax.input_pipeline.readers.files import read_json_list


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
    split: "train" or "val".
    entries: the good items of the captions file, in file order; whether there are image files is
      not looked at.
    image_ids: ids of the split list, in file order, each once.
    named_ids: those of `image_ids` that items name, in order of first appearance, candidate before
      target. Bad items count: the gallery made of these ids shall not shrink with the queries.
    n_items: number of items of the captions file, good or bad.
    n_repeated: number of ids that the split list names again.
    problems: what is wrong. A file that cannot be used at all is a fatal problem, and counts as
      empty above.
  """

  category: str
  split: str
  entries: tuple[Entry, ...]
  image_ids: tuple[str, ...]
  named_ids: tuple[str, ...]
  n_items: int
  n_repeated: int
  problems: tuple[Problem, ...]

  @property
  def needed_ids(self) -> tuple[str, ...]:
    """Ids of the images that are read: in train those of the entries, in val the whole list."""
    return used_ids(self.entries) if self.split == "train" else self.image_ids


def captions_file(category: str, split: str) -> str:
  """Name of a captions file below the root."""
  return f"captions/cap.{category}.{split}.json"


def split_file(category: str, split: str) -> str:
  """Name of a split list below the root."""
  return f"image_splits/split.{category}.{split}.json"


def used_ids(entries: Iterable[Entry]) -> tuple[str, ...]:
  """Ids in order of first appearance, reference before target."""
  return tuple(dict.fromkeys(i for entry in entries for i in (entry.reference, entry.target)))


def read_annotations(root: str | os.PathLike, category: str, split: str) -> Annotations:
  """Reads and checks the captions and the split list of one category; images are not needed.

  Args:
    root: folder with captions/ and image_splits/.
    category: "dress", "shirt" or "toptee".
    split: "train" or "val".
  """
  root = pathlib.Path(root)
  captions_name, split_name = captions_file(category, split), split_file(category, split)
  items, problems = read_json_list(root, captions_name, "entries")
  ids, split_problems = read_json_list(root, split_name, "image ids")
  problems += split_problems
  wrong = next((i for i, image_id in enumerate(ids) if not isinstance(image_id, str)), None)
  if wrong is not None:
    what = f"expected a list of image ids (strings); item {wrong} is {reprlib.repr(ids[wrong])}"
    problems.append(Problem(FATAL, split_name, what))
    ids = []
  known = frozenset(ids)
  entries, named = [], []
  for i, item in enumerate(items):
    where = f"{captions_name}, item {i}"
    if isinstance(item, dict):
      named += [item.get("candidate"), item.get("target")]
    entry = _parse_entry(item)
    if isinstance(entry, str):
      problems.append(Problem(ENTRIES_MALFORMED, where, entry))
      continue
    # Without a split list no id can be outside it.
    outside = [
      f"{key} {image_id!r}"
      for key, image_id in (("candidate", entry.reference), ("target", entry.target))
      if known and image_id not in known
    ]
    if outside:
      what = f"{' and '.join(outside)} not in {split_name}"
      problems.append(Problem(ENTRIES_OUTSIDE_SPLIT, where, what))
    else:
      entries.append(entry)
  return Annotations(
    category=category,
    split=split,
    entries=tuple(entries),
    image_ids=tuple(dict.fromkeys(ids)),
    named_ids=tuple(dict.fromkeys(i for i in named if isinstance(i, str) and i in known)),
    n_items=len(items),
    n_repeated=len(ids) - len(frozenset(ids)),
    problems=tuple(problems),
  )


def _parse_entry(item: object) -> Entry | str:
  """The entry, or what is wrong with it."""
  keys = ("candidate", "target", "captions")
  if not isinstance(item, dict):
    return f"expected an object with keys {', '.join(keys)}, found {reprlib.repr(item)}"
  absent = [key for key in keys if key not in item]
  if absent:
    return f"no key {', '.join(absent)}; found {', '.join(sorted(item)) or 'none'}"
  for key in ("candidate", "target"):
    if not isinstance(item[key], str):
      return f"expected an image id (string) as {key}, found {reprlib.repr(item[key])}"
  captions = item["captions"]
  if (
    not isinstance(captions, list)
    or len(captions) != 2
    or not all(isinstance(c, str) for c in captions)
  ):
    return f"expected two strings as captions, found {reprlib.repr(captions)}"
  kind = item.get("kind")
  return Entry(
    reference=item["candidate"],
    target=item["target"],
    captions=tuple(captions),
    kind=kind if isinstance(kind, str) else None,
  )
