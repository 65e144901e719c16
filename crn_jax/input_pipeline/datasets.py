"""Opens the data set that a configuration names."""

import dataclasses

import ml_collections
import numpy as np

from crn_jax.input_pipeline import demo, fashioniq
from crn_jax.input_pipeline.dataset import EvalSplit, TrainSplit


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set as training and evaluation see it.

  Attributes:
    name: for results, e.g. "fashioniq/dress".
    train: training data; None if only evaluation was asked for.
    evals: one split a category.
    ceilings: R@10 in percent that the best image-only and text-only ranking could reach, where the
      data set knows it; else None.
  """

  name: str
  train: TrainSplit | None
  evals: tuple[EvalSplit, ...]
  ceilings: dict[str, float] | None = None


def open_dataset(config: ml_collections.ConfigDict, *, train: bool) -> Dataset:
  """Reads the annotations and finds the images; draws the demo data set if it is not there yet.

  Args:
    config: the `data` part of the configuration.
    train: whether the training data are needed.

  Raises:
    ValueError, FileNotFoundError: on an unknown data set or on bad data; the message names the file
      and says how to go on.
  """
  if config.dataset not in ("fashioniq", "demo"):
    raise ValueError(f"data.dataset must be 'fashioniq' or 'demo', not {config.dataset!r}")
  ceilings = None
  if config.dataset == "demo":
    facts = demo.generate(config.root)["ceilings"]
    used = fashioniq.CATEGORIES if config.category == "all" else (config.category,)
    ceilings = {
      k: float(np.mean([facts[category][k] for category in used]))
      for k in ("image_only", "text_only")
    }
  return Dataset(
    f"{config.dataset}/{config.category}",
    fashioniq.read_train(config.root, config.category, config.captions) if train else None,
    fashioniq.read_val(config.root, config.category, config.captions),
    ceilings,
  )
