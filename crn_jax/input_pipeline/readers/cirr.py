"""Reads CIRR folders (Liu et al., "Image Retrieval on Real-life Images", ICCV 2021), version rc2.

Expected below the root:

  captions/cap.rc2.{train,val,test1}.json        [{"pairid": 1, "reference": name,
                                                   "target_hard": name, "caption": text,
                                                   "img_set": {"members": [six names]}}]
  image_splits/split.rc2.{train,val,test1}.json  {name: "./dev/NAME.png"}
  img_raw/dev/NAME.png                           or dev/NAME.png; .jpg, .jpeg or .png

captions/ and image_splits/ may stand in cirr/, as in CLIP4Cir's layout. test1 has no target_hard.

The target is ranked among all images of the split, and among the images of img_set, both times
without the reference.
"""

import dataclasses
import functools
import os
import pathlib
import reprlib

import ml_collections

from crn_jax.input_pipeline.checks import folder
from crn_jax.input_pipeline.checks.missing import ENTRIES_MALFORMED, Problem
from crn_jax.input_pipeline.dataset import (
  Dataset,
  DatasetSpec,
  ImageStore,
  SubmissionFile,
  SubmissionSpec,
  TfdsSpec,
)
from crn_jax.input_pipeline.readers import files
from crn_jax.input_pipeline.readers.named import Annotated, Named, parse_all, to_dataset

GALLERY = "cirr_val"

_TEST = "test1"
_LOOKED_FOR = "the paths of image_splits/ in img_raw/ or the data folder; .jpg, .jpeg or .png"


def read(
  root: str | os.PathLike,
  *,
  train: bool = True,
  on_missing: str = "error",
  known_digest: str | None = None,
  store: ImageStore | None = None,
) -> Dataset:
  """Reads train (if it is wanted) and val, and verifies every image that will be read.

  Args:
    root: see the head of this module.
    train: whether the train split is wanted; its files need not exist otherwise.
    on_missing: "error", or "skip" to leave out what missing data affect.
    known_digest: `image_digest` of an earlier call; unchanged image files are then not decoded.
    store: what the splits hold as theirs.

  Raises:
    UserError: no such root, an unknown choice, or missing or damaged data, all of it in one
      message.
  """
  options = {"on_missing": on_missing, "known_digest": known_digest, "store": store}
  return _read(root, "train" if train else None, "val", GALLERY, **options)


def read_test(root: str | os.PathLike) -> Dataset:
  """Reads test1, of which the targets are -1, as `read` does; nothing may be missing."""
  return _read(root, None, _TEST, "cirr_test1", on_missing="error")


def _read(root, train: str | None, evaluated: str, protocol: str, **options) -> Dataset:
  root = folder.check_root(root, "a CIRR folder with captions/, image_splits/ and img_raw/")
  splits = {name: _Split.read(root, name) for name in filter(None, (train, evaluated))}
  paths = {}
  for split in splits.values():
    wanted = {name: split.files[name] for name in split.annotated.names}
    found = files.find_images([root / "img_raw", root], wanted.values())
    paths |= {name: found[path] for name, path in wanted.items() if path in found}
  return to_dataset(
    "cirr",
    root,
    splits[train].annotated if train else None,
    splits[evaluated].annotated,
    paths,
    protocol=protocol,
    looked_for=_LOOKED_FOR,
    ranks_reference=False,
    **options,
  )


@dataclasses.dataclass(frozen=True)
class _Split:
  """The two annotation files of a split.

  Attributes:
    annotated: what they ask for.
    files: name -> path of every image of the split, relative to a folder of images.
  """

  annotated: Annotated
  files: dict[str, str]

  @classmethod
  def read(cls, root: pathlib.Path, split: str) -> "_Split":
    inner = "" if (root / "captions").is_dir() or not (root / "cirr").is_dir() else "cirr/"
    captions = f"{inner}captions/cap.rc2.{split}.json"
    listed = f"{inner}image_splits/split.rc2.{split}.json"
    items, problems = files.read_json_list(root, captions, "pairs")
    paths, more = files.read_json_object(root, listed, "image names and their paths")
    problems += more
    for name, path in list(paths.items()):
      if not isinstance(path, str) or files.leaves_root(path):
        what = f"expected a path below the folder of images, found {reprlib.repr(path)}"
        problems.append(Problem(ENTRIES_MALFORMED, f"{listed}, {name!r}", what))
        del paths[name]
    pairs, more = parse_all(
      items, functools.partial(_parse, split=split), captions, "pairid", paths, listed
    )
    problems += more
    gallery = () if split == "train" else tuple(paths)
    n_bad = len(items) - len(pairs)
    return cls(Annotated(captions, pairs, gallery, problems, n_bad), paths)


def _parse(item: object, split: str) -> Named | str:
  """A pair, or what is wrong with it."""
  names = ("reference",) if split == _TEST else ("reference", "target_hard")
  if not isinstance(item, dict):
    return f"expected an object, found {reprlib.repr(item)}"
  if type(item.get("pairid")) is not int:
    return f"expected an integer as pairid, found {reprlib.repr(item.get('pairid'))}"
  for key in (*names, "caption"):
    if not isinstance(item.get(key), str):
      return f"expected a string as {key}, found {reprlib.repr(item.get(key))}"
  ends = [item[name] for name in names]
  target = None if split == _TEST else ends[1]
  pair = Named(ends[0], target, (item["caption"].strip(),), query_id=str(item["pairid"]))
  if split == "train":
    return pair
  group = item.get("img_set")
  members = group.get("members") if isinstance(group, dict) else None
  if not isinstance(members, list) or not all(isinstance(m, str) for m in members):
    return f"expected a list of names as img_set.members, found {reprlib.repr(members)}"
  if len(set(members)) < len(members):
    return f"img_set.members name an image twice: {reprlib.repr(members)}"
  if outside := [name for name in ends if name not in members]:
    return f"{' and '.join(outside)} not among img_set.members, {reprlib.repr(members)}"
  return pair._replace(subset=tuple(m for m in members if m != ends[0]))


def _read_configured(data: ml_collections.ConfigDict, **options) -> Dataset:
  return read(data.root, on_missing=data.on_missing, **options)


SPEC = DatasetSpec(
  name="cirr",
  read=_read_configured,
  protocols={
    GALLERY: "the images of split.rc2.val.json without the query's reference; Rsub@K ranks the "
    "five other images of its img_set"
  },
  tfds=TfdsSpec(
    class_name="CrnCirr",
    description="CIRR (Liu et al., ICCV 2021): a reference image and a caption -> a target.",
    homepage="https://github.com/Cuberick-Orion/CIRR",
    manual_download_instructions="A folder with captions/, image_splits/ and img_raw/.",
    parts=("rc2",),
    short_side=256,
    read=lambda root, part, on_missing: read(root, on_missing=on_missing),
  ),
  part=lambda data: "rc2",
  has_subsets=True,
  submission=SubmissionSpec(
    read=lambda data: read_test(data.root),
    files=(
      SubmissionFile("cirr_recall.json", 50, {"version": "rc2", "metric": "recall"}),
      SubmissionFile(
        "cirr_recall_subset.json",
        3,
        {"version": "rc2", "metric": "recall_subset"},
        within_subset=True,
      ),
    ),
    server="https://cirr.cecs.anu.edu.au/",
  ),
)
