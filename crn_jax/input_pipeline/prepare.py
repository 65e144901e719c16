"""--mode=prepare: checks a data folder before training does, and says what is in it."""

import functools
from collections.abc import Callable, Iterable

import ml_collections

from crn_jax.errors import UserError
from crn_jax.input_pipeline import loader, prepared
from crn_jax.input_pipeline.checks import missing
from crn_jax.input_pipeline.dataset import Dataset
from crn_jax.input_pipeline.registry import DATASETS, open_dataset
from crn_jax.input_pipeline.remarks import remarks
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.input_pipeline.tokenizers.words import Vocabulary


def prepare(
  config: ml_collections.ConfigDict,
  tokenizer: Callable[[Iterable[str]], Tokenizer] | None = None,
) -> str:
  """Reads all that training and evaluation read, decodes every image, and writes `data.prepared`.

  Args:
    config: the whole configuration.
    tokenizer: training captions -> the tokenizer that reads the texts; None collects their words.

  Returns:
    The report, for people to read.

  Raises:
    UserError: data are missing or damaged; one message lists everything that is wrong. Or the
      prepared images cannot be written, see `prepared.prepare`.
  """
  plain = config.data.copy_and_resolve_references()
  plain.prepared = ""
  dataset = open_dataset(plain, train=True)
  captions, data = dataset.train.captions, config.data
  words = tokenizer or functools.partial(
    Vocabulary.build, markers=data.markers, max_words=data.max_words
  )
  text = report(dataset, words(captions), config.seed, config.batch_size)
  if not config.data.prepared:
    return text
  splits = (dataset.train, *dataset.evals)
  paths = dict.fromkeys(path for split in splits for path in split.image_paths)
  spec = DATASETS[config.data.dataset]
  return f"{text}\n{prepared.prepare(spec, config.data, tuple(paths))}"


def report(dataset: Dataset, vocabulary: Tokenizer, seed: int, batch_size: int) -> str:
  """What a data set holds, and what is odd about it.

  Args:
    dataset: with its train split.
    vocabulary: of its captions.
    seed: of the run, see `remarks`.
    batch_size: of the run; with fewer triplets training cannot start.
  """
  train = dataset.train
  n = len(train.triplets)
  try:
    loader.steps_per_epoch(n, batch_size)
    verdict = "training can start."
  except UserError as error:
    verdict = f"training cannot start: {error}"
  lines = [
    f"{dataset.name}: {verdict}",
    f"train: {n:,} triplets an epoch, {len(train.image_paths):,} images, {len(vocabulary):,} words",
  ]
  for split in dataset.evals:
    galleries = ", ".join(
      f"{len(rows):,} images in the gallery {name}" for name, rows in split.galleries.items()
    )
    lines.append(f"{split.name}: {len(split.queries):,} queries, {galleries}")
  lines += remarks(dataset, vocabulary, seed)
  lines += missing.describe_skipped(dataset.skipped).splitlines() or ["nothing was left out"]
  return "\n".join(lines)
