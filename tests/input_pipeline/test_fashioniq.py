"""FashionIQ reader: real counts, the release's enumeration on a tiny tree, layouts, errors."""

import gzip
import json
import os
import pathlib
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from crn_jax.input_pipeline import fashioniq

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
MINI = GOLDENS / "mini_data" / "fashioniq"


@pytest.fixture(scope="module")
def expected():
  """What the release's loaders list from the tiny tree."""
  with open(GOLDENS / "datasets.json", encoding="utf-8") as f:
    return json.load(f)["fashioniq"]


@pytest.fixture(scope="module")
def real_root(tmp_path_factory):
  """The published annotations, unpacked."""
  root = tmp_path_factory.mktemp("fashion-iq")
  packed = GOLDENS / "fashion-iq"
  for path in packed.rglob("*.gz"):
    target = root / path.relative_to(packed).with_suffix("")
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(gzip.decompress(path.read_bytes()))
  return root


@pytest.fixture
def root(tmp_path):
  """A copy of the tiny tree, to be changed."""
  return pathlib.Path(shutil.copytree(MINI, tmp_path / "data"))


def write_json(path, value):
  path.write_text(json.dumps(value), encoding="utf-8")


def read_json(path):
  return json.loads(path.read_text(encoding="utf-8"))


def ids_of(paths):
  return [pathlib.Path(path).stem for path in paths]


@pytest.mark.parametrize("category", fashioniq.CATEGORIES)
def test_published_annotations_have_the_published_counts(real_root, category):
  with open(GOLDENS / "vocab.json", encoding="utf-8") as f:
    facts = json.load(f)["categories"][category]
  train = fashioniq.read_annotations(real_root, category, "train")
  assert len(train.entries) == facts["num_train_entries"]
  val = fashioniq.read_annotations(real_root, category, "val")
  galleries = fashioniq.gallery_rows(val)
  assert len(val.entries) == facts["val"]["queries"]
  assert len(galleries["original_split"]) == len(val.image_ids) == facts["val"]["gallery_all"]
  assert len(galleries["val_split"]) == facts["val"]["gallery_default"]
  listed = ",".join(str(row) for row in galleries["val_split"])
  assert zlib.crc32(listed.encode()) == facts["val"]["gallery_default_crc32"]


@pytest.mark.parametrize("category", fashioniq.CATEGORIES)
def test_train_split_lists_what_the_release_lists(expected, category):
  split = fashioniq.read_train(MINI, category)
  ids = ids_of(split.image_paths)
  triplets = split.triplets
  listed = [
    {"source": ids[r], "target": ids[t], "text": f"<BOS> {a} <AND> {b} <EOS>"}
    for r, t, (a, b) in zip(triplets.reference, triplets.target, triplets.texts, strict=True)
  ]
  assert listed == expected[category]["train"]["triplets"]
  assert list(split.captions) == expected[category]["texts_for_vocab"]
  assert triplets.reference.dtype == triplets.target.dtype == np.int32
  assert triplets.kinds is None


@pytest.mark.parametrize("category", fashioniq.CATEGORIES)
def test_val_split_lists_what_the_release_lists(expected, category):
  (split,) = fashioniq.read_val(MINI, category)
  facts = expected[category]
  assert split.name == category
  assert list(split.image_ids) == facts["val"]["images"] == ids_of(split.image_paths)
  queries = split.queries
  assert queries.reference.tolist() == [q["source_img_id"] for q in facts["queries"]]
  assert queries.target.tolist() == [q["target_img_id"] for q in facts["queries"]]
  texts = [f"<BOS> {a} <AND> {b} <EOS>" for a, b in queries.texts]
  assert texts == [q["text"] for q in facts["queries"]]
  assert split.galleries["val_split"].tolist() == facts["gallery_all_False"]["ids"]
  assert split.galleries["original_split"].tolist() == facts["gallery_all_True"]["ids"]
  assert {g.dtype for g in split.galleries.values()} == {np.dtype(np.int32)}


def test_train_lists_only_images_that_triplets_use(root):
  path = root / "image_splits" / "split.dress.train.json"
  write_json(path, [*read_json(path), "WITHOUT_A_FILE"])
  split = fashioniq.read_train(root, "dress")
  used = {*split.triplets.reference.tolist(), *split.triplets.target.tolist()}
  assert used == set(range(len(split.image_paths)))


