"""Files of a data folder: all readers read text and find images alike."""

import pathlib
import shutil

import numpy as np
import pytest

from configs import default
from crn_jax.input_pipeline import registry
from crn_jax.input_pipeline.readers import files

MINI = pathlib.Path(__file__).parents[2] / "goldens" / "mini_data"
READ = ("fashioniq", "shoes", "fashion200k")


def open_whole(name, root):
  data = default.get_config().data
  data.update({"dataset": name, "root": str(root)})
  return registry.open_dataset(data, train=True)


@pytest.fixture(params=READ)
def copied(request, tmp_path):
  """Name of a data set, and a copy of its tiny tree, to be changed."""
  root = pathlib.Path(shutil.copytree(MINI / request.param, tmp_path / "data"))
  return request.param, root


def assert_equal(dataset, expected):
  assert dataset.train.captions == expected.train.captions
  drawn, wanted = dataset.train.triplets.draw(0, 0), expected.train.triplets.draw(0, 0)
  for ours, theirs in [
    (drawn, wanted),
    *((a.queries, b.queries) for a, b in zip(dataset.evals, expected.evals, strict=True)),
  ]:
    assert ours.texts == theirs.texts
    np.testing.assert_array_equal(ours.reference, theirs.reference)
    np.testing.assert_array_equal(ours.target, theirs.target)
  assert dataset.skipped == expected.skipped == {}


def test_a_byte_order_mark_changes_nothing(copied):
  name, root = copied
  paths = [path for path in root.rglob("*") if path.suffix in (".txt", ".json")]
  assert len(paths) >= 3
  for path in paths:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert_equal(open_whole(name, root), open_whole(name, MINI / name))


@pytest.mark.parametrize("extension", [".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".Png"])
def test_images_may_have_another_ending_than_their_lists_say(copied, extension):
  name, root = copied
  paths = [path for path in root.rglob("*.jp*g") if path.is_file()]
  assert len(paths) > 10
  for path in paths:
    path.rename(path.with_suffix(extension))
  dataset = open_whole(name, root)
  assert_equal(dataset, open_whole(name, MINI / name))
  assert {pathlib.Path(path).suffix for path in dataset.train.image_paths} == {extension}


def test_of_several_endings_one_is_taken_whatever_their_order_on_disk(tmp_path):
  for name in ("a.png", "a.JPEG", "b.jpeg", "b.JPG", "c", "d.txt", "e.f"):
    (tmp_path / name).touch()
  (tmp_path / "g.jpg").mkdir()
  (tmp_path / "h.jpg").symlink_to("nowhere.jpg")
  found = files.list_images(tmp_path)
  assert found == {"a": str(tmp_path / "a.JPEG"), "b": str(tmp_path / "b.JPG")}
  assert files.find_image(str(tmp_path / "a.png")) == str(tmp_path / "a.png")
  assert files.find_image(str(tmp_path / "a.jpg")) == str(tmp_path / "a.JPEG")
  assert files.find_image(str(tmp_path / "e.jpg")) is None
  assert files.list_images(tmp_path / "nowhere") is None
