"""--mode=prepare: checks a data folder before training does, and says what is in it."""

from collections.abc import Sequence

import ml_collections
import numpy as np

from crn_jax.input_pipeline import loader, prepared
from crn_jax.input_pipeline.checks import missing
from crn_jax.input_pipeline.dataset import Dataset
from crn_jax.input_pipeline.registry import DATASETS, open_dataset
from crn_jax.input_pipeline.tokenizers.words import Vocabulary, tokenize


def prepare(config: ml_collections.ConfigDict) -> str:
  """Reads all that training and evaluation read, decodes every image, and writes `data.prepared`.

  Args:
    config: the whole configuration.

  Returns:
    The report, for people to read.

  Raises:
    UserError: training would stop; one message lists everything that is wrong.
      Or the prepared images cannot be written, see `prepared.prepare`.
  """
  plain = config.data.copy_and_resolve_references()
  plain.prepared = ""
  dataset = open_dataset(plain, train=True)
  loader.steps_per_epoch(len(dataset.train.triplets), config.batch_size)
  vocabulary = Vocabulary.build(
    dataset.train.captions, markers=config.data.markers, max_words=config.data.max_words
  )
  text = report(dataset, vocabulary, config.seed)
  if not config.data.prepared:
    return text
  splits = (dataset.train, *dataset.evals)
  paths = dict.fromkeys(path for split in splits for path in split.image_paths)
  return f"{text}\n{prepared.prepare(DATASETS[config.data.dataset], config.data, tuple(paths))}"


def report(dataset: Dataset, vocabulary: Vocabulary, seed: int) -> str:
  """What a data set holds, and what is odd about it.

  Args:
    dataset: with its train split.
    vocabulary: of its captions.
    seed: of the run; where triplets are drawn anew each epoch, the first epoch's texts are counted.
  """
  train = dataset.train
  triplets = train.triplets.draw(seed, 0)
  lines = [
    f"{dataset.name}: training can start.",
    f"train: {len(triplets):,} triplets an epoch, {len(train.image_paths):,} images, "
    f"{len(vocabulary):,} words",
    *_describe_texts("train", triplets.texts, vocabulary),
  ]
  for split in dataset.evals:
    galleries = ", ".join(
      f"{len(rows):,} images in the gallery {name}" for name, rows in split.galleries.items()
    )
    lines.append(f"{split.name}: {len(split.queries):,} queries, {galleries}")
    lines += _describe_texts(split.name, split.queries.texts, vocabulary)
    for name, rows in split.galleries.items():
      absent = int((~np.isin(split.queries.target, rows)).sum())
      if absent:
        lines.append(
          f"{split.name}: {absent:,} of {len(split.queries):,} queries have their target outside "
          f"{name} and are misses"
        )
  lines += dataset.remarks
  lines += missing.describe_skipped(dataset.skipped).splitlines() or ["nothing was left out"]
  return "\n".join(lines)


def _describe_texts(name: str, texts: Sequence[Sequence[str]], vocabulary: Vocabulary) -> list[str]:
  lines = []
  if n_cut := vocabulary.truncated_count(texts):
    lines.append(
      f"{name}: {n_cut:,} of {len(texts):,} texts are longer than data.max_words = "
      f"{vocabulary.max_words} and are cut"
    )
  if n_empty := sum(not any(tokenize(caption) for caption in text) for text in texts):
    lines.append(f"{name}: {n_empty:,} of {len(texts):,} texts have no word")
  return lines