def test_all_joins_the_categories_in_order(expected):
  split = fashioniq.read_train(MINI, "all")
  parts = [fashioniq.read_train(MINI, category) for category in fashioniq.CATEGORIES]
  assert split.captions == sum((part.captions for part in parts), ())
  assert split.triplets.texts == sum((part.triplets.texts for part in parts), ())
  for field in ("reference", "target"):
    joint = [split.image_paths[row] for row in getattr(split.triplets, field)]
    separate = [p.image_paths[row] for p in parts for row in getattr(p.triplets, field)]
    assert joint == separate
  assert [s.name for s in fashioniq.read_val(MINI, "all")] == ["dress", "shirt", "toptee"]


def test_captions_are_used_as_asked():
  joined = fashioniq.read_train(MINI, "dress", "joined")
  both = fashioniq.read_train(MINI, "dress", "both_orders")
  separate = fashioniq.read_train(MINI, "dress", "separate")
  first, second = joined.triplets.texts[0]
  assert both.triplets.texts[:2] == ((first, second), (second, first))
  assert separate.triplets.texts[:2] == ((first,), (second,))
  for twice in (both, separate):
    np.testing.assert_array_equal(twice.triplets.target, joined.triplets.target.repeat(2))
    assert twice.captions == joined.captions
  (val,) = fashioniq.read_val(MINI, "dress", "separate")
  (val_joined,) = fashioniq.read_val(MINI, "dress")
  assert len(val.queries) == 2 * len(val_joined.queries)
  np.testing.assert_array_equal(val.galleries["val_split"], val_joined.galleries["val_split"])


def test_kind_is_kept_when_every_entry_has_it(root):
  path = root / "captions" / "cap.shirt.val.json"
  entries = read_json(path)
  write_json(
    path, [e | {"kind": k} for e, k in zip(entries, ("auxiliary", "modification"), strict=True)]
  )
  (split,) = fashioniq.read_val(root, "shirt", "both_orders")
  assert split.queries.kinds == ("auxiliary",) * 2 + ("modification",) * 2
  write_json(path, [entries[0] | {"kind": "auxiliary"}, entries[1]])
  assert fashioniq.read_val(root, "shirt")[0].queries.kinds is None


def test_other_keys_of_an_entry_are_ignored(root):
  path = root / "captions" / "cap.shirt.train.json"
  write_json(path, [entry | {"colour": "red", "kind": 3} for entry in read_json(path)])
  assert fashioniq.read_train(root, "shirt").triplets.kinds is None


@pytest.mark.parametrize("folder", ["resized_image/{}", "images/{}", "images"])
@pytest.mark.parametrize("extension", [".jpg", ".JPG", ".jpeg", ".png"])
def test_every_layout_is_found(root, folder, extension):
  old = root / "resized_image"
  old.rename(root / "old")
  for category in fashioniq.CATEGORIES:
    new = root / folder.format(category)
    new.mkdir(parents=True, exist_ok=True)
    for path in (root / "old" / category).iterdir():
      path.rename(new / f"{path.stem}{extension}")
  for category in fashioniq.CATEGORIES:
    (split,) = fashioniq.read_val(root, category)
    new = root / folder.format(category)
    assert split.image_paths == tuple(str(new / f"{i}{extension}") for i in split.image_ids)


def test_flat_images_are_shared_by_the_categories(root):
  """An id that two categories use is one image of joint training."""
  flat = root / "images"
  flat.mkdir()
  for path in (root / "resized_image").rglob("*.jpg"):
    path.rename(flat / path.name)
  shutil.rmtree(root / "resized_image")
  for path in (
    root / "captions" / "cap.shirt.train.json",
    root / "image_splits" / "split.shirt.train.json",
  ):
    path.write_text(path.read_text().replace("S000000001", "D000000001"))
  split = fashioniq.read_train(root, "all")
  assert len(set(split.image_paths)) == len(split.image_paths)
  assert ids_of(split.image_paths).count("D000000001") == 1


def test_jpg_is_taken_before_png_of_the_same_id(root):
  path = root / "resized_image" / "shirt" / "S000000001.jpg"
  Image.open(path).save(path.with_suffix(".png"))
  assert str(path) in fashioniq.read_train(root, "shirt").image_paths


