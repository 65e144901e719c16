"""What a run needs of its tokenizer, and reading the one that it was begun with."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from crn_jax.input_pipeline.tokenizers.pretrained import PretrainedTokenizer
from crn_jax.input_pipeline.tokenizers.words import Vocabulary


class Tokenizer(Protocol):
  """Captions of queries -> ids: a word table (`words.Vocabulary`) or `PretrainedTokenizer`.

  Attributes:
    max_words: length L of every row of ids.
  """

  max_words: int

  def __len__(self) -> int:
    """Number of ids."""

  def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of the captions of one query: ids [L] int32; mask [L] bool, False at padding."""

  def encode_all(self, queries: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Of n queries: ids [n, L] int32, mask [n, L] bool; a warning says how many were cut."""

  def truncated_count(self, queries: Sequence[Sequence[str]]) -> int:
    """Number of queries that are longer than L, and are cut."""

  def read(self, texts: Sequence[str]) -> list[tuple[str, int]]:
    """The pieces of one query as a model gets them, cut: as written, and their ids."""

  def role(self, i: int) -> str:
    """What an id stands for: "unknown", "marker" (of beginning, end and the like) or ""."""

  def save(self, path: str | os.PathLike) -> None:
    """Writes what `load` reads: a JSON file, and what else it needs beside it."""


def load(path: str | os.PathLike) -> Tokenizer:
  """Reads what a tokenizer's `save` wrote.

  Raises:
    UserError: no such file, or it, or what it needs, is not as it was saved.
  """
  try:
    content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    content = None  # `Vocabulary` says what is wrong.
  if isinstance(content, dict) and "files" in content:
    return PretrainedTokenizer.load(path)
  return Vocabulary.load(path)
