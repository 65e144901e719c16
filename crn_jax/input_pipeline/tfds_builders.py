"""TensorFlow Datasets of the data sets: images once, resized, and triplets that name them by id.

  import crn_jax.input_pipeline.tfds_builders
  tfds.load("crn_fashion_iq/dress_triplets", data_dir=..., download_and_prepare_kwargs={
    "download_config": tfds.download.DownloadConfig(manual_dir="data/fashioniq")})

Every data set has two sorts of configurations, because all splits of one share their features:

  {part}_images_{short side}  split "images": image_id, image [h, w, 3] uint8 as
                              `images.resize_short_side` gives it
  {part}_triplets             splits "train" and one a category: reference, target (image_id), texts

An image_id is the path below the data folder. Images are stored as pixels, not as JPEG or PNG:
pixels stay those of the plain folder, and nothing is left to decode.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool

import numpy as np
import tensorflow_datasets as tfds

from crn_jax.input_pipeline import images
from crn_jax.input_pipeline.dataset import Triplets
from crn_jax.input_pipeline.readers import fashion200k, fashioniq, shoes

_CHUNK = 64  # Images decoded ahead of the writer.


@dataclasses.dataclass(kw_only=True)
class Config(tfds.core.BuilderConfig):
  """What is prepared.

  Attributes:
    part: of the data set, e.g. a category.
    resize: short side of the images in pixels; None for triplets.
  """

  part: str
  resize: int | None


def images_config(part: str, resize: int) -> Config:
  """Configuration that holds the images."""
  return Config(name=f"{part}_images_{resize}", part=part, resize=resize)


def configs(parts: Sequence[str], resize: int) -> list[Config]:
  """The published configurations: images and triplets of every part."""
  triplets = [Config(name=f"{part}_triplets", part=part, resize=None) for part in parts]
  return [*triplets, *(images_config(part, resize) for part in parts)]


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A reader of `input_pipeline` as a builder of TensorFlow Datasets.

  Args:
    on_missing: as `data.on_missing`.
    **kwargs: as tfds has them.
  """

  VERSION = tfds.core.Version("1.0.0")
  DESCRIPTION: str
  HOMEPAGE: str

  def __init__(self, *, on_missing: str = "error", **kwargs):
    self.on_missing = on_missing
    super().__init__(**kwargs)

  def read(self, root: os.PathLike):
    """The reader's result: `train` and `evals`."""
    raise NotImplementedError

  def _info(self) -> tfds.core.DatasetInfo:
    if self.builder_config.resize is None:
      features = {
        "reference": tfds.features.Text(),
        "target": tfds.features.Text(),
        "texts": tfds.features.Sequence(tfds.features.Text()),
      }
    else:
      features = {
        "image_id": tfds.features.Text(),
        "image": tfds.features.Tensor(shape=(None, None, 3), dtype=np.uint8, encoding="bytes"),
      }
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      homepage=self.HOMEPAGE,
      features=tfds.features.FeaturesDict(features),
      # Rows of the images are positions; keys are their numbers.
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    root = dl_manager.manual_dir
    data = self.read(root)
    splits = {"train": (data.train.image_paths, data.train.triplets.draw(0, 0))}
    splits |= {s.name: (s.image_paths, s.queries) for s in data.evals}
    if self.builder_config.resize is None:
      return {
        name: self._generate_triplets([os.path.relpath(p, root) for p in paths], triplets)
        for name, (paths, triplets) in splits.items()
      }
    paths = list(dict.fromkeys(p for paths, _ in splits.values() for p in paths))
    ids = [os.path.relpath(p, root) for p in paths]
    self.info.metadata["file_sizes"] = {
      i: os.path.getsize(p) for i, p in zip(ids, paths, strict=True)
    }
    return {"images": self._generate_images(ids, paths)}

  def _generate_examples(self):
    raise NotImplementedError  # tfds wants it; the splits have generators of their own.

  def _generate_triplets(self, ids: Sequence[str], triplets: Triplets) -> Iterator:
    rows = zip(triplets.reference, triplets.target, triplets.texts, strict=True)
    for key, (r, t, texts) in enumerate(rows):
      yield key, {"reference": ids[r], "target": ids[t], "texts": list(texts)}

  def _generate_images(self, ids: Sequence[str], paths: Sequence[str]) -> Iterator:
    def load(path):
      return images.resize_short_side(images.decode(path), self.builder_config.resize)

    with ThreadPool() as pool:
      for start in range(0, len(paths), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        for i, image in enumerate(pool.map(load, paths[chunk])):
          yield start + i, {"image_id": ids[start + i], "image": image}


class CrnFashionIQ(_Builder):
  """FashionIQ, see `fashioniq` for the folder's layout."""

  DESCRIPTION = "FashionIQ (Wu et al., CVPR 2021): a reference image and two captions -> a target."
  HOMEPAGE = "https://github.com/XiaoxiaoGuo/fashion-iq"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "A folder with captions/, image_splits/ and resized_image/CATEGORY/."
  )
  BUILDER_CONFIGS = configs((*fashioniq.CATEGORIES, "all"), 256)

  def read(self, root):
    return fashioniq.read(root, self.builder_config.part, on_missing=self.on_missing)


class CrnShoes(_Builder):
  """Shoes with relative captions, see `shoes` for the folder's layout."""

  DESCRIPTION = "Shoes (Guo et al., NeurIPS 2018): a reference image and a caption -> a target."
  HOMEPAGE = "https://github.com/XiaoxiaoGuo/fashion-retrieval"
  MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with relative_captions_shoes.json and womens_*/."
  BUILDER_CONFIGS = configs(shoes.PAIRS, 256)

  def read(self, root):
    return shoes.read(root, self.builder_config.part, on_missing=self.on_missing)


class CrnFashion200k(_Builder):
  """Fashion200k, see `fashion200k`; its train triplets are one draw, those of seed 0, epoch 0."""

  DESCRIPTION = (
    "Fashion200k (Han et al., ICCV 2017): a reference image, a changed word -> a target."
  )
  HOMEPAGE = "https://github.com/xthan/fashion-200k"
  MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with labels/, test_queries.txt and women/."
  BUILDER_CONFIGS = configs(("all",), 224)

  def read(self, root):
    return fashion200k.read(root, on_missing=self.on_missing)
