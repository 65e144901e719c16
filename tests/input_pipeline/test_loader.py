"""Loader: order, resumption, shards, augmentation, padding, errors."""

import dataclasses
import itertools
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from crn_jax.errors import UserError
from crn_jax.input_pipeline import images, loader
from crn_jax.input_pipeline.dataset import TrainSplit, Triplets
from crn_jax.input_pipeline.readers import fashioniq
from crn_jax.input_pipeline.tokenizers.words import Vocabulary

REPOSITORY = pathlib.Path(__file__).parents[2]
MINI = REPOSITORY / "tests" / "goldens" / "mini_data" / "fashioniq"
N = 11
SIZING = images.Sizing(12, 16, "bilinear")
SETTINGS = {
  "batch_size": 4,
  "sizing": SIZING,
  "augmentation": "random_crop_flip",
  "seed": 3,
  "num_steps": 7,
}


@pytest.fixture(scope="module")
def split():
  """Eleven triplets over the eight dresses of the tiny tree; texts tell them apart."""
  dresses = fashioniq.read(MINI, "dress").train
  n_images = len(dresses.image_paths)
  return dataclasses.replace(
    dresses,
    triplets=Triplets(
      reference=np.arange(N, dtype=np.int32) % n_images,
      target=(np.arange(N, dtype=np.int32) + 3) % n_images,
      texts=tuple((f"w{i}",) for i in range(N)),
    ),
  )


@pytest.fixture(scope="module")
def vocabulary():
  """The id of word w<i> is 4 + i."""
  return Vocabulary.build([f"w{i}" for i in range(N)], markers="words", max_words=3)


def read(split, vocabulary, **changes):
  return list(loader.train_batches(split, vocabulary, **(SETTINGS | changes)))


def items_of(batches):
  """Which triplets the batches hold, in order."""
  return [row[0] - 4 for batch in batches for row in batch["tokens"].tolist()]


def assert_same(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected, strict=True):
    assert batch.keys() == other.keys()
    for key, value in batch.items():
      np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_batches_have_the_promised_shapes(split, vocabulary):
  batches = read(split, vocabulary)
  assert len(batches) == 7
  for batch in batches:
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
      "reference": ((4, 12, 12, 3), "uint8"),
      "target": ((4, 12, 12, 3), "uint8"),
      "tokens": ((4, 3), "int32"),
      "token_mask": ((4, 3), "bool"),
    }


def test_images_belong_to_their_texts(split, vocabulary):
  """Without augmentation every row is the central crop of the triplet's own images."""
  for batch in read(
    split, vocabulary, augmentation="none", sizing=images.Sizing(12, 14, "bilinear")
  ):
    for i, item in enumerate(items_of([batch])):
      for key in ("reference", "target"):
        path = split.image_paths[getattr(split.triplets, key)[item]]
        resized = images.resize_short_side(images.decode(path), 14)
        np.testing.assert_array_equal(batch[key][i], images.center_crop(resized, 12))


def test_order_is_the_epochs_permutation_without_its_ragged_end(split, vocabulary):
  seen = items_of(read(split, vocabulary, num_steps=4))
  for epoch in range(2):
    expected = loader.epoch_order(N, SETTINGS["seed"], epoch)[:8]
    assert seen[8 * epoch : 8 * epoch + 8] == expected.tolist()


def test_epochs_and_seeds_differ_and_repeat():
  orders = [loader.epoch_order(50, s, e).tolist() for s, e in itertools.product((0, 1), (0, 1))]
  assert len({tuple(order) for order in orders}) == 4
  assert all(sorted(order) == list(range(50)) for order in orders)
  assert loader.epoch_order(50, 1, 1).tolist() == orders[3]
  draws = [loader.epoch_draws(5, s, e) for s, e in itertools.product((0, 1), (0, 1))]
  assert len({d.tobytes() for d in draws}) == 4
  np.testing.assert_array_equal(loader.epoch_draws(5, 1, 1), draws[3])


def test_two_runs_are_equal(split, vocabulary):
  assert_same(read(split, vocabulary), read(split, vocabulary))


@pytest.mark.parametrize("start_step", [1, 2, 3, 5, 7])
def test_resumed_run_sees_the_same_batches(split, vocabulary, start_step):
  whole = read(split, vocabulary)
  assert_same(read(split, vocabulary, start_step=start_step), whole[start_step:])


def test_resumption_does_not_decode_what_it_skips(split, vocabulary, monkeypatch):
  decoded = []
  original = images.decode

  def counting(path):
    decoded.append(path)
    return original(path)

  monkeypatch.setattr(images, "decode", counting)
  read(split, vocabulary, start_step=6)
  assert len(decoded) == 2 * SETTINGS["batch_size"]


@pytest.mark.parametrize("process_count", [2, 4])
def test_shards_join_to_the_global_batches(split, vocabulary, process_count):
  shards = [
    read(split, vocabulary, process_index=i, process_count=process_count)
    for i in range(process_count)
  ]
  joined = [
    {key: np.concatenate([shard[key] for shard in step]) for key in step[0]}
    for step in zip(*shards, strict=True)
  ]
  assert_same(joined, read(split, vocabulary))


