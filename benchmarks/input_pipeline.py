"""Images a second of the training pipeline, beside a PyTorch DataLoader on the same files.

pip install torch torchvision && python benchmarks/input_pipeline.py

Draws seeded JPEGs of the sizes and file sizes of fashion photographs, checks that all pipelines
give the same pixels, and times them in turns. Both sides use two threads or processes.
"""

import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch
from absl import app, flags
from PIL import Image

# torchvision's own operators do not load beside every build of PyTorch; none is used here, but
# importing it asks for these two.
_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
  _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchvision import transforms  # noqa: E402

from configs import fashioniq_dress  # noqa: E402
from crn_jax.input_pipeline import images, loader, prepare, registry  # noqa: E402
from crn_jax.input_pipeline.dataset import TrainSplit  # noqa: E402
from crn_jax.input_pipeline.tokenizers.words import Vocabulary  # noqa: E402

_IMAGES = flags.DEFINE_integer("images", 256, "Different images.")
_EPOCHS = flags.DEFINE_integer("epochs", 3, "How often each run reads all of them.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs of each pipeline.")

_SIZES = ((600, 800), (300, 400))
_RESIZE, _CROP, _BATCH = 256, 224, 16


def draw(rng: np.random.Generator, width: int, height: int) -> Image.Image:
  """A soft picture with detail: some 80 KB as a JPEG of 600 x 800 pixels, as shop photographs."""
  picture = np.zeros((height, width, 3), np.float32)
  for cells, strength in ((4, 90), (32, 30), (128, 14)):
    noise = rng.integers(0, 256, (cells, cells, 3), np.uint8)
    soft = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    picture += (np.asarray(soft, np.float32) / 255 - 0.5) * 2 * strength
  return Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8))


def write_images(folder: pathlib.Path, width: int, height: int) -> list[str]:
  """Draws the images; returns their paths."""
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True)
  paths = [str(folder / f"{i:05}.jpg") for i in range(_IMAGES.value)]
  for path in paths:
    draw(rng, width, height).save(path, quality=90)
  return paths


class Pairs(torch.utils.data.Dataset):
  """Pairs of images as torchvision users read them, normalised float32."""

  def __init__(self, paths, augment: bool):
    crop = (
      [transforms.RandomCrop(_CROP), transforms.RandomHorizontalFlip()]
      if augment
      else [transforms.CenterCrop(_CROP)]
    )
    self.paths = paths
    self.transform = transforms.Compose([
      transforms.Resize(_RESIZE),
      *crop,
      transforms.ToTensor(),
      transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip

  def __len__(self):
    return len(self.paths) // 2 * _EPOCHS.value

  def __getitem__(self, i):
    if i >= len(self):
      raise IndexError(i)
    i %= len(self.paths) // 2
    return tuple(self._read(self.paths[2 * i + j]) for j in range(2))

  def _read(self, path):
    with Image.open(path) as image:
      return self.transform(image.convert("RGB"))


def torch_images_per_second(paths) -> float:
  """PyTorch: two worker processes."""
  data = torch.utils.data.DataLoader(
    Pairs(paths, augment=True), batch_size=_BATCH, shuffle=True, num_workers=2, drop_last=True
  )
  return rate(iter(data))


def open_both(root: pathlib.Path, paths: list[str], folder: pathlib.Path) -> tuple:
  """The images as a FashionIQ data set, once read from the files and once prepared."""
  ids = [pathlib.Path(path).stem for path in paths]
  pairs = zip(ids[::2], ids[1::2], strict=True)
  entries = [{"candidate": r, "target": t, "captions": ["is red", "is long"]} for r, t in pairs]
  for name in ("captions", "image_splits"):
    (root / name).mkdir()
  for split, part in (("train", entries), ("val", entries[:1])):
    (root / f"captions/cap.dress.{split}.json").write_text(json.dumps(part))
    (root / f"image_splits/split.dress.{split}.json").write_text(json.dumps(ids))
  config = fashioniq_dress.get_config()
  config.data.root = str(root)
  config.data.prepared = str(folder)
  prepare.prepare(config)
  both = [registry.open_dataset(config.data, train=True).train]
  config.data.prepared = ""
  return registry.open_dataset(config.data, train=True).train, *both


def our_batches(split: TrainSplit, augmentation: str = "random_crop_flip"):
  """The training pipeline."""
  return loader.train_batches(
    split,
    Vocabulary.build(split.captions, markers="tokens", max_words=32),
    batch_size=_BATCH,
    sizing=images.Sizing(_CROP, _RESIZE, "bilinear"),
    augmentation=augmentation,
    seed=0,
    num_steps=len(split.triplets) // _BATCH * _EPOCHS.value,
  )


def rate(batches) -> float:
  """Images a second, from the second batch on: neither start-up nor the first fill counts."""
  next(batches)
  start = time.perf_counter()
  n = sum(1 for _ in batches)
  return 2 * _BATCH * n / (time.perf_counter() - start)


def check_pixels(paths: list[str], splits: Sequence[TrainSplit]) -> None:
  """Ends with an error unless all pipelines give torchvision's very pixels."""
  mean, std = (np.float32(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
  expected = set()
  for tensor in (image for pair in Pairs(paths, augment=False) for image in pair):
    pixels = np.rint((tensor.numpy().transpose(1, 2, 0) * std + mean) * 255)
    expected.add(pixels.astype(np.uint8).tobytes())
  for split in splits:
    batch = next(our_batches(split, "none"))
    if not {image.tobytes() for key in ("reference", "target") for image in batch[key]} <= expected:
      raise SystemExit("the pipelines do not give the same pixels")


def main(_):
  with tempfile.TemporaryDirectory() as folder:
    for width, height in _SIZES:
      root = pathlib.Path(folder, f"{width}x{height}")
      paths = write_images(root / "images", width, height)
      plain, prepared = open_both(root, paths, pathlib.Path(folder, f"prepared{width}"))
      check_pixels(paths, (plain, prepared))
      rates = {"PyTorch": [], "folder": [], "prepared": []}
      for _ in range(_ROUNDS.value):
        rates["PyTorch"].append(torch_images_per_second(paths))
        rates["folder"].append(rate(our_batches(plain)))
        rates["prepared"].append(rate(our_batches(prepared)))
      medians = {name: statistics.median(values) for name, values in rates.items()}
      size = statistics.mean(pathlib.Path(path).stat().st_size for path in paths)
      print(f"{width} x {height}, JPEGs of {size / 1000:.0f} KB, pixels equal")
      for name, value in medians.items():
        print(f"  {name:9} {value:7.0f} images/s  {value / medians['PyTorch']:5.2f} x PyTorch")


if __name__ == "__main__":
  app.run(main)
