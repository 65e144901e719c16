"""Batches of a training on features: which rows of the tables of features, and ids of texts.

Order and texts are those of `loader`: functions of seed, epoch and position.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from crn_jax.input_pipeline import loader
from crn_jax.input_pipeline.dataset import TrainSplit, Triplets
from crn_jax.input_pipeline.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Steps:
  """Which steps are wanted, and how much of their batches.

  Attributes:
    batch_size: of the global batch, over all processes.
    start, stop: steps start .. stop - 1 of the run.
    seed: of order and drawing.
    process_index, process_count: of this process, which gets a contiguous slice of each batch.
  """

  batch_size: int
  start: int
  stop: int
  seed: int
  process_index: int = 0
  process_count: int = 1

  def items(self, n: int) -> Iterator[tuple[int, np.ndarray]]:
    """Of every step: its epoch, and [local batch] the triplets seen.

    Args:
      n: number of triplets.
    """
    per_epoch = loader.steps_per_epoch(n, self.batch_size)
    local = loader.local_slice(self.batch_size, self.process_index, self.process_count)
    order = functools.lru_cache(maxsize=1)(lambda epoch: loader.epoch_order(n, self.seed, epoch))
    for step in range(self.start, self.stop):
      epoch, within = divmod(step, per_epoch)
      first = within * self.batch_size
      yield epoch, order(epoch)[first + local.start : first + local.stop]


def one_by_one(
  split: TrainSplit, tokenizer: Tokenizer, steps: Steps
) -> Iterator[dict[str, np.ndarray]]:
  """A batch a step: reference, target: [b] int32 rows of the images; tokens: [b, words] int32."""

  @functools.lru_cache(maxsize=1)
  def encoded(triplets: Triplets):
    return tokenizer.encode_all(triplets.texts)[0]

  draw = functools.lru_cache(maxsize=1)(lambda epoch: split.triplets.draw(steps.seed, epoch))
  for epoch, items in steps.items(len(split.triplets)):
    triplets = draw(epoch)
    rows = {"reference": triplets.reference[items], "target": triplets.target[items]}
    yield rows | {"tokens": encoded(triplets)[items]}


def by_epoch(
  split: TrainSplit, text_rows: Mapping[tuple[str, ...], int], steps: Steps
) -> Iterator[dict[str, np.ndarray]]:
  """The steps of an epoch in one batch: rows: [b, steps, 3] int32.

  They are rows of reference and target in the images, and of the text in the texts.

  Args:
    split: the training data.
    text_rows: text -> its row.
    steps: whole epochs.

  Raises:
    ValueError: `steps` does not begin with an epoch.
  """
  n = len(split.triplets)
  per_epoch = loader.steps_per_epoch(n, steps.batch_size)
  if steps.start % per_epoch:
    raise ValueError(f"expected the start of an epoch of {per_epoch} steps, got {steps.start}")
  for first in range(steps.start, steps.stop, per_epoch):
    triplets = split.triplets.draw(steps.seed, first // per_epoch)
    texts = np.fromiter((text_rows[text] for text in triplets.texts), np.int32, n)
    table = np.stack([triplets.reference, triplets.target, texts], axis=1)
    epoch = dataclasses.replace(steps, start=first, stop=first + per_epoch)
    yield {"rows": np.stack([table[items] for _, items in epoch.items(n)], axis=1)}