def test_chunks_do_not_show(split, vocabulary, monkeypatch):
  whole = read(split, vocabulary)
  monkeypatch.setattr(loader, "_MAX_CHUNK", 1)
  assert_same(read(split, vocabulary), whole)


def test_cached_images_give_the_same_batches(split, vocabulary):
  assert_same(read(split, vocabulary, cache_images=True), read(split, vocabulary))


def test_cached_images_are_not_decoded_again(split, vocabulary, monkeypatch):
  decoded = []
  original = images.decode

  def counting(path):
    decoded.append((threading.get_ident(), path))
    return original(path)

  monkeypatch.setattr(images, "decode", counting)
  read(split, vocabulary, num_steps=30, cache_images=True)
  # Two threads may meet at an image, but no thread decodes one twice.
  assert len(decoded) == len(set(decoded))


def test_reference_and_target_are_augmented_independently(split, vocabulary):
  """The same image on both sides is cut differently, and differently in every epoch."""
  rows = np.zeros(4, np.int32)
  same = dataclasses.replace(split, triplets=Triplets(rows, rows, split.triplets.texts[:4]))
  batches = read(same, vocabulary, num_steps=3)
  crops = [image.tobytes() for b in batches for k in ("reference", "target") for image in b[k]]
  assert len(set(crops)) > len(crops) // 2


def test_augmentation_reaches_every_offset_and_flips_half():
  image = np.arange(5 * 4, dtype=np.uint8).reshape(5, 4)[:, :, None].repeat(3, 2)
  crops = [
    loader.augment(image, d, 3)[:, :, 0] for d in loader.epoch_draws(200, 0, 0).reshape(-1, 3)
  ]
  flipped = [crop[0, 0] > crop[0, 1] for crop in crops]
  corners = {int(min(crop[0, 0], crop[0, -1])) for crop in crops}
  assert corners == {0, 1, 4, 5, 8, 9}
  assert 0.4 < np.mean(flipped) < 0.6


def test_extreme_draws_stay_inside():
  image = np.zeros((5, 4, 3), np.uint8)
  for draw in (0.0, np.nextafter(1.0, 0.0)):
    assert loader.augment(image, np.full(3, draw), 3).shape == (3, 3, 3)


def test_steps_per_epoch_drops_the_ragged_end():
  assert [loader.steps_per_epoch(n, 4) for n in (4, 7, 8)] == [1, 1, 2]


@pytest.mark.parametrize(
  ("changes", "message", "error"),
  [
    ({"batch_size": 12}, r"batch_size: expected 1 \.\. 11, .*got 12", UserError),
    ({"process_count": 3}, "4 cannot be divided evenly among 3 processes", UserError),
    (
      {"process_index": 2, "process_count": 2},
      r"process_index: .* 0 \.\. 1, got 2",
      ValueError,
    ),
    (
      {"sizing": images.Sizing(12, 11, "bilinear")},
      "resize: expected at least image_size = 12",
      UserError,
    ),
    ({"augmentation": "flip"}, "augmentation: expected one of", UserError),
    ({"start_step": 8}, r"start_step: expected 0 \.\. num_steps = 7, got 8", ValueError),
    ({"batch_size": 0}, "batch_size", UserError),
  ],
)
def test_settings_that_do_not_fit_are_refused_at_once(split, vocabulary, changes, message, error):
  with pytest.raises(ValueError, match=message) as caught:
    loader.train_batches(split, vocabulary, **(SETTINGS | changes))
  assert caught.type is error


def test_broken_image_is_named(split, vocabulary, tmp_path):
  broken = tmp_path / "broken.jpg"
  broken.write_bytes(b"no image")
  spoilt = dataclasses.replace(split, image_paths=(str(broken),) * len(split.image_paths))
  with pytest.raises(UserError, match="broken.jpg: cannot be decoded"):
    read(spoilt, vocabulary)
  with pytest.raises(FileNotFoundError, match="absent.jpg"):
    list(
      loader.eval_image_batches(
        [str(tmp_path / "absent.jpg")],
        batch_size=2,
        sizing=SIZING,
      )
    )


ABANDON = """
import sys
from crn_jax.input_pipeline import images, loader
from crn_jax.input_pipeline.readers import fashioniq
from crn_jax.input_pipeline.tokenizers import words
split = fashioniq.read(sys.argv[1], "dress").train
vocabulary = words.Vocabulary.build(split.captions, markers="tokens", max_words=8)
batches = loader.train_batches(
  split, vocabulary, batch_size=4, sizing=images.Sizing(12, 16, "bilinear"), augmentation="none",
  seed=0, num_steps=1_000_000)
next(batches)
raise RuntimeError("training failed")
"""


def test_process_ends_when_training_fails_in_the_middle():
  """Threads of tf.data that still call into Python must not keep it alive."""
  result = subprocess.run(
    [sys.executable, "-c", ABANDON, str(MINI)],
    timeout=120,
    check=False,
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
  )
  assert result.returncode == 1
  assert "RuntimeError: training failed" in result.stderr
  assert "Exception ignored" not in result.stderr


