"""FashionIQ reader: real counts, the release's enumeration on a tiny tree, layouts."""

import gzip
import json
import pathlib
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from crn_jax.errors import UserError
from crn_jax.input_pipeline.readers import annotations, fashioniq

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
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
  train = annotations.read_annotations(real_root, category, "train")
  assert len(train.entries) == train.n_items == facts["num_train_entries"]
  val = annotations.read_annotations(real_root, category, "val")
  galleries = fashioniq.gallery_ids(val)
  assert len(val.entries) == val.n_items == facts["val"]["queries"]
  assert len(galleries["original_split"]) == facts["val"]["gallery_all"]
  assert len(galleries["val_split"]) == facts["val"]["gallery_default"]
  row = {image_id: i for i, image_id in enumerate(val.image_ids)}
  listed = ",".join(str(row[i]) for i in galleries["val_split"])
  assert zlib.crc32(listed.encode()) == facts["val"]["gallery_default_crc32"]
  assert train.problems == val.problems == ()


@pytest.mark.parametrize("category", fashioniq.CATEGORIES)
def test_train_split_lists_what_the_release_lists(expected, category):
  split = fashioniq.read(MINI, category).train
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
  (split,) = fashioniq.read(MINI, category, train=False).evals
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
  split = fashioniq.read(root, "dress").train
  used = {*split.triplets.reference.tolist(), *split.triplets.target.tolist()}
  assert used == set(range(len(split.image_paths)))


def test_all_joins_the_categories_in_order():
  split = fashioniq.read(MINI, "all").train
  parts = [fashioniq.read(MINI, category).train for category in fashioniq.CATEGORIES]
  assert split.captions == sum((part.captions for part in parts), ())
  assert split.triplets.texts == sum((part.triplets.texts for part in parts), ())
  for field in ("reference", "target"):
    joint = [split.image_paths[row] for row in getattr(split.triplets, field)]
    separate = [p.image_paths[row] for p in parts for row in getattr(p.triplets, field)]
    assert joint == separate
  evals = fashioniq.read(MINI, "all", train=False).evals
  assert [s.name for s in evals] == list(fashioniq.CATEGORIES)


def test_captions_are_used_as_asked():
  joined = fashioniq.read(MINI, "dress", "joined").train
  both = fashioniq.read(MINI, "dress", "both_orders").train
  separate = fashioniq.read(MINI, "dress", "separate").train
  first, second = joined.triplets.texts[0]
  assert both.triplets.texts[:2] == ((first, second), (second, first))
  assert separate.triplets.texts[:2] == ((first,), (second,))
  for twice in (both, separate):
    np.testing.assert_array_equal(twice.triplets.target, joined.triplets.target.repeat(2))
    assert twice.captions == joined.captions
  (val,) = fashioniq.read(MINI, "dress", "separate", train=False).evals
  (val_joined,) = fashioniq.read(MINI, "dress", train=False).evals
  assert len(val.queries) == 2 * len(val_joined.queries)
  np.testing.assert_array_equal(val.galleries["val_split"], val_joined.galleries["val_split"])


def test_kind_is_kept_when_every_entry_has_it(root):
  path = root / "captions" / "cap.shirt.val.json"
  entries = read_json(path)
  write_json(
    path, [e | {"kind": k} for e, k in zip(entries, ("auxiliary", "modification"), strict=True)]
  )
  (split,) = fashioniq.read(root, "shirt", "both_orders", train=False).evals
  assert split.queries.kinds == ("auxiliary",) * 2 + ("modification",) * 2
  write_json(path, [entries[0] | {"kind": "auxiliary"}, entries[1]])
  assert fashioniq.read(root, "shirt", train=False).evals[0].queries.kinds is None


def test_other_keys_of_an_entry_are_ignored(root):
  path = root / "captions" / "cap.shirt.train.json"
  write_json(path, [entry | {"colour": "red", "kind": 3} for entry in read_json(path)])
  assert fashioniq.read(root, "shirt").train.triplets.kinds is None


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
    (split,) = fashioniq.read(root, category, train=False).evals
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
  split = fashioniq.read(root, "all").train
  assert len(set(split.image_paths)) == len(split.image_paths)
  assert ids_of(split.image_paths).count("D000000001") == 1


def test_jpg_is_taken_before_png_of_the_same_id(root):
  path = root / "resized_image" / "shirt" / "S000000001.jpg"
  Image.open(path).save(path.with_suffix(".png"))
  assert str(path) in fashioniq.read(root, "shirt").train.image_paths


def test_root_may_end_in_a_slash():
  plain = fashioniq.read(str(MINI), "dress").train
  slash = fashioniq.read(f"{MINI}/", "dress").train
  assert slash.image_paths == plain.image_paths


def test_missing_root_is_named(tmp_path):
  with pytest.raises(UserError, match="nowhere: no such folder"):
    fashioniq.read(tmp_path / "nowhere", "dress")


@pytest.mark.parametrize(
  ("choice", "message"),
  [
    ({"category": "shoes"}, "category: expected one of .*got 'shoes'"),
    ({"caption_use": "first"}, "caption_use: expected one of .*got 'first'"),
    ({"on_missing": "ignore"}, "on_missing: expected one of .*got 'ignore'"),
  ],
)
def test_unknown_choices_are_refused(choice, message):
  with pytest.raises(UserError, match=message):
    fashioniq.read(MINI, **{"category": "dress", **choice})


def test_an_id_that_a_list_repeats_counts_once_and_is_remarked(root):
  path = root / "image_splits" / "split.shirt.val.json"
  plain = fashioniq.read(root, "shirt")
  write_json(path, [*read_json(path), *read_json(path)[:2]])
  data = fashioniq.read(root, "shirt")
  assert data.evals[0].image_ids == plain.evals[0].image_ids
  assert plain.remarks == ()
  assert data.remarks == ("image_splits/split.shirt.val.json: 2 repeated ids, each counts once",)


def test_ids_cannot_lead_out_of_the_folder(root):
  outside = root.parent / "x.jpg"
  shutil.copy(next((root / "resized_image" / "shirt").iterdir()), outside)
  path = root / "image_splits" / "split.shirt.val.json"
  for image_id in ("../../../x", str(outside.with_suffix(""))):
    write_json(path, [*read_json(path), image_id])
    with pytest.raises(UserError, match="image has no file|images have no file"):
      fashioniq.read(root, "shirt")


def test_captions_may_be_empty_or_of_any_letters_and_line_ends(root):
  path = root / "captions" / "cap.shirt.train.json"
  entries = read_json(path)
  entries[0]["captions"] = ["", "plus \u00e9l\u00e9gante"]
  path.write_bytes(json.dumps(entries, indent=1, ensure_ascii=False).replace("\n", "\r\n").encode())
  assert fashioniq.read(root, "shirt").train.triplets.texts[0] == ("", "plus élégante")
