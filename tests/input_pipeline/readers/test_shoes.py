"""Shoes reader: the release's enumeration on a tiny tree, both ways to list pairs, bad input."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from crn_jax.errors import UserError
from crn_jax.input_pipeline.readers import shoes

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
MINI = GOLDENS / "mini_data" / "shoes"
CAPTIONS = "relative_captions_shoes.json"
SNEAKER = "womens_sneakers/3/img_womens_sneakers_8.jpg"  # An end of four queries.


@pytest.fixture(scope="module")
def expected():
  """What the release's loader lists from the tiny tree."""
  return json.loads((GOLDENS / "datasets.json").read_text())["shoes"]


@pytest.fixture
def root(tmp_path):
  """A copy of the tiny tree, to be changed."""
  return pathlib.Path(shutil.copytree(MINI, tmp_path / "data"))


def edit(root, change):
  path = root / CAPTIONS
  items = json.loads(path.read_text())
  change(items)
  path.write_text(json.dumps(items))


def listed(triplets, image_paths, root=MINI):
  names = [pathlib.Path(path).relative_to(root).as_posix() for path in image_paths]
  return [
    {"source": names[r], "target": names[t], "text": text}
    for r, t, (text,) in zip(triplets.reference, triplets.target, triplets.texts, strict=True)
  ]


def test_released_pairs_are_those_of_the_release_in_its_order(expected):
  data = shoes.read(MINI)
  assert listed(data.train.triplets, data.train.image_paths) == expected["train"]["triplets"]
  assert list(data.train.captions) == expected["texts_for_vocab"]
  (split,) = data.evals
  assert listed(split.queries, split.image_paths) == expected["test"]["triplets"]
  gallery = split.galleries["eval_list"]
  paths = [pathlib.Path(split.image_paths[row]).relative_to(MINI).as_posix() for row in gallery]
  assert paths == [item["image"] for item in expected["gallery"]]
  assert split.groups is None
  assert (data.skipped, data.remarks) == ({}, ())
  # One query's target is an image of the train list: the release counts it as a miss.
  ids = {item["target_img_id"] for item in expected["gallery"]}
  absent = [q["target_img_id"] not in ids for q in expected["queries"]]
  assert (~np.isin(split.queries.target, gallery)).tolist() == absent
  assert sum(absent) == 1


def test_unique_pairs_have_both_ends_in_the_split_and_come_once_in_file_order(expected):
  data = shoes.read(MINI, "unique")
  released = [t["text"] for t in expected["train"]["triplets"]]
  twice = {text for text in released if released.count(text) == 2}
  order = [item["RelativeCaption"].strip() for item in json.loads((MINI / CAPTIONS).read_text())]
  assert [t for (t,) in data.train.triplets.texts] == [t for t in order if t in twice]
  (split,) = data.evals
  assert len(split.queries) == 4
  assert np.isin(split.queries.target, split.galleries["eval_list"]).all()
  assert len(split.image_paths) == 7


def test_a_pair_of_an_image_with_itself_comes_once_in_either_way():
  annotations = [("a", "a", "same"), ("a", "b", "other")]
  released = shoes.choose_pairs(annotations, ("b", "a"), "released")
  assert released == [annotations[1], *annotations]
  assert shoes.choose_pairs(annotations, ("b", "a"), "unique") == annotations


def test_evaluation_reads_no_train_list(root):
  (root / "train_im_names.txt").unlink()
  assert shoes.read(root, train=False).train is None
  with pytest.raises(UserError, match=r"train_im_names\.txt: no such file"):
    shoes.read(root)


def test_missing_root_and_unknown_choices_are_named(tmp_path):
  with pytest.raises(UserError, match=r"nowhere: no such folder; expected a Shoes folder"):
    shoes.read(tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"data\.shoes_pairs: expected one of .*'doubled'"):
    shoes.read(MINI, "doubled")


def test_line_ends_blank_lines_and_repeated_names_do_not_change_the_splits(root):
  plain = shoes.read(root)
  names = (root / "eval_im_names.txt").read_text().split()
  (root / "eval_im_names.txt").write_bytes("\r\n".join(["", *names, names[0]]).encode())
  text = (root / "train_im_names.txt").read_text()
  (root / "train_im_names.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # A byte order mark.
  data = shoes.read(root)
  assert data.train.captions == plain.train.captions
  assert data.evals[0].image_ids == plain.evals[0].image_ids
  assert data.remarks == ("eval_im_names.txt: 1 repeated names, each counts once",)


@pytest.mark.parametrize(
  "content, message",
  [
    ("{}", "expected a list of pairs, found a JSON value of type dict"),
    ("[]", "expected a list of pairs, found an empty list"),
    ("[", "not valid JSON"),
  ],
)
def test_annotation_files_of_another_shape_end_the_reading(root, content, message):
  (root / CAPTIONS).write_text(content)
  with pytest.raises(UserError, match=message):
    shoes.read(root, on_missing="skip")


def test_malformed_pairs_are_named_with_their_item_and_can_be_skipped(root):
  edit(root, lambda items: items[1].pop("ImageName"))
  with pytest.raises(UserError, match=f"{CAPTIONS}, item 1: expected an object with strings"):
    shoes.read(root)
  data = shoes.read(root, on_missing="skip")
  assert data.skipped["train"]["entries_malformed"] == 1
  assert "has a pointed toe" not in data.train.captions


@pytest.mark.parametrize("spoil", ["missing", "empty", "truncated"])
def test_images_that_cannot_be_read_are_left_out_and_counted(root, spoil):
  path = root / SNEAKER
  content = path.read_bytes()
  path.unlink()
  if spoil != "missing":
    path.write_bytes(content[: 0 if spoil == "empty" else len(content) // 2])
  with pytest.raises(UserError, match="img_womens_sneakers_8"):
    shoes.read(root)
  data = shoes.read(root, on_missing="skip")
  counts = data.skipped["val"]["shoes"]
  assert (counts["queries"], counts["of_queries"]) == (4, 10)
  assert (counts["eval_list"], counts["of_eval_list"]) == (1, 7)
  assert len(data.evals[0].queries) == 6
  assert len(data.evals[0].galleries["eval_list"]) == 6
  assert data.skipped["train"]["triplets"] == 0


def test_texts_may_be_empty_or_of_any_letters(root):
  def change(items):
    items[0]["RelativeCaption"] = " "
    items[1]["RelativeCaption"] = "plus élégante"

  edit(root, change)
  texts = [text for (text,) in shoes.read(root).train.triplets.texts]
  assert texts.count("") == texts.count("plus élégante") == 2


def test_names_cannot_lead_out_of_the_folder(root):
  outside = root.parent / "x.jpg"
  shutil.copy(root / SNEAKER, outside)
  for name in ("../x.jpg", str(outside)):
    with (root / "eval_im_names.txt").open("a") as f:
      f.write(f"\n{name}")
    with pytest.raises(UserError, match=r"1 image has no file|2 images have no file"):
      shoes.read(root)
  assert shoes.read(root, on_missing="skip").skipped["val"]["shoes"]["eval_list"] == 2
