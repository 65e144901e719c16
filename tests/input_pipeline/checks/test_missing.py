"""Missing and damaged data: all of it is named in one message, or left out and counted."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from crn_jax.errors import UserError
from crn_jax.input_pipeline.checks import folder, missing
from crn_jax.input_pipeline.readers import fashioniq

MINI = pathlib.Path(__file__).parents[2] / "goldens" / "mini_data" / "fashioniq"
IMAGES = "resized_image/shirt"


@pytest.fixture
def root(tmp_path):
  """A copy of the tiny tree, to be damaged."""
  return pathlib.Path(shutil.copytree(MINI, tmp_path / "data"))


def edit(root, file, change):
  """Changes the value in a JSON file in place."""
  path = root / file
  value = json.loads(path.read_text(encoding="utf-8"))
  change(value)
  path.write_text(json.dumps(value), encoding="utf-8")


def message_of(root, category="shirt", **choices):
  with pytest.raises(UserError) as caught:
    fashioniq.read(root, category, **choices)
  return str(caught.value)


def skip(root, category="shirt", **choices):
  return fashioniq.read(root, category, on_missing="skip", **choices)


def cut(path):
  path.write_bytes(path.read_bytes()[:-50])


# One test per sort of problem.


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
  ("file", "spoil", "expected"),
  [
    ("captions/cap.shirt.{}.json", os.remove, "no such file"),
    ("image_splits/split.shirt.{}.json", os.remove, "no such file"),
    ("captions/cap.shirt.{}.json", lambda p: p.write_text('[{"target"'), "not valid JSON"),
    ("captions/cap.shirt.{}.json", lambda p: p.write_text(""), "not valid JSON"),
    ("image_splits/split.shirt.{}.json", lambda p: p.write_bytes(b'["\xff"]'), "not UTF-8"),
    (
      "captions/cap.shirt.{}.json",
      lambda p: p.write_text("{}"),
      "expected a list of entries, found a JSON value of type dict",
    ),
    (
      "captions/cap.shirt.{}.json",
      lambda p: p.write_text("[]"),
      "expected a list of entries, found an empty list",
    ),
    (
      "image_splits/split.shirt.{}.json",
      lambda p: p.write_text('["a", 1]'),
      "expected a list of image ids (strings); item 1 is 1",
    ),
  ],
)
@pytest.mark.parametrize("on_missing", folder.ON_MISSING)
def test_annotation_files_that_cannot_be_used_end_the_reading(
  root, split, file, spoil, expected, on_missing
):
  file = file.format(split)
  spoil(root / file)
  message = message_of(root, on_missing=on_missing)
  assert f"cannot be skipped:\n  {file}: {expected}" in message
  assert "Fetch those files again" in message


@pytest.mark.parametrize(
  ("spoil", "expected"),
  [
    (
      lambda entries: entries[1].pop("target"),
      "no key target; found candidate, captions",
    ),
    (
      lambda entries: entries.__setitem__(1, 7),
      "expected an object with keys candidate, target, captions, found 7",
    ),
    (
      lambda entries: entries[1].update(target=5),
      "expected an image id (string) as target, found 5",
    ),
    (
      lambda entries: entries[1].update(captions=["a"]),
      "expected two strings as captions, found ['a']",
    ),
    (
      lambda entries: entries[1].update(captions=["a", None]),
      "expected two strings as captions, found ['a', None]",
    ),
    (
      lambda entries: entries[1].update(captions="ab"),
      "expected two strings as captions, found 'ab'",
    ),
  ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_malformed_entries_are_named_with_their_item(root, split, spoil, expected):
  file = f"captions/cap.shirt.{split}.json"
  edit(root, file, spoil)
  assert f"1 entry is malformed:\n  {file}, item 1: {expected}\n" in message_of(root)
  data = skip(root)
  assert len(data.train.triplets) == 3 - (split == "train")
  assert len(data.evals[0].queries) == 2 - (split == "val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_outside_the_split_list_are_named_with_their_item(root, split):
  file = f"captions/cap.shirt.{split}.json"
  edit(root, file, lambda entries: entries[1].update(candidate="X"))
  assert (
    f"1 entry names an image outside its split list:\n"
    f"  {file}, item 1: candidate 'X' not in image_splits/split.shirt.{split}.json\n"
  ) in message_of(root)
  counts = skip(root).skipped
  counts = counts["train"] if split == "train" else counts["val"]["shirt"]
  assert counts["entries_outside_split"] == 1


@pytest.mark.parametrize(
  ("spoil", "reason"),
  [
    (cut, "truncated"),
    (lambda p: p.write_bytes(b""), "empty"),
    (lambda p: p.write_text("<html>404</html>"), "not an image"),
  ],
)
def test_image_files_that_cannot_be_read_are_named_with_the_reason(root, spoil, reason):
  file = f"{IMAGES}/S000000001.jpg"
  spoil(root / file)
  expected = f"1 image file cannot be read (1 {reason}):\n  {file}: {reason}\n"
  assert expected in message_of(root)


def test_missing_images_are_named_by_category_and_id(root):
  (root / IMAGES / "S000000001.jpg").unlink()
  (root / IMAGES / "S000000002.jpg").unlink()
  (root / IMAGES / "S000000002.jpg").symlink_to(root / "nowhere.jpg")
  message = message_of(root)
  assert "2 images have no file (ID.jpg, .jpeg or .png in resized_image/CATEGORY/" in message
  assert "\n  shirt S000000001\n  shirt S000000002\n" in message


def test_val_needs_every_image_of_its_gallery(root):
  (root / IMAGES / "B00SHIRT04.jpg").unlink()  # In no query.
  assert "shirt B00SHIRT04" in message_of(root, train=False)


@pytest.mark.parametrize("on_missing", folder.ON_MISSING)
def test_a_category_that_becomes_empty_ends_the_reading(root, on_missing):
  (root / IMAGES / "B00SHIRT02.jpg").unlink()  # The target of both queries.
  message = message_of(root, "all", on_missing=on_missing)
  assert "  captions/cap.shirt.val.json: nothing is left of its 2 entries\n" in message
  assert "  shirt B00SHIRT02\n" in message


@pytest.mark.parametrize("on_missing", folder.ON_MISSING)
def test_a_missing_image_folder_names_those_tried(root, on_missing):
  shutil.rmtree(root / IMAGES)
  message = message_of(root, on_missing=on_missing)
  tried = "resized_image/shirt/, images/shirt/, images/"
  assert f"  images of shirt: none of the folders {tried} exists\n" in message
  assert "have no file" not in message


# The message.


def test_one_message_names_everything_and_how_to_go_on(root):
  edit(root, "captions/cap.dress.train.json", lambda entries: entries[0].pop("captions"))
  edit(root, "captions/cap.shirt.val.json", lambda entries: entries[1].update(target="X"))
  cut(root / "resized_image/toptee/T000000001.jpg")
  (root / "resized_image/shirt/S000000004.jpg").write_bytes(b"")
  ids = json.loads((root / "image_splits/split.dress.val.json").read_text())
  # More of the list than the tiny tree has: eleven images without a file.
  edit(
    root, "image_splits/split.dress.val.json", lambda ids: ids.extend(f"N{i}" for i in range(10))
  )
  (root / f"resized_image/dress/{ids[0]}.jpg").unlink()
  assert (
    message_of(root, "all")
    == f"""\
{root}: data are missing or damaged.

