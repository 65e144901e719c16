"""A data set is added in one place: the example of docs/extending.md, read from there, works."""

import json
import pathlib
import types

import ml_collections
import pytest
from PIL import Image

from configs import default
from crn_jax.errors import UserError
from crn_jax.input_pipeline import prepare, registry
from crn_jax.reports import tables

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "extending.md"


def example() -> str:
  """The first Python block of the section."""
  section = DOCS.read_text(encoding="utf-8").partition("## A new data set\n")[2]
  return section.partition("```python\n")[2].partition("```")[0]


@pytest.fixture
def jsonl(monkeypatch):
  """Registers the example."""
  module = types.ModuleType("jsonl")
  exec(compile(example(), str(DOCS), "exec"), module.__dict__)
  monkeypatch.setitem(registry.DATASETS, module.SPEC.name, module.SPEC)
  return module


@pytest.fixture
def root(tmp_path):
  (tmp_path / "images").mkdir()
  for i in range(6):
    Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}.jpg")
  for split, first in (("train", 0), ("val", 3)):
    rows = [
      {"reference": f"{first + i}.jpg", "text": f"is {i} redder", "target": f"{first + i + 1}.jpg"}
      for i in range(2)
    ]
    (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return tmp_path


def config(root, **changes) -> ml_collections.ConfigDict:
  c = default.get_config()
  c.batch_size = 2
  c.data.update({"dataset": "jsonl", "root": str(root), **changes})
  return c


def test_the_example_is_short_and_reads_both_splits(jsonl, root):
  assert len(example().splitlines()) <= 50
  dataset = registry.open_dataset(config(root).data, train=True)
  assert dataset.name == "jsonl"
  assert dataset.train.triplets.texts == (("is 0 redder",), ("is 1 redder",))
  assert [pathlib.Path(p).name for p in dataset.train.image_paths] == ["0.jpg", "1.jpg", "2.jpg"]
  assert dataset.train.triplets.target.tolist() == [1, 2]
  assert len(dataset.fingerprint) == 64
  (split,) = dataset.evals
  assert split.image_ids == ("3.jpg", "4.jpg", "5.jpg")
  assert split.galleries["val_images"].tolist() == [0, 1, 2]
  (root / "train.jsonl").unlink()
  alone = registry.open_dataset(config(root).data, train=False)
  assert alone.train is None and alone.evals[0].queries.texts == split.queries.texts


def test_its_missing_data_are_found_and_skipped(jsonl, root):
  (root / "images" / "5.jpg").unlink()
  with (root / "train.jsonl").open("a") as f:
    f.write('\n{"reference": "../0.jpg"}\n')
  with pytest.raises(UserError, match=r"(?s)train.jsonl, line 3: expected.*KeyError.*5\.jpg"):
    registry.open_dataset(config(root).data, train=True)
  dataset = registry.open_dataset(config(root, on_missing="skip").data, train=True)
  assert len(dataset.train.triplets) == 2 and len(dataset.evals[0].queries) == 1


def test_it_is_reported_and_described_without_further_registration(jsonl, root):
  report = prepare.prepare(config(root))
  assert report.startswith("jsonl: training can start.\ntrain: 2 triplets an epoch, 3 images")
  assert tables.protocol_note(["val_images"]) == "val_images ranks all images that val.jsonl names."
  c = config(root, prepared="folder")
  for use in (lambda: registry.open_dataset(c.data, train=True), lambda: prepare.prepare(c)):
    with pytest.raises(UserError, match="jsonl cannot be prepared"):
      use()
