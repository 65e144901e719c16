"""Opens the data set that a configuration names."""

import dataclasses
import hashlib
import json
import pathlib

import ml_collections
import numpy as np

from crn_jax.input_pipeline.checks import folder
from crn_jax.input_pipeline.dataset import EvalSplit, TrainSplit
from crn_jax.input_pipeline.demo import generate
from crn_jax.input_pipeline.readers import fashion200k, fashioniq, shoes

DATASETS = ("fashioniq", "shoes", "fashion200k", "demo")


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set as training and evaluation see it.

  Attributes:
    name: for results, e.g. "fashioniq/dress" or "shoes".
    train: training data; None if only evaluation was asked for.
    evals: one split a category; one in all for Shoes and Fashion200k.
    ceilings: R@10 in percent that the best image-only and text-only ranking could reach, where the
      data set knows it; else None.
    skipped: counts of what `data.on_missing = 'skip'` left out, ready for JSON; empty if nothing.
      {"train": {..., "triplets", "of_triplets"}, "val": {split: {..., "queries", "of_queries",
      and of each gallery "NAME", "of_NAME"}}}: how many triplets, queries and gallery images were
      left out of how many. For "..." stand the causes:
      "entries_malformed", "entries_outside_split", "images_unreadable", "images_missing". "train"
      is absent if only evaluation was asked for. `holes.describe_skipped` says it in words.
    image_digest: of the image files' names, sizes and times of change, for `known_digest` of
      `open_dataset`; "" if some are unreadable.
    remarks: what is odd but harmless in the folder, in sentences.
    fingerprint: of `train`, see `fingerprint`; "" if only evaluation was asked for.
  """

  name: str
  train: TrainSplit | None
  evals: tuple[EvalSplit, ...]
  ceilings: dict[str, float] | None = None
  skipped: dict = dataclasses.field(default_factory=dict)
  image_digest: str = ""
  remarks: tuple[str, ...] = ()
  fingerprint: str = ""


def open_dataset(
  config: ml_collections.ConfigDict, *, train: bool, known_digest: str | None = None
) -> Dataset:
  """Reads the annotations and verifies the images; draws the demo data set if it is not there yet.

  Args:
    config: the `data` part of the configuration.
    train: whether the training data are needed.
    known_digest: `image_digest` of an earlier call; unchanged images are not verified again.

  Raises:
    ValueError, FileNotFoundError: on an unknown data set or on bad data; one message lists
      everything that is wrong and says how to go on.
  """
  folder.check_choice("data.dataset", config.dataset, DATASETS)
  checks = {"train": train, "on_missing": config.on_missing, "known_digest": known_digest}
  name, ceilings = config.dataset, None
  if config.dataset == "demo":
    facts = generate.generate(config.root)["ceilings"]
    used = fashioniq.CATEGORIES if config.category == "all" else (config.category,)
    ceilings = {
      k: float(np.mean([facts[category][k] for category in used]))
      for k in ("image_only", "text_only")
    }
  if config.dataset == "shoes":
    data = shoes.read(config.root, config.shoes_pairs, **checks)
  elif config.dataset == "fashion200k":
    data = fashion200k.read(config.root, **checks)
  else:
    name += f"/{config.category}"
    data = fashioniq.read(config.root, config.category, config.captions, **checks)
  train_split, evals = data.train, data.evals
  if config.prepared:
    from crn_jax.input_pipeline import prepared  # Late: TensorFlow takes seconds to import.

    splits = ((train_split,) if train else ()) + evals
    paths = dict.fromkeys(path for split in splits for path in split.image_paths)
    store = prepared.open_store(config, tuple(paths))
    evals = tuple(dataclasses.replace(split, store=store) for split in evals)
    train_split = dataclasses.replace(train_split, store=store) if train else None
  return Dataset(
    name,
    train_split,
    evals,
    ceilings,
    skipped=data.skipped,
    image_digest=data.image_digest,
    remarks=data.remarks,
    fingerprint=fingerprint(data.train) if train else "",
  )


def fingerprint(split: TrainSplit) -> str:
  """Digest of what decides the course of a training: triplets in their order, and captions.

  Images are named by their ids, not by their paths: another copy of the data, in another layout,
  has the same fingerprint. Pixels are not looked at. Where triplets are drawn anew each epoch, one
  draw stands for all.
  """
  ids = [pathlib.PurePath(path).stem for path in split.image_paths]
  triplets = split.triplets.draw(seed=0, epoch=0)
  rows = zip(triplets.reference.tolist(), triplets.target.tolist(), triplets.texts, strict=True)
  content = [[[ids[r], ids[t], texts] for r, t, texts in rows], split.captions]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()
