"""TensorFlow Datasets of the data sets: images once, resized, and triplets that name them by id.

  import crn_jax.input_pipeline.tfds_builders
  tfds.load("crn_fashion_iq/dress_triplets", data_dir=..., download_and_prepare_kwargs={
    "download_config": tfds.download.DownloadConfig(manual_dir="data/fashioniq")})

Every data set has two sorts of configurations, because all splits of one share their features:

  {part}_images_{short side}  split "images": image_id, image [h, w, 3] uint8 as
                              `images.resize_short_side` gives it
  {part}_triplets             splits "train" (if there is one) and one a category: reference,
                              target (image_id), texts

An image_id is the path below the data folder. Images are stored as pixels, not as JPEG or PNG:
pixels stay those of the plain folder, and nothing is left to decode.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool

import numpy as np
import tensorflow_datasets as tfds

from crn_jax.input_pipeline import images, registry
from crn_jax.input_pipeline.dataset import TfdsSpec, Triplets

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
  """A data set of the registry as a builder of TensorFlow Datasets.

  Args:
    on_missing: as `data.on_missing`.
    **kwargs: as tfds has them.
  """

  VERSION = tfds.core.Version("1.0.0")
  SPEC: TfdsSpec

  def __init__(self, *, on_missing: str = "error", **kwargs):
    self.on_missing = on_missing
    super().__init__(**kwargs)

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
      description=self.SPEC.description,
      homepage=self.SPEC.homepage,
      features=tfds.features.FeaturesDict(features),
      # Rows of the images are positions; keys are their numbers.
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    root = dl_manager.manual_dir
    data = self.SPEC.read(root, self.builder_config.part, self.on_missing)
    splits = {}
    if data.train is not None:
      splits["train"] = (data.train.image_paths, data.train.triplets.draw(0, 0))
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


@functools.cache
def builder_class(spec: TfdsSpec) -> type[_Builder]:
  """The builder of a data set; making it registers it with `tfds.load`."""
  attributes = {
    "__doc__": spec.description,
    "__module__": __name__,
    "SPEC": spec,
    "MANUAL_DOWNLOAD_INSTRUCTIONS": spec.manual_download_instructions,
    "BUILDER_CONFIGS": configs(spec.parts, spec.short_side),
  }
  return type(spec.class_name, (_Builder,), attributes)


# By their names in this module, too, as tfds and pickle look for them: CrnFashionIQ, CrnShoes, ...
globals().update(
  {
    spec.tfds.class_name: builder_class(spec.tfds)
    for spec in registry.DATASETS.values()
    if spec.tfds is not None
  }
)
