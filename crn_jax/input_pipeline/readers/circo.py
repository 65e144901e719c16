"""Reads CIRCO folders (Baldrati et al., "Zero-Shot Composed Image Retrieval", ICCV 2023).

Expected below the root:

  annotations/{val,test}.json                       [{"id": 0, "reference_img_id": 1,
                                                      "target_img_id": 2, "gt_img_ids": [2, 3],
                                                      "relative_caption": text}]
  COCO2017_unlabeled/annotations/image_info_unlabeled2017.json
                                                    {"images": [{"id": 1, "file_name": name}]}
  COCO2017_unlabeled/unlabeled2017/NAME             the images: the gallery

There is no train split; test has neither target_img_id nor gt_img_ids.
"""

import functools
import os
import pathlib
import reprlib

import ml_collections

from crn_jax.input_pipeline.checks import folder
from crn_jax.input_pipeline.checks.missing import (
  ENTRIES_MALFORMED,
  FATAL,
  Problem,
)
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

GALLERY = "coco_unlabeled"

_COCO = "COCO2017_unlabeled"
_LISTED = f"{_COCO}/annotations/image_info_unlabeled2017.json"
_IMAGES = f"{_COCO}/unlabeled2017"


def read(
  root: str | os.PathLike,
  split: str = "val",
  *,
  on_missing: str = "error",
  known_digest: str | None = None,
  store: ImageStore | None = None,
) -> Dataset:
  """Reads a split, and verifies every image of the gallery.

  Args:
    root: see the head of this module.
    split: "val", or "test", of which the targets are -1.
    on_missing: "error", or "skip" to leave out what missing data affect.
    known_digest: `image_digest` of an earlier call; unchanged image files are then not decoded.
    store: what the split holds as its own.

  Raises:
    UserError: no such root, an unknown choice, or missing or damaged data, all of it in one
      message.
  """
  root = folder.check_root(root, f"a CIRCO folder with annotations/ and {_COCO}/")
  listed, problems = _read_gallery(root)
  file = f"annotations/{split}.json"
  items, more = files.read_json_list(root, file, "queries")
  problems += more
  asked, more = parse_all(
    items, functools.partial(_parse, split=split), file, "id", listed, _LISTED
  )
  problems += more
  found = files.find_images([root / _IMAGES], listed.values())
  return to_dataset(
    "circo",
    root,
    None,
    Annotated(file, asked, tuple(listed), problems, n_bad=len(items) - len(asked)),
    {name: found[path] for name, path in listed.items() if path in found},
    protocol=GALLERY,
    looked_for=f"{_IMAGES}/; .jpg, .jpeg or .png",
    on_missing=on_missing,
    known_digest=known_digest,
    store=store,
    ranks_reference=True,
  )


def _read_gallery(root: pathlib.Path) -> tuple[dict[str, str], list[Problem]]:
  """id -> file name of the gallery's images, and what is wrong with their list."""
  content, problems = files.read_json_object(root, _LISTED, "images")
  if problems:
    return {}, problems
  images = content.get("images")
  if not isinstance(images, list) or not images:
    what = f"expected a list of images under the key images, found {reprlib.repr(images)}"
    return {}, [Problem(FATAL, _LISTED, what)]
  listed = {}
  for i, item in enumerate(images):
    number, name = (item.get(k) if isinstance(item, dict) else None for k in ("id", "file_name"))
    if type(number) is int and isinstance(name, str) and not files.leaves_root(name):
      listed[str(number)] = name
    else:
      what = f"expected an object with id and file_name, found {reprlib.repr(item)}"
      problems.append(Problem(ENTRIES_MALFORMED, f"{_LISTED}, item {i}", what))
  return listed, problems


def _parse(item: object, split: str) -> Named | str:
  """A query, or what is wrong with it."""
  keys = ("id", "reference_img_id") + (("target_img_id",) if split == "val" else ())
  if not isinstance(item, dict):
    return f"expected an object, found {reprlib.repr(item)}"
  for key in keys:
    if type(item.get(key)) is not int:
      return f"expected an integer as {key}, found {reprlib.repr(item.get(key))}"
  text = item.get("relative_caption")
  if not isinstance(text, str):
    return f"expected a string as relative_caption, found {reprlib.repr(text)}"
  number, reference, *target = (str(item[key]) for key in keys)
  query = Named(reference, target[0] if target else None, (text.strip(),), query_id=number)
  if split != "val":
    return query
  truths = item.get("gt_img_ids")
  if not isinstance(truths, list) or not all(type(t) is int for t in truths):
    return f"expected a list of integers as gt_img_ids, found {reprlib.repr(truths)}"
  if len(set(truths)) < len(truths) or item["target_img_id"] not in truths:
    return (
      f"expected different gt_img_ids with target_img_id {target[0]} among them, found {truths}"
    )
  return query._replace(truths=tuple(map(str, truths)))


def _read_configured(data: ml_collections.ConfigDict, *, train: bool, **options) -> Dataset:
  del train  # There is no train split: see `DatasetSpec.trains`.
  return read(data.root, on_missing=data.on_missing, **options)


SPEC = DatasetSpec(
  name="circo",
  read=_read_configured,
  protocols={
    GALLERY: "all images of COCO's unlabeled2017, the query's reference among them; mAP@K counts "
    "all right images of a query, R@K the one that it was written for"
  },
  tfds=TfdsSpec(
    class_name="CrnCirco",
    description="CIRCO (Baldrati et al., ICCV 2023): a reference image and a caption -> targets.",
    homepage="https://github.com/miccunifi/CIRCO",
    manual_download_instructions=f"A folder with annotations/ and {_COCO}/.",
    parts=("val",),
    short_side=256,
    read=lambda root, part, on_missing: read(root, part, on_missing=on_missing),
  ),
  part=lambda data: "val",
  trains=False,
  has_truths=True,
  submission=SubmissionSpec(
    read=lambda data: read(data.root, "test"),
    files=(SubmissionFile("circo.json", 50, integers=True),),
    server="https://circo.micc.unifi.it/",
  ),
)
