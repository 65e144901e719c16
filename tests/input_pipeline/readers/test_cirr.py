"""CIRR reader: both layouts, subsets, test1, everything that is wrong at once."""

import json
import shutil

import numpy as np
import pytest

from crn_jax.errors import UserError
from crn_jax.input_pipeline.readers import cirr
from tests import cir_folders

CAPTIONS, IMAGES = "captions/cap.rc2.{}.json", "image_splits/split.rc2.{}.json"


@pytest.fixture
def root(tmp_path):
  return cir_folders.cirr(tmp_path / "cirr")


def load(root, name, split):
  return json.loads((root / name.format(split)).read_text())


def named(triplets, paths):
  """[(file name of the reference, of the target or None, text)]."""
  ids = [path.rpartition("/")[2].rpartition(".")[0] for path in paths]
  rows = zip(triplets.reference, triplets.target, triplets.texts, strict=True)
  return [(ids[r], ids[t] if t >= 0 else None, *texts) for r, t, texts in rows]


def test_splits_are_the_files(root):
  data = cirr.read(root)
  (split,) = data.evals
  for triplets, paths, name in (
    (data.train.triplets, data.train.image_paths, "train"),
    (split.queries, split.image_paths, "val"),
  ):
    pairs = load(root, CAPTIONS, name)
    expected = [(p["reference"], p["target_hard"], p["caption"]) for p in pairs]
    assert named(triplets, paths) == expected
  assert (data.name, split.name, data.skipped, data.remarks) == ("cirr", "cirr", {}, ())
  gallery = [split.image_ids[row] for row in split.galleries["cirr_val"]]
  assert gallery == list(load(root, IMAGES, "val"))
  assert len(data.train.captions) == cir_folders.CIRR["train"][1]
  assert split.ranks_reference == {"cirr_val": False}
  assert split.truths is None and split.groups is None


def test_the_subset_is_the_group_without_the_reference(root):
  (split,) = cirr.read(root, train=False).evals
  assert split.subsets.shape == (12, 5)
  for query, rows in enumerate(split.subsets):
    pair = load(root, CAPTIONS, "val")[query]
    members = [m for m in pair["img_set"]["members"] if m != pair["reference"]]
    assert [split.image_ids[row] for row in rows] == members
    assert split.queries.target[query] in rows
  assert split.query_ids == tuple(str(p["pairid"]) for p in load(root, CAPTIONS, "val"))


def test_the_test_split_has_no_targets(root):
  (split,) = cirr.read_test(root).evals
  pairs = load(root, CAPTIONS, "test1")
  assert named(split.queries, split.image_paths) == [
    (p["reference"], None, p["caption"]) for p in pairs
  ]
  assert split.query_ids == tuple(str(p["pairid"]) for p in pairs)
  assert len(split.galleries["cirr_test1"]) == cir_folders.CIRR["test1"][0]


def test_evaluation_needs_no_train_files(root):
  before = cirr.read(root, train=False)
  for path in (CAPTIONS, IMAGES):
    (root / path.format("train")).unlink()
    (root / path.format("test1")).unlink()
  shutil.rmtree(root / "img_raw" / "train")
  data = cirr.read(root, train=False)
  assert data.train is None
  assert data.evals[0].image_paths == before.evals[0].image_paths


