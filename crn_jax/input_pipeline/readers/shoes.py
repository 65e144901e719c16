"""Reads Shoes folders (Guo et al., "Dialog-based Interactive Image Retrieval", NeurIPS 2018).

Expected below the root:

  relative_captions_shoes.json   [{"ImageName": target, "ReferenceImageName": reference,
                                   "RelativeCaption": text}]
  train_im_names.txt             one image name a line
  eval_im_names.txt              the same; these images are the gallery
  womens_*/*/NAME                the images

Folders are those with "womens" in their name. Where they hold a name twice, the first in sorted
order is taken. A file may end in .jpg, .jpeg or .png, whichever the lists say.
"""

import os
import pathlib
import reprlib

import ml_collections

from crn_jax.input_pipeline.checks import folder, missing
from crn_jax.input_pipeline.dataset import Dataset, DatasetSpec, ImageStore, TfdsSpec
from crn_jax.input_pipeline.readers import files, named

PAIRS = ("released", "unique")
GALLERY = "eval_list"

_CAPTIONS = "relative_captions_shoes.json"
_KEYS = ("ReferenceImageName", "ImageName", "RelativeCaption")
_LOOKED_FOR = "womens*/*/NAME; .jpg, .jpeg or .png"

# (reference, target, text)
Pair = tuple[str, str, str]


def read(
  root: str | os.PathLike,
  pairs: str = "released",
  *,
  train: bool = True,
  on_missing: str = "error",
  known_digest: str | None = None,
  store: ImageStore | None = None,
) -> Dataset:
  """Reads the folder and verifies every image that will be read.

  Args:
    root: see the head of this module.
    pairs: "released": as the PyTorch release of CRN, for every name of a split's list every
      annotation that has it at either end, so that most pairs come twice and a pair with one end
      in the list comes once; targets outside the gallery are misses. "unique": every annotation
      with both ends in the list, once, in file order.
    train: whether the train split is wanted; its list need not exist otherwise.
    on_missing: "error", or "skip" to leave out what missing data affect.
    known_digest: `image_digest` of an earlier call; unchanged image files are then not decoded.
    store: what the splits hold as theirs.

  Raises:
    UserError: no such root, an unknown choice, or missing or damaged data, all of it in one
      message.
  """
  folder.check_choice("data.shoes_pairs", pairs, PAIRS)
  folder.check_choice("data.on_missing", on_missing, folder.ON_MISSING)
  root = folder.check_root(
    root, f"a Shoes folder with {_CAPTIONS}, train_im_names.txt, eval_im_names.txt and womens_*/"
  )
  annotations, problems = _read_annotations(root)
  located, n_twice = _locate_images(root)
  remarks = [f"{n_twice:,} image names have several files; the first is used"] if n_twice else []
  asked = {}
  for split in ("train", "eval") if train else ("eval",):
    file = f"{split}_im_names.txt"
    lines, list_problems = files.read_lines(root, file)
    listed = [line.strip() for line in lines if line.strip()]
    names = tuple(dict.fromkeys(listed))
    if repeated := len(listed) - len(names):
      remarks.append(f"{file}: {repeated:,} repeated names, each counts once")
    asked[split] = named.Annotated(
      file,
      [(r, t, (text,)) for r, t, text in choose_pairs(annotations, names, pairs)],
      gallery=names if split == "eval" else (),
      problems=[*problems, *list_problems],
    )
  wanted = dict.fromkeys(name for split in asked.values() for name in split.names)
  return named.to_dataset(
    "shoes",
    root,
    asked.get("train"),
    asked["eval"],
    {name: located[files.stem(name)] for name in wanted if files.stem(name) in located},
    protocol=GALLERY,
    looked_for=_LOOKED_FOR,
    on_missing=on_missing,
    known_digest=known_digest,
    store=store,
    remarks=remarks,
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
  items, problems = files.read_json_list(root, _CAPTIONS, "pairs")
  annotations = []
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
  """stem -> path, and the number of stems with files in several folders."""
  located, twice = {}, set()
  for top in sorted(p for p in root.iterdir() if "womens" in p.name and p.is_dir()):
    for inner in sorted(top.iterdir()):
      for stem, path in (files.list_images(inner) or {}).items():
        if stem in located:
          twice.add(stem)
        else:
          located[stem] = path
  return located, len(twice)


def _read_configured(data: ml_collections.ConfigDict, **options) -> Dataset:
  return read(data.root, data.shoes_pairs, on_missing=data.on_missing, **options)


SPEC = DatasetSpec(
  name="shoes",
  read=_read_configured,
  protocols={GALLERY: "the images of eval_im_names.txt; a target that is not among them is a miss"},
  tfds=TfdsSpec(
    class_name="CrnShoes",
    description="Shoes (Guo et al., NeurIPS 2018): a reference image and a caption -> a target.",
    homepage="https://github.com/XiaoxiaoGuo/fashion-retrieval",
    manual_download_instructions=f"A folder with {_CAPTIONS} and womens_*/.",
    parts=PAIRS,
    short_side=256,
    read=lambda root, part, on_missing: read(root, part, on_missing=on_missing),
  ),
  part=lambda data: data.shoes_pairs,
)
