"""Opening a data set: what the configuration decides, and what a resumed run can check."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from configs import default
from crn_jax.errors import UserError
from crn_jax.input_pipeline import registry
from crn_jax.input_pipeline.checks import verify
from crn_jax.input_pipeline.dataset import evaluation_fingerprint
from crn_jax.input_pipeline.demo import generate
from tests import cir_folders

MINI_DATA = pathlib.Path(__file__).parents[1] / "goldens" / "mini_data"
MINI = MINI_DATA / "fashioniq"


@pytest.fixture
def root(tmp_path):
  """A copy of the tiny tree, to be changed."""
  return pathlib.Path(shutil.copytree(MINI, tmp_path / "data"))


def open_shirts(root, train=True, known_digest=None, **changes):
  config = default.get_config().data
  config.update({"root": str(root), "category": "shirt", **changes})
  return registry.open_dataset(config, train=train, known_digest=known_digest)


def test_unknown_data_set_is_refused(root):
  with pytest.raises(UserError, match="'fashioniq', 'shoes', .* got 'fashion'"):
    open_shirts(root, dataset="fashion")


def test_missing_data_are_an_error_unless_they_are_to_be_skipped(root):
  (root / "resized_image/shirt/B00SHIRT04.jpg").unlink()
  with pytest.raises(UserError, match="B00SHIRT04"):
    open_shirts(root)
  for train in (True, False):
    dataset = open_shirts(root, train, on_missing="skip")
    assert dataset.skipped["val"]["shirt"]["original_split"] == 1
    assert ("train" in dataset.skipped) == train


def test_known_images_are_not_verified_again(root, monkeypatch):
  digest = open_shirts(root).image_digest

  def fail(path):
    raise AssertionError(f"{path} was decoded again")

  monkeypatch.setattr(verify, "inspect", fail)
  assert open_shirts(root, known_digest=digest).image_digest == digest


def test_fingerprint_is_that_of_the_train_triplets(root, tmp_path):
  fingerprint = open_shirts(root).fingerprint
  assert len(fingerprint) == 64
  assert open_shirts(root, train=False).fingerprint == ""
  # Another folder in another layout holds the same triplets.
  other = pathlib.Path(shutil.copytree(MINI, tmp_path / "other"))
  (other / "resized_image").rename(other / "images")
  assert open_shirts(other).fingerprint == fingerprint
  assert open_shirts(root, captions="both_orders").fingerprint != fingerprint
  captions = root / "captions/cap.shirt.train.json"
  entries = json.loads(captions.read_text())
  captions.write_text(json.dumps(entries[::-1]))
  assert open_shirts(root).fingerprint != fingerprint
  captions.write_text(json.dumps(entries))
  assert open_shirts(root).fingerprint == fingerprint
  (root / "resized_image/shirt/S000000001.jpg").unlink()
  assert open_shirts(root, on_missing="skip").fingerprint != fingerprint


def test_fingerprint_of_what_is_evaluated(root, tmp_path):
  def found(folder, **choices):
    return evaluation_fingerprint(open_shirts(folder, train=False, **choices).evals)

  fingerprint = found(root)
  other = pathlib.Path(shutil.copytree(MINI, tmp_path / "other"))
  (other / "resized_image").rename(other / "images")
  assert found(other) == fingerprint
  (gallery, *_) = open_shirts(root, train=False).evals[0].image_paths
  pathlib.Path(gallery).unlink()
  assert found(root, on_missing="skip") != fingerprint


def test_the_demo_is_drawn_in_the_home_folder_and_has_ceilings(tmp_path, monkeypatch):
  whole = generate.generate
  few = {"n_train_images": 20, "n_train_triplets": 20, "n_val_images": 20, "n_val_queries": 20}
  monkeypatch.setattr(generate, "generate", lambda root: whole(root, image_size=16, **few))
  monkeypatch.setenv("HOME", str(tmp_path))
  dataset = open_shirts("~/demo", dataset="demo", category="all")
  assert dataset.name == "demo/all" and len(dataset.evals) == 3
  facts = json.loads((tmp_path / "demo" / "demo.json").read_text())["ceilings"]
  for kind, value in dataset.ceilings.items():
    assert value == pytest.approx(sum(facts[c][kind] for c in facts) / 3, rel=1e-12)
  assert set(dataset.ceilings) == {"image_only", "text_only"}


def test_every_protocol_of_a_data_set_is_described(tmp_path):
  roots = {name: MINI_DATA / name for name in ("fashioniq", "shoes", "fashion200k")}
  roots["cirr"] = cir_folders.cirr(tmp_path / "cirr")
  roots["circo"] = cir_folders.circo(tmp_path / "circo")
  assert set(registry.DATASETS) == {*roots, "demo"}
  for name, root in roots.items():
    dataset = open_shirts(root, train=False, dataset=name)
    for split in dataset.evals:
      assert list(split.galleries) == list(registry.DATASETS[name].protocols)
  described = registry.protocols()
  for spec in registry.DATASETS.values():
    assert spec.protocols.items() <= described.items()  # One name, one meaning.


def test_the_registry_starts_no_device():
  """Printing results needs the protocols only."""
  program = (
    "import sys; from crn_jax.input_pipeline import registry; assert registry.protocols()\n"
    "print(sorted({'jax', 'flax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)))"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