def test_the_layout_of_clip4cir_is_the_same_data(root, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(root / "img_raw", other)
  for name in ("captions", "image_splits"):
    shutil.copytree(root / name, other / "cirr" / name)
  for ours, theirs in zip(_splits(cirr.read(root)), _splits(cirr.read(other)), strict=True):
    assert [p.removeprefix(str(root / "img_raw")) for p in ours] == [
      p.removeprefix(str(other)) for p in theirs
    ]


def _splits(data):
  return data.train.image_paths, data.evals[0].image_paths


def test_files_may_have_another_ending(root):
  for path in list((root / "img_raw" / "dev").iterdir()):
    path.rename(path.with_suffix(".JPG"))
  (split,) = cirr.read(root, train=False).evals
  assert len(split.image_paths) == cir_folders.CIRR["val"][0]


def spoil(root):
  """Spoils val in every way; returns what the message must name."""

  def change(pairs):
    pairs[0] = "no pair"
    del pairs[1]["pairid"]
    pairs[2]["caption"] = None
    pairs[3]["img_set"] = {"id": 3}
    pairs[4]["img_set"]["members"].remove(pairs[4]["target_hard"])
    pairs[5]["pairid"] = pairs[6]["pairid"]
    pairs[7]["reference"] = pairs[7]["img_set"]["members"][0] = "nowhere"
    pairs[7]["img_set"]["members"] = ["nowhere", pairs[7]["target_hard"]]
    pairs[8]["img_set"]["members"][:2] = [pairs[8]["target_hard"]] * 2

  cir_folders.edit_json(root / CAPTIONS.format("val"), change)
  cir_folders.edit_json(
    root / IMAGES.format("val"), lambda files: files.update({"evil": "../../evil.png"})
  )
  (root / "img_raw/dev/dev-17-0-img0.png").unlink()
  (root / "img_raw/dev/dev-16-0-img0.png").write_bytes(b"no image")
  return (
    "item 0: expected an object",
    "item 1: expected an integer as pairid",
    "item 2: expected a string as caption",
    "item 3: expected a list of names as img_set.members",
    "item 4: ", "not among img_set.members",
    "item 6: pairid", "stands in an earlier item",
    "item 7: nowhere not in image_splits/split.rc2.val.json",
    "item 8: img_set.members name an image twice",
    "'evil': expected a path below the folder of images",
    "dev-17-0-img0", "dev-16-0-img0.png",
  )  # fmt: skip


def test_everything_that_is_wrong_is_said_at_once(root):
  expected = spoil(root)
  with pytest.raises(UserError) as error:
    cirr.read(root)
  for part in expected:
    assert part in str(error.value), part


def test_skipping_leaves_out_what_is_affected_and_counts_it(root):
  spoil(root)
  data = cirr.read(root, on_missing="skip")
  (split,) = data.evals
  pairs = load(root, CAPTIONS, "val")
  lost = {"dev-16-0-img0", "dev-17-0-img0"}
  good = [
    p for i, p in enumerate(pairs)
    if i not in (0, 1, 2, 3, 4, 6, 7, 8) and not lost & {p["reference"], p["target_hard"]}
  ]  # fmt: skip
  assert split.query_ids == tuple(str(p["pairid"]) for p in good)
  counts = data.skipped["val"]["cirr"]
  assert (counts["queries"], counts["of_queries"]) == (12 - len(good), 12)
  assert (counts["cirr_val"], counts["of_cirr_val"]) == (2, 18)
  assert counts["entries_malformed"] == 8 and counts["entries_outside_split"] == 1
  assert data.skipped["train"]["triplets"] == 0
  # Members that are lost leave the subsets; the gallery keeps the images of lost queries.
  for query, rows in enumerate(split.subsets):
    members = set(good[query]["img_set"]["members"]) - lost - {good[query]["reference"]}
    assert {split.image_ids[row] for row in rows if row >= 0} == members
  assert np.isin(split.queries.target, split.subsets).all()


@pytest.mark.parametrize("name", [CAPTIONS.format("val"), IMAGES.format("val")])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}", "3"])
def test_a_file_that_cannot_be_used_cannot_be_skipped(root, name, content):
  if content is None:
    (root / name).unlink()
  else:
    (root / name).write_text(content)
  with pytest.raises(UserError, match=f"cannot be skipped:(.|\n)*{name}"):
    cirr.read(root, on_missing="skip")


def test_a_folder_that_is_none_says_what_is_expected(tmp_path):
  with pytest.raises(UserError, match="no such folder; expected a CIRR folder"):
    cirr.read(tmp_path / "nothing")
