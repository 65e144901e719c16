"""Files of a data folder: all readers read text and find images alike."""

import pathlib
import shutil

import numpy as np
import pytest

from configs import default
from crn_jax.errors import UserError
from crn_jax.input_pipeline import registry
from crn_jax.input_pipeline.readers import files

MINI = pathlib.Path(__file__).parents[2] / "goldens" / "mini_data"
READ = ("fashioniq", "shoes", "fashion200k")


def open_whole(name, root, **changes):
  data = default.get_config().data
  data.update({"dataset": name, "root": str(root), **changes})
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


def loop(path):
  """Puts a link that leads to itself in the place of a file or folder."""
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink()
  path.symlink_to(path.name)


def test_an_image_that_is_a_link_to_itself_is_missing(copied):
  name, root = copied
  data = open_whole(name, root)
  path = pathlib.Path(data.evals[0].image_paths[0])
  loop(path)
  with pytest.raises(UserError, match=f"(?s)1 image has no file.*{path.stem}"):
    open_whole(name, root)
  skipped = open_whole(name, root, on_missing="skip").skipped
  assert next(iter(skipped["val"].values()))["images_missing"] == 1


ANNOTATIONS = {
  "fashioniq": "captions/cap.shirt.val.json",
  "shoes": "relative_captions_shoes.json",
  "fashion200k": "test_queries.txt",
}


def test_an_annotation_file_that_is_a_link_to_itself_is_named(copied):
  name, root = copied
  loop(root / ANNOTATIONS[name])
  with pytest.raises(UserError, match=f"{ANNOTATIONS[name]}: cannot be opened"):
    open_whole(name, root)


@pytest.mark.parametrize(
  ("name", "folder"),
  [
    ("fashioniq", "resized_image"),
    ("fashioniq", "resized_image/shirt"),
    ("shoes", "womens_sneakers"),
    ("shoes", "womens_sneakers/3"),
    ("fashion200k", "women"),
    ("fashion200k", "labels"),
  ],
)
def test_a_folder_that_is_a_link_to_itself_is_missing(name, folder, tmp_path):
  root = pathlib.Path(shutil.copytree(MINI / name, tmp_path / "data"))
  loop(root / folder)
  with pytest.raises(
    UserError, match="has no file|have no file|none of the folders|cannot be list"
  ):
    open_whole(name, root)


@pytest.mark.parametrize("name", ["fashioniq", "shoes"])
@pytest.mark.parametrize("content", ["[" * 100_000, "[" * 10**5 + "]" * 10**5, '{"a":' * 100_000])
def test_json_that_is_nested_too_deeply_is_named(name, content, tmp_path):
  root = pathlib.Path(shutil.copytree(MINI / name, tmp_path / "data"))
  (root / ANNOTATIONS[name]).write_text(content)
  for on_missing in ("error", "skip"):
    with pytest.raises(UserError, match=f"{ANNOTATIONS[name]}: not valid JSON .nested too deeply"):
      open_whole(name, root, on_missing=on_missing)


def test_the_home_folder_may_be_a_tilde(copied, monkeypatch):
  name, root = copied
  monkeypatch.setenv("HOME", str(root.parent))
  assert_equal(open_whole(name, "~/data"), open_whole(name, root))
  with pytest.raises(UserError, match="~nobody-here/data: no such folder"):
    open_whole(name, "~nobody-here/data")


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
