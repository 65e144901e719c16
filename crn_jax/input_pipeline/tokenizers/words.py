"""Word table: texts to word ids, padded to a fixed length.

Tokeniser and order of the words are those of the PyTorch release of CRN, so that weights trained
there find their rows. Ids 0 to 3 are reserved for <UNK>, <AND>, <BOS>, <EOS>; words follow in
order of first appearance in the training captions. Unknown words and padding share id 0; the mask
tells them apart.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import string
from collections.abc import Iterable, Sequence

import numpy as np
from absl import logging

from crn_jax.errors import UserError
from crn_jax.workdir import files

UNK, AND, BOS, EOS = range(4)
RESERVED = ("<UNK>", "<AND>", "<BOS>", "<EOS>")
MARKERS = ("tokens", "words")

# With fewer there is no room for a word between <BOS> and <EOS>.
_MIN_WORDS = 3
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokenize(text: str) -> list[str]:
  """Words of a text: ASCII only, lower case, punctuation deleted, split on white space.

  Punctuation is deleted, not replaced by a space: "v-neck" -> "vneck", "3/4" -> "34".
  """
  ascii_text = text.encode("ascii", "ignore").decode("ascii")
  return ascii_text.lower().translate(_DELETE_PUNCTUATION).split()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A word table and the way in which the captions of one query become one row of ids.

  Attributes:
    words: the word of every id; the first four are `RESERVED`.
    markers: "tokens": <BOS> c0 <AND> c1 <EOS> with the markers' own ids. "words": what the
      release does; its tokeniser strips the brackets, so that "bos" and "eos" are unknown words
      and "and" the ordinary word; a single caption stands without markers.
    max_words: length L of every row.
  """

  words: tuple[str, ...]
  markers: str
  max_words: int

  def __post_init__(self):
    if self.markers not in MARKERS:
      raise UserError(f"markers: expected one of {MARKERS}, got {self.markers!r}")
    if not isinstance(self.max_words, int) or self.max_words < _MIN_WORDS:
      raise UserError(
        f"max_words: expected an integer of {_MIN_WORDS} or more, got {self.max_words!r}"
      )
    if self.words[: len(RESERVED)] != RESERVED:
      raise ValueError(
        f"words: expected to begin with {RESERVED}, got {self.words[: len(RESERVED)]}"
      )
    if len(self._id_of) != len(self.words):
      raise ValueError(f"words: {len(self.words) - len(self._id_of)} words are listed twice")

  @classmethod
  def build(cls, captions: Iterable[str], *, markers: str, max_words: int) -> "Vocabulary":
    """Collects the words of the training captions in order of first appearance."""
    words = dict.fromkeys(RESERVED)
    for caption in captions:
      words.update(dict.fromkeys(tokenize(caption)))
    return cls(words=tuple(words), markers=markers, max_words=max_words)

  def __len__(self) -> int:
    return len(self.words)

  @functools.cached_property
  def _id_of(self) -> dict[str, int]:
    return {word: i for i, word in enumerate(self.words)}

  def ids(self, texts: Sequence[str]) -> list[int]:
    """Word ids of one query, neither cut nor padded; at least one.

    Args:
      texts: the captions of the query, usually one or two.

    Raises:
      ValueError: no caption at all, or a string in place of a sequence of captions.
    """
    return [i for _, i in self._words(texts)]

  def read(self, texts: Sequence[str]) -> list[tuple[str, int]]:
    """The words of one query as a model gets them, cut to `max_words`: as written, and their ids.

    Markers with ids of their own are written as in `RESERVED`. Arguments and errors: see `ids`.
    """
    words = self._words(texts)
    if len(words) <= self.max_words:
      return words
    if self.markers == "tokens":
      return [*words[: self.max_words - 1], words[-1]]
    return words[: self.max_words]

  def role(self, i: int) -> str:
    """See `base.Tokenizer`."""
    if i == UNK:
      return "unknown"
    return "marker" if i < len(RESERVED) else ""

  def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of one query.

    Args:
      texts: the captions of the query. A longer text is cut to `max_words`; with markers
        "tokens", <EOS> stays last.

    Returns:
      ids: [L] int32, padded with 0.
      mask: [L] bool, False at padding, True at position 0.

    Raises:
      ValueError: no caption at all.
    """
    ids = [i for _, i in self.read(texts)]
    row = np.zeros(self.max_words, np.int32)
    row[: len(ids)] = ids
    return row, np.arange(self.max_words) < len(ids)

  def encode_all(self, queries: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks of many queries; one warning says how many were cut.

    Args:
      queries: the captions of each of n queries.

    Returns:
      ids: [n, L] int32, padded with 0.
      mask: [n, L] bool, False at padding.
    """
    ids = np.zeros((len(queries), self.max_words), np.int32)
    mask = np.zeros((len(queries), self.max_words), bool)
    for i, texts in enumerate(queries):
      ids[i], mask[i] = self.encode(texts)
    n_cut = self.truncated_count(queries)
    if n_cut:
      logging.warning(
        "%d of %d texts are longer than %d words and were cut; a larger max_words "
        "keeps them whole.",
        n_cut,
        len(queries),
        self.max_words,
      )
    return ids, mask

  def truncated_count(self, queries: Sequence[Sequence[str]]) -> int:
    """Number of queries with more than `max_words` ids, markers included."""
    return sum(len(self.ids(texts)) > self.max_words for texts in queries)

  def save(self, path: str | os.PathLike) -> None:
    """Writes the vocabulary as JSON; the file appears complete or not at all."""
    content = {"markers": self.markers, "max_words": self.max_words, "words": list(self.words)}
    content["checksum"] = _checksum(content)
    with files.replacing(path) as partial:
      partial.write_text(json.dumps(content, indent=1), encoding="utf-8")

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Vocabulary":
    """Reads what `save` wrote, or wrote before it noted a checksum.

    Raises:
      UserError: no such file, it is not a saved vocabulary, or not as it was saved.
    """
    try:
      content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
      raise UserError(
        f"{path}: no such file; training writes the vocabulary into its workdir"
      ) from error
    except (ValueError, RecursionError) as error:  # Malformed JSON or UTF-8.
      raise UserError(f"{path}: not valid JSON ({error})") from error
    keys = {"markers", "max_words", "words"}
    if not isinstance(content, dict) or set(content) - {"checksum"} != keys:
      found = sorted(content) if isinstance(content, dict) else type(content).__name__
      raise UserError(f"{path}: expected an object with keys {sorted(keys)}, found {found}")
    checksum = content.pop("checksum", None)
    words = content["words"]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
      raise UserError(f"{path}: expected a list of strings as words")
    if checksum is not None and checksum != _checksum(content):
      # With the words in another order every text would be read as another one.
      raise UserError(
        f"{path}: its content is not what its checksum says, so it was changed after it was "
        f"written; restore the file"
      )
    try:
      return cls(tuple(words), content["markers"], content["max_words"])
    except ValueError as error:
      raise UserError(f"{path}: {error}") from error

  def _words(self, texts: Sequence[str]) -> list[tuple[str, int]]:
    """Words and ids of one query, not cut."""
    if isinstance(texts, str) or not texts:
      raise ValueError(f"expected the captions of one query, e.g. ('is blue',), got {texts!r}")
    if self.markers == "tokens":
      words = [RESERVED[BOS]]
      for i, text in enumerate(texts):
        words += [RESERVED[AND]] * (i > 0) + tokenize(text)
      words.append(RESERVED[EOS])
    else:
      text = texts[0] if len(texts) == 1 else f"<BOS> {' <AND> '.join(texts)} <EOS>"
      # The release fails on a text without words; one unknown word keeps the mask non-empty.
      words = tokenize(text) or [RESERVED[UNK]]
    return [(word, self._id_of.get(word, UNK)) for word in words]


def _checksum(content: dict) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
