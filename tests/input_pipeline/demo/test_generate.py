"""The demo data set: layout, captions that name only what changes, ceilings, folders."""

import collections
import json
import re

import numpy as np
import pytest
from PIL import Image

from crn_jax.errors import UserError
from crn_jax.input_pipeline.demo import captions, drawing, generate

SMALL = {
  "image_size": 16,
  "n_train_images": 60,
  "n_train_triplets": 90,
  "n_val_images": 48,
  "n_val_queries": 60,
}
CATEGORIES = ("dress", "shirt", "toptee")
PATTERN_WORDS = {
  "solid", "plain", "pattern", "print", "striped", "stripes", "dotted", "dots", "checked",
  "checks", "checkered", "toned", "tones", "blocked", "design",
}  # fmt: skip
LENGTH_WORDS = {
  "short", "cropped", "medium", "mid", "long", "full", "longer", "shorter", "lower", "higher",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("demo") / "data"
  generate.generate(root, seed=3, **SMALL)
  return root


def _read(path):
  return json.loads(path.read_text())


def _files(root):
  return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _triplets(root, split):
  return [t for c in CATEGORIES for t in _read(root / "captions" / f"cap.{c}.{split}.json")]


def _named(caption):
  """The attributes that a caption speaks of, found by its words."""
  words = set(re.findall(r"[a-z]+", caption))
  named = set()
  if words & set(drawing.ATTRIBUTES["color"]):
    named.add("color")
  if words & PATTERN_WORDS:
    named.add("pattern")
  if words & {"neck", "neckline"}:
    named.add("neckline")
  if words & {"hem", "edge"}:
    named.add("hem")
  if words & {"sleeves", "arms", "sleeveless"}:
    named.add("sleeves")
  elif words & LENGTH_WORDS:
    named.add("length")
  return named


def test_same_arguments_give_the_same_bytes_and_another_seed_others(root, tmp_path):
  generate.generate(tmp_path / "again", seed=3, **SMALL)
  assert _files(tmp_path / "again") == _files(root)
  generate.generate(tmp_path / "other", seed=4, **SMALL)
  image = "images/dress_train_00000.jpg"
  assert (tmp_path / "other" / image).read_bytes() != (root / image).read_bytes()


def test_layout_is_that_of_fashioniq(root):
  everything = []
  for category in CATEGORIES:
    for split, n_images, n_triplets in (("train", 60, 90), ("val", 48, 60)):
      ids = _read(root / "image_splits" / f"split.{category}.{split}.json")
      triplets = _read(root / "captions" / f"cap.{category}.{split}.json")
      assert len(ids) == n_images
      assert len(triplets) == n_triplets
      for triplet in triplets:
        assert {"candidate", "target", "captions"} <= triplet.keys()
        assert len(triplet["captions"]) == 2
        assert {triplet["candidate"], triplet["target"]} <= set(ids)
      pairs = {(t["candidate"], t["target"]) for t in triplets}
      assert len(pairs) == n_triplets
      everything += ids
  assert len(set(everything)) == len(everything)
  assert {p.stem for p in (root / "images").iterdir()} == set(everything)
  with Image.open(root / "images" / f"{everything[0]}.jpg") as image:
    assert (image.size, image.mode) == ((16, 16), "RGB")


@pytest.mark.parametrize("split", ["train", "val"])
def test_captions_name_exactly_what_changes(root, split):
  attributes = _read(root / "attributes.json")
  for triplet in _triplets(root, split):
    old, new = attributes[triplet["candidate"]], attributes[triplet["target"]]
    changed = {name for name in old if old[name] != new[name]}
    assert changed == set(triplet["changed"])
    assert len(changed) in (1, 2)
    named = [_named(caption) for caption in triplet["captions"]]
    assert set.union(*named) == changed, triplet
    assert sum(map(len, named)) <= 2, triplet
    assert all(len(caption.split()) <= 8 for caption in triplet["captions"])


def test_every_wording_of_a_change_names_it_alone_and_tells_the_new_value():
  for name, values in drawing.ATTRIBUTES.items():
    for old in values:
      news = [new for new in values if new != old]
      modification = {new: captions._modification(name, old, new) for new in news}
      auxiliary = {new: captions._auxiliary(name, new, "dress") for new in news}
      for wordings in (modification, auxiliary):
        counts = collections.Counter(c for options in wordings.values() for c in options)
        # No caption stands for two values: the text and the reference determine the target.
        assert max(counts.values()) == 1
        assert all(_named(c) == {name} and len(c.split()) <= 8 for c in counts)
        assert all(len(options) >= 3 for options in wordings.values())


def test_both_kinds_and_both_numbers_of_changes_are_present_and_captions_vary(root):
  for split in ("train", "val"):
    triplets = _triplets(root, split)
    kinds = collections.Counter(t["kind"] for t in triplets)
    assert set(kinds) == set(captions.KINDS)
    assert abs(kinds["modification"] - kinds["auxiliary"]) <= 3
    one = np.mean([len(t["changed"]) == 1 for t in triplets])
    assert 0.2 < one < 0.4
    written = [c for t in triplets for c in t["captions"]]
    assert len(set(written)) > 0.4 * len(written)


def test_val_combinations_are_unique_all_used_and_partly_unseen(root):
  attributes = _read(root / "attributes.json")
  summary = _read(root / "demo.json")
  for category in CATEGORIES:
    ids = {s: _read(root / "image_splits" / f"split.{category}.{s}.json") for s in ("train", "val")}
    seen = {s: {tuple(attributes[i].values()) for i in ids[s]} for s in ids}
    assert len(seen["val"]) == len(ids["val"])
    triplets = _read(root / "captions" / f"cap.{category}.val.json")
    assert {t[k] for t in triplets for k in ("candidate", "target")} == set(ids["val"])
    assert summary["val_split_gallery"][category] == len(ids["val"])
    unseen = len(seen["val"] - seen["train"])
    assert summary["val_combinations_unseen_in_train"][category] == unseen > 0


def test_by_default_every_value_occurs_in_training_and_in_some_val_gallery():
  train = generate._Grids(np.random.default_rng(0)).draw(1000, 2700)
  grids = generate._Grids(np.random.default_rng(0))
  val = [grids.draw(700, 700) for _ in CATEGORIES]
  for i, values in enumerate(drawing.ATTRIBUTES.values()):
    assert set(train[:, i]) == set(np.concatenate(val)[:, i]) == set(range(len(values)))
  # Every reference has many neighbours that differ in one attribute.
  for attributes in val:
    distance = np.sum(attributes[:, None] != attributes[None], axis=-1)
    assert np.mean(np.sum(distance == 1, axis=1)) > 12


def test_ceilings_by_hand():
  # Two attributes, 2 x 3 grid. Seen from row 0, rows 1, 2, 3 differ in one, rows 4, 5 in two.
  attributes = np.array([[0, 0], [1, 0], [0, 1], [0, 2], [1, 1], [1, 2]])
  # One query changes one attribute, three change two: likelihoods 1/4 / 3 and 3/4 / 2.
  reference, target = np.array([0, 0, 0, 1]), np.array([2, 4, 5, 2])
  result = generate.ceilings(attributes, reference, target, k=1)
  # Image: nothing for the one-change query (two images are likelier), 1/2 for each of the others.
  assert result["image_only"] == pytest.approx(100 * (0 + 1 / 2 + 1 / 2 + 1 / 2) / 4)
  # Text: "second is 1" fits rows 2 and 4; the others name both values.
  assert result["text_only"] == pytest.approx(100 * (1 / 2 + 1 + 1 + 1) / 4)
  result = generate.ceilings(attributes, reference, target, k=3)
  # Two places go to the two-change images, the third to one of three.
  assert result["image_only"] == pytest.approx(100 * (1 / 3 + 3) / 4)
  assert result["text_only"] == pytest.approx(100)


def test_ceilings_written_are_those_of_the_files(root):
  attributes = _read(root / "attributes.json")
  levels = {n: {v: i for i, v in enumerate(vs)} for n, vs in drawing.ATTRIBUTES.items()}
  for category in CATEGORIES:
    ids = _read(root / "image_splits" / f"split.{category}.val.json")
    triplets = _read(root / "captions" / f"cap.{category}.val.json")
    table = np.array([[levels[n][v] for n, v in attributes[i].items()] for i in ids])
    rows = {k: np.array([ids.index(t[k]) for t in triplets]) for k in ("candidate", "target")}
    expected = generate.ceilings(table, rows["candidate"], rows["target"])
    assert _read(root / "demo.json")["ceilings"][category] == expected


def test_an_existing_data_set_is_used_and_another_one_refused(root):
  before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
  assert generate.generate(root, seed=3, **SMALL) == _read(root / "demo.json")
  with pytest.raises(UserError, match=r"seed 3 \(wanted 5\).*another folder"):
    generate.generate(root, seed=5, **SMALL)
  assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_a_foreign_folder_is_refused_and_an_empty_one_filled(tmp_path):
  (tmp_path / "photos").mkdir()
  (tmp_path / "photos" / "mine.txt").write_text("keep")
  with pytest.raises(UserError, match="photos: exists and is not a demo data set"):
    generate.generate(tmp_path / "photos", **SMALL)
  assert (tmp_path / "photos" / "mine.txt").read_text() == "keep"
  for content in ("[" * 100_000, "[]", '{"parameters": [1]}'):
    (tmp_path / "photos" / "demo.json").write_text(content)
    with pytest.raises(UserError, match="photos: exists and is not a demo data set"):
      generate.generate(tmp_path / "photos", **SMALL)
  (tmp_path / "empty").mkdir()
  generate.generate(tmp_path / "empty", **{**SMALL, "categories": ("shirt",)})
  assert (tmp_path / "empty" / "demo.json").exists()


def test_nothing_is_left_behind_by_a_failure(tmp_path, monkeypatch):
  def fail(*args):
    raise RuntimeError("no pencil")

  monkeypatch.setattr(drawing, "draw_garment", fail)
  with pytest.raises(RuntimeError, match="no pencil"):
    generate.generate(tmp_path / "data", **SMALL)
  assert list(tmp_path.iterdir()) == []


def test_impossible_wishes_are_refused(tmp_path):
  with pytest.raises(ValueError, match="there are 2700"):
    generate.generate(tmp_path / "a", **{**SMALL, "n_val_images": 2701})
  with pytest.raises(ValueError, match="fewer triplets"):
    generate.generate(tmp_path / "b", **{**SMALL, "n_val_images": 2, "n_val_queries": 3})
  with pytest.raises(ValueError, match="shoes"):
    generate.generate(tmp_path / "c", **SMALL, categories=("shoes",))
  assert list(tmp_path.iterdir()) == []