1 entry is malformed:
  captions/cap.dress.train.json, item 0: no key captions; found candidate, target
1 entry names an image outside its split list:
  captions/cap.shirt.val.json, item 1: target 'X' not in image_splits/split.shirt.val.json
2 image files cannot be read (1 empty, 1 truncated):
  resized_image/shirt/S000000004.jpg: empty
  resized_image/toptee/T000000001.jpg: truncated
11 images have no file (ID.jpg, .jpeg or .png in resized_image/CATEGORY/, images/CATEGORY/ or \
images/):
  dress B00DRESS01
  dress N0
  dress N1
  dress N2
  dress N3
  dress N4
  dress N5
  dress N6
  dress N7
  dress N8
  ... and 1 more

Fetch these files again (docs/data.md says what is expected).
Or go on without what they affect by --config.data.on_missing=skip:
  skipped in train: 3 of 13 triplets
  skipped in val: dress 1 of 6 queries, 1 of 6 val_split images, 11 of 20 original_split images; \
shirt 1 of 2 queries"""
  )


def test_all_unusable_files_are_named_together_with_the_rest(root):
  for category in fashioniq.CATEGORIES:
    (root / f"captions/cap.{category}.train.json").write_text("[")
    (root / f"image_splits/split.{category}.val.json").unlink()
  (root / IMAGES / "S000000001.jpg").unlink()
  edit(root, "captions/cap.shirt.val.json", lambda entries: entries[0].pop("captions"))
  message = message_of(root, "all", on_missing="skip")
  for category in fashioniq.CATEGORIES:
    assert f"  captions/cap.{category}.train.json: not valid JSON (" in message
    assert f"  image_splits/split.{category}.val.json: no such file\n" in message
  assert "1 entry is malformed:" in message
  assert "nothing is left" not in message
  assert message.endswith("can then be left out with --config.data.on_missing=skip.")


def test_a_file_that_categories_and_splits_share_is_named_once(root):
  flat = root / "images"
  flat.mkdir()
  for path in (root / "resized_image").rglob("*.jpg"):
    path.rename(flat / path.name)
  shutil.rmtree(root / "resized_image")
  for split in ("train", "val"):
    for category in ("dress", "toptee"):
      file = f"image_splits/split.{category}.{split}.json"
      edit(root, file, lambda ids: ids.append("S000000001"))
  cut(flat / "S000000001.jpg")
  message = message_of(root, "all")
  assert (
    "1 image file cannot be read (1 truncated):\n  images/S000000001.jpg: truncated\n" in message
  )


def test_nothing_is_said_of_a_rest_where_there_is_none(root):
  (root / "captions/cap.shirt.val.json").unlink()
  message = message_of(root)
  assert message.endswith("docs/data.md says from where and what is expected.")
  assert "skip" not in message.replace("cannot be skipped", "")
  (root / IMAGES / "S000000001.jpg").unlink()
  message = message_of(root)
  assert message.endswith("The rest can then be left out with --config.data.on_missing=skip.")


def test_where_nothing_would_be_left_the_advice_is_to_mend_the_rest(root):
  (root / IMAGES / "B00SHIRT02.jpg").unlink()  # The target of both queries.
  message = message_of(root)
  assert message.endswith("\n\nFetch these files again (docs/data.md says what is expected).")


def test_advice_fits_the_cause(root):
  """A HEIC file is not mended by fetching it again, nor one that is too elongated."""
  (root / IMAGES / "S000000001.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
  Image.new("L", (1, 200)).save(root / IMAGES / "S000000004.jpg")
  message = message_of(root)
  assert "2 image files cannot be read (1 HEIC, 1 too elongated):" in message
  advice = message.rpartition("\n\n")[2].splitlines()
  assert advice[:3] == [
    "HEIC: run `pip install pillow-heif`, or convert these files to JPEG.",
    "Too elongated: crop these images to sides of at most 1 : 100.",
    "Or go on without what they affect by --config.data.on_missing=skip:",
  ]
  assert skip(root).skipped["train"]["images_unreadable"] == 2


# Going on without.


def test_nothing_is_skipped_of_a_whole_folder():
  whole = fashioniq.read(MINI, "all")
  lenient = fashioniq.read(MINI, "all", on_missing="skip")
  assert whole.skipped == lenient.skipped == {}
  assert missing.describe_skipped({}) == ""
  assert lenient.train.image_paths == whole.train.image_paths
  assert lenient.train.triplets.texts == whole.train.triplets.texts


@pytest.mark.parametrize("spoil", [os.remove, cut])
def test_skip_leaves_out_the_triplets_of_a_bad_image(root, spoil):
  whole = fashioniq.read(root, "shirt").train
  spoil(root / IMAGES / "S000000001.jpg")  # Reference of the first of three triplets.
  data = skip(root)
  split = data.train
  assert split.triplets.texts == whole.triplets.texts[1:]
  for field in ("reference", "target"):
    kept = [split.image_paths[row] for row in getattr(split.triplets, field)]
    before = [whole.image_paths[row] for row in getattr(whole.triplets, field)]
    assert kept == before[1:]
  # The words' ids do not depend on which image files are there.
  assert split.captions == whole.captions
  cause = "images_missing" if spoil is os.remove else "images_unreadable"
  assert data.skipped["train"] == {
    "entries_malformed": 0,
    "entries_outside_split": 0,
    "images_unreadable": 0,
    "images_missing": 0,
    cause: 1,
    "triplets": 1,
    "of_triplets": 3,
  }
  assert set(data.skipped["val"]["shirt"].values()) == {0, 2, 3, 4}


def test_skip_leaves_images_out_that_only_skipped_triplets_use(root):
  (root / IMAGES / "S000000003.jpg").unlink()
  split = skip(root).train
  assert [pathlib.Path(p).stem for p in split.image_paths] == ["S000000001", "S000000002"]


def test_skip_leaves_out_queries_and_gallery_images(root):
  (root / IMAGES / "B00SHIRT01.jpg").unlink()  # Reference of the first of two queries.
  (root / IMAGES / "B00SHIRT04.jpg").unlink()  # In the list only.
  data = skip(root, train=False)
  (split,) = data.evals
  assert split.image_ids == ("B00SHIRT02", "B00SHIRT03")
  assert [pathlib.Path(p).stem for p in split.image_paths] == list(split.image_ids)
  assert split.queries.texts == (("is grey and darker", "no collar"),)
  assert (split.queries.reference.tolist(), split.queries.target.tolist()) == ([1], [0])
  assert split.galleries["val_split"].tolist() == [0, 1]
  assert split.galleries["original_split"].tolist() == [0, 1]
  assert {g.dtype for g in split.galleries.values()} == {np.dtype(np.int32)}
  assert data.train is None
  assert data.skipped == {
    "val": {
      "shirt": {
        "entries_malformed": 0,
        "entries_outside_split": 0,
        "images_unreadable": 0,
        "images_missing": 2,
        "queries": 1,
        "of_queries": 2,
        "val_split": 1,
        "of_val_split": 3,
        "original_split": 2,
        "of_original_split": 4,
      }
    }
  }
  assert json.loads(json.dumps(data.skipped)) == data.skipped
  assert missing.describe_skipped(data.skipped) == (
    "skipped in val: shirt 1 of 2 queries, 1 of 3 val_split images, 2 of 4 original_split images"
  )


@pytest.mark.parametrize(
  "spoil", [lambda entry: entry.pop("captions"), lambda entry: entry.update(candidate="X")]
)
def test_images_of_a_skipped_query_stay_in_the_galleries(root, spoil):
  """A gallery without them would be easier than the published one."""
  (whole,) = fashioniq.read(root, "dress", train=False).evals
  (root / "resized_image/dress/B00DRESS01.jpg").unlink()
  # Entry 2 asks for 06, given the missing 01; entry 3 is the only other one that names 06.
  edit(root, "captions/cap.dress.val.json", lambda entries: spoil(entries[3]))
  data = skip(root, "dress", train=False)
  (split,) = data.evals
  assert len(split.queries) == 4
  left = [split.image_ids[row] for row in split.galleries["val_split"]]
  before = [whole.image_ids[row] for row in whole.galleries["val_split"]]
  assert "B00DRESS06" in left
  assert left == [i for i in before if i != "B00DRESS01"]
  assert data.skipped["val"]["dress"]["of_val_split"] == len(before)


@pytest.mark.parametrize(("caption_use", "n_texts"), [("joined", 1), ("separate", 2)])
def test_counts_are_those_of_triplets_not_of_entries(root, caption_use, n_texts):
  (root / IMAGES / "S000000001.jpg").unlink()
  data = skip(root, caption_use=caption_use)
  assert len(data.train.triplets) == 2 * n_texts
  assert data.skipped["train"]["triplets"] == n_texts
  assert data.skipped["train"]["of_triplets"] == 3 * n_texts


def test_counts_are_named_with_separators_and_without_what_is_whole():
  none = {"queries": 0, "of_queries": 2038, "val_split": 0, "of_val_split": 3089}
  none |= {"original_split": 0, "of_original_split": 6346}
  counts = {"train": {"triplets": 1005, "of_triplets": 5985}, "val": {"shirt": none}}
  assert missing.describe_skipped(counts) == "skipped in train: 1,005 of 5,985 triplets"
  counts["val"]["dress"] = none | {"original_split": 7}
  assert missing.describe_skipped(counts) == (
    "skipped in train: 1,005 of 5,985 triplets\n"
    "skipped in val: dress 7 of 6,346 original_split images"
  )
