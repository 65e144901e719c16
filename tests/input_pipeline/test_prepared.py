"""Prepared images: pixels of the plain folder, built once, refused where they do not fit."""

import pathlib
import shutil

import numpy as np
import pytest

from configs import fashion200k, fashioniq_dress, shoes
from crn_jax.errors import UserError
from crn_jax.input_pipeline import images, loader, prepare, prepared, registry, tfds_builders
from crn_jax.input_pipeline.tokenizers.words import Vocabulary

MINI = pathlib.Path(__file__).parents[1] / "goldens" / "mini_data"

SIZING = images.Sizing(24, 32, "bilinear")


def configured(config, root, folder):
  config.data.root, config.data.prepared = str(root), str(folder)
  config.data.image_size, config.data.resize, config.batch_size = 24, 32, 2
  return config


@pytest.fixture(scope="module")
def dress(tmp_path_factory):
  """The tiny dress data, prepared; and what preparing said."""
  root = tmp_path_factory.mktemp("root") / "fashioniq"
  shutil.copytree(MINI / "fashioniq", root)
  config = configured(fashioniq_dress.get_config(), root, root.parent / "prepared")
  return config, prepare.prepare(config)


def batches(dataset):
  vocabulary = Vocabulary.build(dataset.train.captions, markers="tokens", max_words=8)
  return list(
    loader.train_batches(
      dataset.train,
      vocabulary,
      batch_size=2,
      sizing=SIZING,
      augmentation="random_crop_flip",
      seed=1,
      num_steps=3,
    )
  )


def open_with(config, **changes):
  data = config.data.copy_and_resolve_references()
  data.update(changes)
  return registry.open_dataset(data, train=True)


def test_batches_are_those_of_the_plain_folder(dress, monkeypatch):
  config, _ = dress
  plain = batches(open_with(config, prepared=""))
  dataset = open_with(config)
  monkeypatch.setattr(images, "decode", lambda path: pytest.fail(f"{path} was decoded"))
  for ours, theirs in zip(batches(dataset), plain, strict=True):
    for key, value in theirs.items():
      np.testing.assert_array_equal(ours[key], value)
  (val,) = dataset.evals
  (first, *_) = loader.eval_image_batches(
    val.image_paths,
    batch_size=4,
    sizing=SIZING,
    store=val.store,
  )
  monkeypatch.undo()
  (expected, *_) = loader.eval_image_batches(val.image_paths, batch_size=4, sizing=SIZING)
  np.testing.assert_array_equal(first, expected)


def test_preparing_twice_does_nothing_the_second_time(dress):
  config, first = dress
  assert first.endswith("images with a short side of 32 pixels")
  assert prepare.prepare(config).endswith("already")


@pytest.mark.parametrize(
  ("get_config", "name"), [(shoes.get_config, "shoes"), (fashion200k.get_config, "fashion200k")]
)
def test_other_data_sets(get_config, name, tmp_path):
  config = configured(get_config(), MINI / name, tmp_path)
  config.data.on_missing = "skip"
  prepare.prepare(config)
  train = open_with(config).train
  path = train.image_paths[-1]
  np.testing.assert_array_equal(
    train.store.read(path), images.resize_short_side(images.decode(path), 32)
  )


def test_another_short_side_is_refused(dress):
  with pytest.raises(UserError, match=r"data\.resize = 40\); it has \['dress_images_32'\]"):
    open_with(dress[0], resize=40)


def test_changed_file_is_refused(dress, tmp_path):
  config, _ = dress
  root = tmp_path / "fashioniq"
  shutil.copytree(config.data.root, root)
  changed = root / "resized_image" / "dress" / "B00DRESS01.jpg"
  changed.write_bytes(changed.read_bytes() + b"\0")
  with pytest.raises(UserError, match="first resized_image/dress/B00DRESS01.jpg .changed since"):
    open_with(config, root=str(root))


def test_full_disk_is_reported_before_work_starts(dress, tmp_path, monkeypatch):
  config = dress[0].copy_and_resolve_references()
  config.data.prepared = str(tmp_path)
  full = shutil.disk_usage(tmp_path)._replace(free=10)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
  with pytest.raises(UserError, match="0.0 GB free"):
    prepare.prepare(config)


def test_interrupted_building_leaves_nothing_that_looks_whole(dress, tmp_path, monkeypatch):
  config = dress[0].copy_and_resolve_references()
  config.data.prepared = str(tmp_path)

  def interrupt(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(tfds_builders.ThreadPool, "map", interrupt)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare(config)
  monkeypatch.undo()
  assert not list(tmp_path.rglob("dataset_info.json"))
  with pytest.raises(UserError, match="Run --mode=prepare"):
    open_with(config)
  spec = registry.DATASETS[config.data.dataset]
  assert prepared.prepare(spec, config.data, open_with(config, prepared="").train.image_paths)


def test_folders_may_begin_with_a_tilde(dress, tmp_path, monkeypatch):
  config = dress[0].copy_and_resolve_references()
  shutil.copytree(config.data.root, tmp_path / "data")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  config.data.root, config.data.prepared = "~/data", "~/prepared"
  prepare.prepare(config)
  store = open_with(config).train.store
  assert store.folder.is_relative_to(tmp_path / "prepared")
  assert not (tmp_path / "~").exists()
