"""CIRCO reader: several right images a query, test, everything that is wrong at once."""

import json

import pytest

from configs import circo as circo_config
from crn_jax.errors import UserError
from crn_jax.input_pipeline import prepare, registry
from crn_jax.input_pipeline.readers import circo
from tests import cir_folders

LISTED = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
IMAGES = "COCO2017_unlabeled/unlabeled2017"


@pytest.fixture
def root(tmp_path):
  return cir_folders.circo(tmp_path / "circo")


def load(root, name):
  return json.loads((root / name).read_text())


def test_a_split_is_its_files(root):
  data = circo.read(root)
  (split,) = data.evals
  queries = load(root, "annotations/val.json")
  ids = split.image_ids
  assert [int(ids[r]) for r in split.queries.reference] == [q["reference_img_id"] for q in queries]
  assert [int(ids[t]) for t in split.queries.target] == [q["target_img_id"] for q in queries]
  assert split.queries.texts == tuple((q["relative_caption"],) for q in queries)
  found = [[int(ids[row]) for row in rows if row >= 0] for rows in split.truths]
  assert found == [q["gt_img_ids"] for q in queries]
  gallery = [int(ids[row]) for row in split.galleries["coco_unlabeled"]]
  assert gallery == [image["id"] for image in load(root, LISTED)["images"]]
  assert split.query_ids == tuple(map(str, range(6)))
  assert split.ranks_reference == {"coco_unlabeled": True}
  assert (data.name, data.train, split.subsets) == ("circo", None, None)


def test_the_test_split_has_no_targets(root):
  (split,) = circo.read(root, "test").evals
  assert split.queries.target.tolist() == [-1] * 5
  assert split.truths is None
  assert split.query_ids == tuple(map(str, range(5)))


def test_everything_that_is_wrong_is_said_at_once(root):
  def change(queries):
    queries[0]["gt_img_ids"] = queries[0]["gt_img_ids"] * 2
    queries[1]["target_img_id"] = "3"
    queries[2]["gt_img_ids"].append(999)
    queries[3]["relative_caption"] = 4
    queries[4]["gt_img_ids"] = None

  cir_folders.edit_json(root / "annotations/val.json", change)
  cir_folders.edit_json(root / LISTED, lambda c: c["images"].append({"id": "x"}))
  first = sorted((root / IMAGES).iterdir())[0]
  first.unlink()
  with pytest.raises(UserError) as error:
    circo.read(root)
  for part in (
    "val.json, item 0: expected different gt_img_ids", "item 1: expected an integer as target",
    f"item 2: 999 not in {LISTED}", "item 3: expected a string as relative_caption",
    "item 4: expected a list of integers as gt_img_ids", f"{LISTED}, item 70: expected an object",
    "1 image has no file", f"\n  {int(first.stem)}\n",
  ):  # fmt: skip
    assert part in str(error.value), part


def test_a_right_image_that_is_lost_is_not_counted(root):
  queries = load(root, "annotations/val.json")
  query = next(i for i, q in enumerate(queries) if len(q["gt_img_ids"]) > 1)
  lost = queries[query]["gt_img_ids"][-1]
  (root / IMAGES / f"{lost:012d}.jpg").unlink()
  with pytest.raises(UserError, match="skip"):
    circo.read(root)
  data = circo.read(root, on_missing="skip")
  (split,) = data.evals
  (row,) = (i for i, q in enumerate(split.query_ids) if q == str(query))
  found = [int(split.image_ids[t]) for t in split.truths[row] if t >= 0]
  assert found == queries[query]["gt_img_ids"][:-1]
  assert data.skipped["val"]["circo"]["coco_unlabeled"] == 1


@pytest.mark.parametrize("content", ["{}", '{"images": []}', '{"images": 3}', "[]", "nothing"])
def test_a_list_of_images_that_cannot_be_used_cannot_be_skipped(root, content):
  (root / LISTED).write_text(content)
  with pytest.raises(UserError, match=f"cannot be skipped:\n  {LISTED}: "):
    circo.read(root, on_missing="skip")


def test_training_on_it_is_refused_in_a_sentence(root):
  config = circo_config.get_config()
  config.data.root = str(root)
  with pytest.raises(UserError, match="circo has no training split, it is for evaluation only"):
    registry.open_dataset(config.data, train=True)
  assert registry.open_dataset(config.data, train=False).train is None


def test_it_is_prepared_without_a_training_split(root, tmp_path):
  config = circo_config.get_config()
  config.data.root, config.data.prepared = str(root), str(tmp_path / "prepared")
  config.data.image_size = config.data.resize = 32
  text = prepare.prepare(config)
  assert text.startswith("circo: can be evaluated on; there is no training split.\n")
  assert "circo: 6 queries, 70 images in the gallery coco_unlabeled" in text
  (plain,) = circo.read(root).evals
  (stored,) = registry.open_dataset(config.data, train=False).evals
  assert stored.image_paths == plain.image_paths
  assert stored.store.read(plain.image_paths[3]).shape == (32, 40, 3)
