"""The builders by TensorFlow Datasets' own checks, on the tiny copies of the data sets."""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from crn_jax.input_pipeline import tfds_builders
from tests import cir_folders

MINI = pathlib.Path(__file__).parents[1] / "goldens" / "mini_data"


class FashionIQTest(tfds.testing.DatasetBuilderTestCase):
  DATASET_CLASS = tfds_builders.CrnFashionIQ
  EXAMPLE_DIR = str(MINI / "fashioniq")
  BUILDER_CONFIG_NAMES_TO_TEST = ["dress_triplets"]
  SPLITS = {"train": 8, "dress": 6}
  SKIP_TF1_GRAPH_MODE = True


class FashionIQImagesTest(tfds.testing.DatasetBuilderTestCase):
  DATASET_CLASS = tfds_builders.CrnFashionIQ
  EXAMPLE_DIR = str(MINI / "fashioniq")
  BUILDER_CONFIG_NAMES_TO_TEST = ["dress_images_256"]
  SPLITS = {"images": 18}
  SKIP_TF1_GRAPH_MODE = True


class ShoesTest(tfds.testing.DatasetBuilderTestCase):
  DATASET_CLASS = tfds_builders.CrnShoes
  EXAMPLE_DIR = str(MINI / "shoes")
  BUILDER_CONFIG_NAMES_TO_TEST = ["unique_triplets"]
  SPLITS = {"train": 4, "shoes": 4}
  SKIP_TF1_GRAPH_MODE = True


class Fashion200kTest(tfds.testing.DatasetBuilderTestCase):
  DATASET_CLASS = tfds_builders.CrnFashion200k
  EXAMPLE_DIR = str(MINI / "fashion200k")
  BUILDER_CONFIG_NAMES_TO_TEST = ["all_triplets"]
  SPLITS = {"train": 15, "fashion200k": 6}
  SKIP_TF1_GRAPH_MODE = True


def test_triplets_name_images(tmp_path):
  manual = tfds.download.DownloadConfig(manual_dir=str(MINI / "fashioniq"))
  loaded = {
    name: tfds.load(
      f"crn_fashion_iq/{name}",
      data_dir=tmp_path,
      download_and_prepare_kwargs={"download_config": manual},
    )
    for name in ("dress_triplets", "dress_images_256")
  }
  images = {
    row["image_id"]: row["image"] for row in tfds.as_numpy(loaded["dress_images_256"]["images"])
  }
  named = [
    row[end]
    for split in ("train", "dress")
    for row in tfds.as_numpy(loaded["dress_triplets"][split])
    for end in ("reference", "target")
  ]
  assert set(named) <= set(images)
  assert all(min(image.shape[:2]) == 256 and image.dtype == np.uint8 for image in images.values())


@pytest.mark.parametrize(
  ("name", "part", "splits"),
  [("cirr", "rc2", {"train": 20, "cirr": 12}), ("circo", "val", {"circo": 6})],
)
def test_data_sets_with_and_without_a_train_split(name, part, splits, tmp_path):
  root = getattr(cir_folders, name)(tmp_path / "data")
  manual = tfds.download.DownloadConfig(manual_dir=str(root))
  loaded = {
    kind: tfds.load(
      f"crn_{name}/{part}_{kind}",
      data_dir=tmp_path,
      download_and_prepare_kwargs={"download_config": manual},
    )
    for kind in ("triplets", "images_256")
  }
  assert {s: len(rows) for s, rows in loaded["triplets"].items()} == splits
  images = {row["image_id"] for row in tfds.as_numpy(loaded["images_256"]["images"])}
  for rows in loaded["triplets"].values():
    assert {row[end] for row in tfds.as_numpy(rows) for end in ("reference", "target")} <= images