def write_grey_images(folder, n):
  """Image i has grey level 10 i."""
  paths = [str(folder / f"{i}.png") for i in range(n)]
  for i, path in enumerate(paths):
    Image.new("L", (9, 8), 10 * i).save(path)
  return paths


@pytest.mark.parametrize(("n", "n_batches"), [(0, 0), (3, 1), (4, 1), (9, 3)])
def test_eval_batches_come_in_order_and_are_filled_up(tmp_path, n, n_batches):
  paths = write_grey_images(tmp_path, n)
  batches = list(
    loader.eval_image_batches(paths, batch_size=4, sizing=images.Sizing(6, 8, "bilinear"))
  )
  assert [(b.shape, b.dtype) for b in batches] == [((4, 6, 6, 3), np.uint8)] * n_batches
  levels = [int(level) for b in batches for level in b[:, 0, 0, 0]]
  assert levels == [10 * i for i in range(n)] + [0] * (4 * n_batches - n)


def test_eval_shards_join_to_the_global_batches(tmp_path):
  paths = write_grey_images(tmp_path, 7)
  sizes = {"batch_size": 4, "sizing": images.Sizing(6, 8, "bilinear")}
  shards = [
    list(loader.eval_image_batches(paths, **sizes, process_index=i, process_count=2))
    for i in range(2)
  ]
  joined = [np.concatenate(step) for step in zip(*shards, strict=True)]
  np.testing.assert_array_equal(joined, list(loader.eval_image_batches(paths, **sizes)))


def test_eval_images_are_the_central_crops(split):
  batches = loader.eval_image_batches(split.image_paths, batch_size=8, sizing=SIZING)
  for image, path in zip(next(batches), split.image_paths, strict=True):
    resized = images.resize_short_side(images.decode(path), 16)
    np.testing.assert_array_equal(image, images.center_crop(resized, 12))


@pytest.mark.parametrize("max_ratio", [None, 1.25])
def test_squeezed_images_are_cropped_and_mirrored_at_random(split, vocabulary, max_ratio):
  sizing = images.Sizing(12, 16, "bicubic", max_ratio, squeeze=True)
  squeezed = {}
  for path in split.image_paths:
    pixels = images.decode(path)
    if max_ratio:
      pixels = images.pad_to_ratio(pixels, max_ratio)
    squeezed[path] = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC))
  assert len({images.decode(path).shape for path in squeezed}) > 2
  (batch, *_) = read(split, vocabulary, sizing=sizing)
  order, draws = loader.epoch_order(N, 3, 0)[:4], loader.epoch_draws(N, 3, 0)[:4]
  for j, (key, rows) in enumerate((("reference", split.triplets.reference),
                                   ("target", split.triplets.target))):  # fmt: skip
    for i, row in enumerate(rows[order]):
      expected = loader.augment(squeezed[split.image_paths[row]], draws[i, j], 12)
      np.testing.assert_array_equal(batch[key][i], expected)
  # Of the towers' own size there is nothing to cut off: only mirroring is left.
  whole = images.Sizing(16, 16, "bicubic", max_ratio, squeeze=True)
  (batch, *_) = read(split, vocabulary, sizing=whole)
  for i, row in enumerate(split.triplets.reference[order]):
    expected = squeezed[split.image_paths[row]]
    mirrored = expected[:, ::-1] if draws[i, 0, 2] < 0.5 else expected
    np.testing.assert_array_equal(batch["reference"][i], mirrored)


def test_images_of_the_right_size_arrive_untouched(tmp_path, vocabulary):
  pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(tmp_path / "image.png")
  rows = np.zeros(4, np.int32)
  triplets = Triplets(rows, rows, (("w0",),) * 4)
  split = TrainSplit((str(tmp_path / "image.png"),), triplets, ("w0",))
  (batch,) = read(
    split, vocabulary, num_steps=1, sizing=images.Sizing(12, 12, "bilinear"), augmentation="none"
  )
  np.testing.assert_array_equal(batch["reference"], np.stack([pixels] * 4))


def test_reader_of_fashioniq_feeds_the_loader(vocabulary, tmp_path):
  root = shutil.copytree(MINI, tmp_path / "data")
  train = fashioniq.read(root, "all", "both_orders").train
  batches = read(train, vocabulary, batch_size=13, num_steps=2)
  assert len(train.triplets) == 26
  assert [b["reference"].shape for b in batches] == [(13, 12, 12, 3)] * 2


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_are_started_ahead_and_keep_their_order(size):
  put = []

  def record(batch):
    put.append(batch)
    return -batch

  ahead = []
  for i, batch in enumerate(loader.under_way(range(4), record, size)):
    assert batch == -i
    ahead.append(len(put) - 1 - i)
  assert ahead == [min(size, 3 - i) for i in range(4)]


def test_nothing_ahead_is_refused():
  with pytest.raises(ValueError, match="size: expected 1 or more"):
    loader.under_way([], lambda batch: batch, 0)
