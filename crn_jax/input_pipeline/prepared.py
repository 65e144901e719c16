"""The prepared images of a data set: written once, read by id, the same pixels as the folder's."""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Sequence

import ml_collections
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from crn_jax.errors import UserError
from crn_jax.input_pipeline import tfds_builders
from crn_jax.input_pipeline.checks import folder
from crn_jax.input_pipeline.dataset import DatasetSpec

# Bytes a pixel while tfds writes: it collects the images of a split in a file of their own first.
_BYTES_PER_PIXEL = 2 * 3


@dataclasses.dataclass(frozen=True)
class Store:
  """Images of one data set with their short side resized.

  Attributes:
    source: random access by position, as `as_data_source` gives it.
    rows: path below the data folder -> position.
    file_sizes: path below the data folder -> bytes of the file it was made of.
    root: the data folder.
    folder: of the prepared data, for messages.
  """

  source: Sequence
  rows: dict[str, int]
  file_sizes: dict[str, int]
  root: pathlib.Path
  folder: pathlib.Path

  def read(self, path: str) -> np.ndarray:
    """[h, w, 3] uint8 pixels of an image of the data folder.

    Raises:
      UserError: another image stands in its place.
    """
    name = os.path.relpath(path, self.root)
    record = self.source[self.rows[name]]
    found = record["image_id"].decode()
    if found != name:
      raise UserError(
        f"data.prepared: {self.folder} has {found} where {name} is expected; delete that folder "
        f"and run --mode=prepare again"
      )
    return record["image"]

  def check(self, paths: Sequence[str]) -> None:
    """Raises UserError unless all of these files are prepared, and have not changed since."""
    bad = []
    for path in paths:
      name = os.path.relpath(path, self.root)
      if self.file_sizes.get(name) != os.path.getsize(path):
        bad.append(f"{name} ({'changed since' if name in self.file_sizes else 'not prepared'})")
    if bad:
      raise UserError(
        f"data.prepared: {self.folder} was made of other files than those in {self.root}: "
        f"{len(bad):,} of {len(paths):,}, first {bad[0]}. Delete that folder and run "
        f"--mode=prepare again, or set data.prepared to ''"
      )


def prepare(spec: DatasetSpec, config: ml_collections.ConfigDict, paths: Sequence[str]) -> str:
  """Writes the images to the folder `data.prepared`, unless they are there already.

  They appear complete or not at all, also after Ctrl-C.

  Args:
    spec: of the data set.
    config: the `data` part of the configuration.
    paths: of all images, each once.

  Returns:
    What was done, for people to read.

  Raises:
    UserError: the disk is too small, or the folder holds images of other files.
  """
  builder = _builder(spec, config)
  if builder.data_path.exists():
    open_store(spec, config).check(paths)
    return f"{builder.data_dir} holds all {len(paths):,} images already"
  needed = sum(_pixels(path, config.resize) for path in paths) * _BYTES_PER_PIXEL
  target = folder.expand(config.prepared)
  target.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(target).free
  if needed > free:
    raise UserError(
      f"data.prepared: {target} has {free / 1e9:.1f} GB free, writing the images needs up "
      f"to {needed / 1e9:.1f} GB; make room or choose another folder"
    )
  download = tfds.download.DownloadConfig(
    manual_dir=folder.expand(config.root), compute_stats="skip"
  )
  builder.download_and_prepare(download_config=download)
  return f"{builder.data_dir}: {len(paths):,} images with a short side of {config.resize} pixels"


def open_store(spec: DatasetSpec, config: ml_collections.ConfigDict) -> Store:
  """Opens the images in `data.prepared` that belong to the rest of the configuration.

  Args:
    spec: of the data set.
    config: the `data` part of the configuration.

  Raises:
    UserError: they are not prepared, or with another short side.
  """
  builder = _builder(spec, config)
  path = pathlib.Path(builder.data_dir)
  if not path.exists():
    name = path.parent.name
    others = sorted(p.name for p in path.parents[1].glob("*_images_*"))
    raise UserError(
      f"data.prepared: {config.prepared} has no images {name!r} of {builder.name} (short side "
      f"data.resize = {config.resize}); it has {others}. Run --mode=prepare with the same "
      f"configuration, or set data.prepared to ''"
    )
  file_sizes = dict(builder.info.metadata["file_sizes"])
  source = builder.as_data_source(split="images")
  rows = {name: i for i, name in enumerate(file_sizes)}
  return Store(source, rows, file_sizes, folder.expand(config.root), path)


def _builder(spec: DatasetSpec, config: ml_collections.ConfigDict) -> tfds.core.DatasetBuilder:
  if spec.tfds is None:
    raise UserError(f"data.prepared: {spec.name} cannot be prepared; set it to ''")
  builder = tfds_builders.builder_class(spec.tfds)
  part = spec.part(config)
  folder.check_choice(f"data.prepared: part of {spec.name}", part, spec.tfds.parts)
  images = tfds_builders.images_config(part, config.resize)
  return builder(
    data_dir=folder.expand(config.prepared),
    # tfds wants those that a builder announces by their name.
    config=images.name if images.name in builder.builder_configs else images,
    file_format="array_record",
    on_missing=config.on_missing,
  )


def _pixels(path: str, resize: int) -> int:
  """Number of pixels after resizing; only the header is read."""
  with Image.open(path) as image:
    short, long = sorted(image.size)
  return resize * int(resize * long / short)
