"""What is odd but harmless about a data set, for people to read before they train on it."""

from collections.abc import Sequence

import numpy as np

from crn_jax.input_pipeline.dataset import Dataset
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.input_pipeline.tokenizers.words import Vocabulary, tokenize


def remarks(dataset: Dataset, vocabulary: Tokenizer, seed: int) -> tuple[str, ...]:
  """What `--mode=prepare` remarks and training can print, one remark a line.

  Args:
    dataset: with or without its train split.
    vocabulary: by which its texts are read.
    seed: of the run; where triplets are drawn anew each epoch, the first epoch's texts are looked
      at.
  """
  lines = []
  if dataset.train is not None:
    lines += _of_texts("train", dataset.train.triplets.draw(seed, 0).texts, vocabulary)
  for split in dataset.evals:
    lines += _of_texts(split.name, split.queries.texts, vocabulary)
    for name, rows in split.galleries.items():
      if absent := int((~np.isin(split.queries.target, rows)).sum()):
        lines.append(
          f"{split.name}: {absent:,} of {len(split.queries):,} queries have their target outside "
          f"{name} and are misses"
        )
  return (*lines, *dataset.remarks)


def _of_texts(name: str, texts: Sequence[Sequence[str]], vocabulary: Tokenizer) -> list[str]:
  lines = []
  if n_cut := vocabulary.truncated_count(texts):
    lines.append(
      f"{name}: {n_cut:,} of {len(texts):,} texts are longer than data.max_words = "
      f"{vocabulary.max_words} and are cut"
    )
  if not isinstance(vocabulary, Vocabulary):  # Others read every letter.
    return lines
  if n_empty := sum(not any(tokenize(caption) for caption in text) for text in texts):
    lines.append(
      f"{name}: {n_empty:,} of {len(texts):,} texts have no word (words are made of the letters a "
      f"to z and of digits)"
    )
  if n_foreign := sum(any(map(_has_other_letters, text)) for text in texts):
    lines.append(
      f"{name}: {n_foreign:,} of {len(texts):,} texts have letters other than a to z, which are "
      f"dropped"
    )
  return lines


def _has_other_letters(caption: str) -> bool:
  return not caption.isascii() and any(c.isalpha() and not c.isascii() for c in caption)
