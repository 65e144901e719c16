"""Reads Shoes folders (Guo et al., "Dialog-based Interactive Image Retrieval", NeurIPS 2018).

Expected below the root:

  relative_captions_shoes.json   [{"ImageName": target, "ReferenceImageName": reference,
                                   "RelativeCaption": text}]
  train_im_names.txt             one image name a line
  eval_im_names.txt              the same; these images are the gallery
  womens_*/*/NAME                the images

Folders are those with "womens" in their name. Where they hold a name twice, the first in sorted
order is taken.
"""

import json
import os
import pathlib
import reprlib

import numpy as np

from crn_jax.input_pipeline.checks import folder, missing
from crn_jax.input_pipeline.dataset import EvalSplit, TrainSplit, Triplets

PAIRS = ("released", "unique")
GALLERY = "eval_list"

_CAPTIONS = "relative_captions_shoes.json"
_KEYS = ("ReferenceImageName", "ImageName", "RelativeCaption")
_LOOKED_FOR = "womens*/*/NAME.jpg"

# (reference, target, text)
Pair = tuple[str, str, str]


def read(
  root: str | os.PathLike,
  pairs: str = "released",
  *,
  train: bool = True,
  on_missing: str = "error",
  known_digest: str | None = None,
) -> folder.Folder:
  """Reads the folder and verifies every image that will be read.

  Args:
    root: see the head of this module.
    pairs: "released": as the PyTorch release of CRN, for every name of a split's list every
      annotation that has it at either end, so that most pairs come twice and a pair with one end
      in the list comes once; targets outside the gallery are misses. "unique": every annotation
      with both ends in the list, once, in file order.
    train: whether the train split is wanted; its list need not exist otherwise.
    on_missing: "error", or "skip" to leave out what holes affect.
    known_digest: `image_digest` of an earlier call; unchanged image files are then not decoded.

  Raises:
    FileNotFoundError: there is no such root.
    ValueError: unknown choice; or the folder has holes, all of them in one message.
  """
  folder.check_choice("data.shoes_pairs", pairs, PAIRS)
  folder.check_choice("data.on_missing", on_missing, folder.ON_MISSING)
  root = folder.check_root(
    root, f"a Shoes folder with {_CAPTIONS}, train_im_names.txt, eval_im_names.txt and womens_*/"
  )
  annotations, shared_problems = _read_annotations(root)
  located, n_twice = _locate_images(root)
  remarks = [f"{n_twice:,} image names have several files; the first is used"] if n_twice else []
  asked, names, problems, wanted = {}, {}, {}, {}
  for split in ("train", "eval") if train else ("eval",):
    listed, problems[split] = folder.read_lines(root, f"{split}_im_names.txt")
    listed = [name.strip() for name in listed if name.strip()]
    names[split] = tuple(dict.fromkeys(listed))
    if len(names[split]) < len(listed):
      repeated = len(listed) - len(names[split])
      remarks.append(f"{split}_im_names.txt: {repeated:,} repeated names, each counts once")
    problems[split] = [*shared_problems, *problems[split]]
    asked[split] = choose_pairs(annotations, names[split], pairs)
    ends = (name for reference, target, _ in asked[split] for name in (reference, target))
    wanted[split] = tuple(dict.fromkeys([*(names[split] if split == "eval" else ()), *ends]))
  files = [located[name] for keys in wanted.values() for name in keys if name in located]
  unreadable, digest = folder.find_unreadable(root, files, known_digest)
  paths, left = {}, {}
  for split, keys in wanted.items():
    problems[split] += folder.image_problems(root, keys, located, unreadable)
    paths[split] = {
      name: located[name] for name in keys if name in located and located[name] not in unreadable
    }
    good = paths[split]
    left[split] = [pair for pair in asked[split] if pair[0] in good and pair[1] in good]
    if not left[split] and not any(p.sort == missing.FATAL for p in problems[split]):
      what = f"nothing is left of its {len(asked[split])} pairs"
      problems[split].append(missing.Problem(missing.FATAL, f"{split}_im_names.txt", what))
  skipped = _count_skipped(problems, asked, left, names, paths, train)
  everything = [p for found in problems.values() for p in found]
  folder.check_problems(root, everything, skipped, on_missing, _LOOKED_FOR)
  return folder.Folder(
    _to_train_split(left["train"], asked["train"], paths["train"]) if train else None,
    (_to_eval_split(left["eval"], names["eval"], paths["eval"]),),
    skipped,
    digest,
    tuple(remarks),
  )