def test_root_may_end_in_a_slash():
  plain = fashioniq.read_train(str(MINI), "dress")
  slash = fashioniq.read_train(f"{MINI}/", "dress")
  assert slash.image_paths == plain.image_paths


def change_entry(**changes):
  def change(path):
    entries = read_json(path)
    entries[1] |= changes
    write_json(path, entries)

  return change


def drop_key(path):
  entries = read_json(path)
  del entries[1]["target"]
  write_json(path, entries)


CAPTIONS = "captions/cap.shirt.{}.json"
SPLIT_LIST = "image_splits/split.shirt.{}.json"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
  ("file", "spoil", "error", "message"),
  [
    (CAPTIONS, os.remove, FileNotFoundError, "no such file"),
    (SPLIT_LIST, os.remove, FileNotFoundError, "no such file"),
    (CAPTIONS, lambda p: p.write_text('[{"target"'), ValueError, "not valid JSON"),
    (SPLIT_LIST, lambda p: p.write_bytes(b'["\xff"]'), ValueError, "not valid JSON"),
    (CAPTIONS, lambda p: p.write_text("{}"), ValueError, "expected a list of entries.*dict"),
    (CAPTIONS, lambda p: p.write_text("[]"), ValueError, "list of entries, found an empty list"),
    (CAPTIONS, lambda p: p.write_text("[7]"), ValueError, "keys candidate, target.*item 0 is 7"),
    (CAPTIONS, drop_key, ValueError, r"item 1 has keys \['candidate', 'captions'\]"),
    (CAPTIONS, change_entry(target=5), ValueError, r"\(string\) as target; item 1 has 5"),
    (CAPTIONS, change_entry(captions=["a"]), ValueError, r"two strings.*item 1 has \['a'\]"),
    (CAPTIONS, change_entry(captions=["a", None]), ValueError, "two strings.*item 1"),
    (CAPTIONS, change_entry(captions="ab"), ValueError, "two strings.*item 1 has 'ab'"),
    (CAPTIONS, change_entry(candidate="X"), ValueError, "candidate 'X' of item 1 is not in"),
    (SPLIT_LIST, lambda p: p.write_text("[1]"), ValueError, "image ids .*item 0 is 1"),
  ],
)
def test_broken_annotations_are_named(root, split, file, spoil, error, message):
  path = root / file.format(split)
  spoil(path)
  read = fashioniq.read_train if split == "train" else fashioniq.read_val
  with pytest.raises(error, match=message) as caught:
    read(root, "shirt")
  assert str(path) in str(caught.value)


def test_missing_images_are_counted_and_the_first_ten_listed(root):
  for path in (root / "resized_image").rglob("*.jpg"):
    if path.stem[0] in "DS":
      path.unlink()
  with pytest.raises(FileNotFoundError) as caught:
    fashioniq.read_train(root, "all")
  message = str(caught.value)
  assert message.startswith("12 images of the train split have no file: dress/D000000001, ")
  assert "shirt/S000000002, ..." in message
  assert "S000000003" not in message
  assert str(root / "resized_image" / "shirt") in message


def test_val_needs_every_image_of_its_gallery(root):
  (root / "resized_image" / "dress" / "B00DRESS10.jpg").unlink()  # In no query.
  with pytest.raises(FileNotFoundError, match=r"1 images of the val split.*dress/B00DRESS10;"):
    fashioniq.read_val(root, "dress")


def test_missing_image_folder_tells_which_were_tried(root):
  shutil.rmtree(root / "resized_image")
  with pytest.raises(FileNotFoundError) as caught:
    fashioniq.read_train(root, "dress")
  for folder in ("resized_image/dress/", "images/dress/", "images/"):
    assert f"{root}/{folder}" in str(caught.value)


def test_missing_root_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
    fashioniq.read_train(tmp_path / "nowhere", "dress")


def test_unknown_category_and_caption_use_are_refused():
  with pytest.raises(ValueError, match="category: expected one of .*got 'shoes'"):
    fashioniq.read_train(MINI, "shoes")
  with pytest.raises(ValueError, match="caption_use: expected one of .*got 'first'"):
    fashioniq.read_val(MINI, "dress", "first")
