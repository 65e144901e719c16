"""What a training on features has in the place of pictures: its features, and batches of rows."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from crn_jax import processes, stages, state
from crn_jax.errors import UserError
from crn_jax.input_pipeline import feature_batches, loader
from crn_jax.input_pipeline.dataset import Dataset, TrainSplit
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.methods.base import Method, Variables
from crn_jax.methods.features import FeatureMethod
from crn_jax.parallel import DataParallel
from crn_jax.retrieval import features
from crn_jax.retrieval.encode import Encoder
from crn_jax.retrieval.features import FeatureEncoder, Features, TrainFeatures
from crn_jax.workdir import run


def open_features(
  method: FeatureMethod,
  parallel: DataParallel,
  dataset: Dataset,
  tokenizer: Tokenizer,
  workdir: pathlib.Path,
  *,
  begins: bool,
) -> Features:
  """The features that a run learns on, or is evaluated on; computed where they are not kept.

  Args:
    method, parallel, dataset, tokenizer: see `features.compute`.
    workdir: of the run, which holds its fine-tuned towers, if there are any.
    begins: whether to note the towers' weights in the folder; others are refused from then on.

  Raises:
    UserError: the run was begun on other towers; or see `features.compute`.
  """
  towers, weights = frozen_towers(method, workdir)  # First: computing may take hours.
  if begins:
    processes.on_primary(lambda: run.save_towers(weights, workdir))
  return features.compute(method, towers, weights, parallel, dataset, tokenizer)


def frozen_towers(
  method: FeatureMethod, workdir: pathlib.Path
) -> tuple[dict[str, Any], dict[str, str]]:
  """The towers on whose features a run learns.

  Returns:
    Parameters of both, NumPy; the digests of the frozen ones.

  Raises:
    UserError: they are not there, or the run was begun on others.
  """
  folder = pathlib.Path(stages.towers(method.config, workdir))
  if not folder.exists():
    raise UserError(
      f"{folder.absolute()}: not found; the run in {workdir} works on features of the towers that "
      f"it holds, so put that folder back; a relative model.pretrained counts from the current "
      f"folder"
    )
  towers = state.towers(method, str(folder))
  weights = features.digests(method, towers)
  run.check_towers(weights, workdir)
  return towers, weights


def answering(method: Method, workdir: pathlib.Path, step: int) -> Variables:
  """Variables of a run's checkpoint that answer about pictures, whatever the run learns on.

  Raises:
    UserError: see `frozen_towers`.
  """
  variables = state.trained(method, workdir, step)
  if not isinstance(method, FeatureMethod):
    return variables
  return method.with_towers(variables, frozen_towers(method, workdir)[0])


def encoder_of_run(
  method: Method,
  parallel: DataParallel,
  dataset: Dataset,
  tokenizer: Tokenizer,
  workdir: pathlib.Path,
) -> Encoder | FeatureEncoder:
  """How a trained run is asked, on pictures or on features; arguments as of `open_features`."""
  if not isinstance(method, FeatureMethod):
    return Encoder.create(method, parallel)
  found = open_features(method, parallel, dataset, tokenizer, workdir, begins=False)
  return FeatureEncoder.create(method, parallel, found)


def batches(
  method: FeatureMethod,
  parallel: DataParallel,
  split: TrainSplit,
  tokenizer: Tokenizer,
  found: TrainFeatures,
  start: int,
  stop: int,
) -> Iterator:
  """Device batches of steps start .. stop - 1; the features are placed once."""
  config = method.config
  steps = feature_batches.Steps(
    config.batch_size, start, stop, config.seed, jax.process_index(), jax.process_count()
  )
  if method.scans_epoch:
    rows = feature_batches.by_epoch(split, found.text_rows, steps)
  else:
    rows = feature_batches.one_by_one(split, tokenizer, steps)
  tables = features.place(found, parallel)
  return loader.under_way(rows, lambda batch: tables | parallel.shard(batch))