def choose_pairs(annotations: list[Pair], names: tuple[str, ...], pairs: str) -> list[Pair]:
  """The pairs of a split, in the order of the release or of the file; see `read`."""
  if pairs == "unique":
    known = frozenset(names)
    return [pair for pair in annotations if pair[0] in known and pair[1] in known]
  by_name: dict[str, list[Pair]] = {}
  for pair in annotations:
    for name in dict.fromkeys(pair[:2]):
      by_name.setdefault(name, []).append(pair)
  return [pair for name in names for pair in by_name.get(name, ())]


def _read_annotations(root: pathlib.Path) -> tuple[list[Pair], list[missing.Problem]]:
  try:
    items = json.loads((root / _CAPTIONS).read_text(encoding="utf-8-sig"))
  except FileNotFoundError:
    return [], [missing.Problem(missing.FATAL, _CAPTIONS, "no such file")]
  except OSError as error:
    return [], [missing.Problem(missing.FATAL, _CAPTIONS, f"cannot be opened ({error.strerror})")]
  except ValueError as error:  # Malformed JSON or UTF-8.
    return [], [missing.Problem(missing.FATAL, _CAPTIONS, f"not valid JSON ({error})")]
  if not isinstance(items, list) or not items:
    found = "an empty list" if items == [] else f"a JSON value of type {type(items).__name__}"
    return [], [
      missing.Problem(missing.FATAL, _CAPTIONS, f"expected a list of pairs, found {found}")
    ]
  annotations, problems = [], []
  for i, item in enumerate(items):
    if isinstance(item, dict) and all(isinstance(item.get(key), str) for key in _KEYS):
      reference, target, text = (item[key] for key in _KEYS)
      annotations.append((reference, target, text.strip()))
    else:
      what = f"expected an object with strings {', '.join(_KEYS)}, found {reprlib.repr(item)}"
      where = f"{_CAPTIONS}, item {i}"
      problems.append(missing.Problem(missing.ENTRIES_MALFORMED, where, what))
  return annotations, problems


def _locate_images(root: pathlib.Path) -> tuple[dict[str, str], int]:
  """name -> path, in sorted order of the paths, and the number of names with several files."""
  located, twice = {}, set()
  for top in sorted(p for p in root.iterdir() if "womens" in p.name and p.is_dir()):
    for path in sorted(top.glob("*/*.jpg")):
      if path.name in located:
        twice.add(path.name)
      elif path.is_file():  # A link that leads nowhere is no file.
        located[path.name] = str(path)
  return located, len(twice)


def _count_skipped(problems, asked, left, names, paths, train: bool) -> dict:
  def part(split, what, **galleries):
    n = len(asked[split])
    return folder.Part(problems[split], {what: (n - len(left[split]), n), **galleries})

  lost = sum(name not in paths["eval"] for name in names["eval"])
  val = part("eval", "queries", **{GALLERY: (lost, len(names["eval"]))})
  return folder.count_skipped(part("train", "triplets") if train else None, "shoes", val)


def _to_train_split(left: list[Pair], asked: list[Pair], paths: dict[str, str]) -> TrainSplit:
  used = tuple(dict.fromkeys(name for pair in left for name in pair[:2]))
  row = {name: i for i, name in enumerate(used)}
  return TrainSplit(
    image_paths=tuple(paths[name] for name in used),
    triplets=_to_triplets(left, row),
    # With or without images: the ids of words do not depend on what a copy of the data lacks.
    captions=tuple(text for _, _, text in asked),
  )


def _to_eval_split(left: list[Pair], names: tuple[str, ...], paths: dict[str, str]) -> EvalSplit:
  row = {name: i for i, name in enumerate(paths)}
  return EvalSplit(
    name="shoes",
    image_ids=tuple(paths),
    image_paths=tuple(paths.values()),
    queries=_to_triplets(left, row),
    galleries={GALLERY: np.array([row[name] for name in names if name in row], np.int32)},
  )


def _to_triplets(pairs: list[Pair], row: dict[str, int]) -> Triplets:
  return Triplets(
    reference=np.array([row[reference] for reference, _, _ in pairs], np.int32),
    target=np.array([row[target] for _, target, _ in pairs], np.int32),
    texts=tuple((text,) for _, _, text in pairs),
  )
