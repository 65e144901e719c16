"""The tokenizer of pretrained towers: transformers' own, from files in a local folder.

Nothing is fetched, and no code from the folder is run.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from absl import logging

from crn_jax.errors import UserError
from crn_jax.workdir import files

# What published folders keep their tokenizers in. By config.json the class is found where
# tokenizer_config.json does not name it.
FILES = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
  "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "config.json",
)  # fmt: skip
# Each of these is a tokenizer.
_SUFFICIENT = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",),
               ("tokenizer.model",))  # fmt: skip
FOLDER = "tokenizer"  # Beside weights, and beside the file of `save`.


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
  """Texts to ids as the towers were trained with.

  The captions of a query are joined by "and". Rows are padded on the right to `max_words`, which
  the towers' description gives: the files of CLIP's tokenizer name no length, and SigLIP reads
  padding, so that it must be where it was in training, whatever side the files name.

  Attributes:
    folder: with some of `FILES`.
    max_words: length L of every row, marks of beginning and end included.
    lower_case: whether texts are lower-cased first. SigLIP 2's are, by its preprocessing and not by
      every published tokenizer.
  """

  folder: pathlib.Path
  max_words: int
  lower_case: bool

  def __post_init__(self):
    _ = self._tokenizer  # Now, for its errors.

  @functools.cached_property
  def _tokenizer(self):
    check_files(self.folder)
    try:
      found = transformers_library().AutoTokenizer.from_pretrained(
        self.folder, local_files_only=True, trust_remote_code=False
      )
      found.padding_side = found.truncation_side = "right"
      if found.pad_token is None:
        found.pad_token = found.eos_token
      found("a", padding="max_length", max_length=self.max_words, truncation=True)
    except Exception as error:  # Of transformers, tokenizers, sentencepiece.
      raise UserError(
        f"{self.folder}: no tokenizer that transformers can read ({type(error).__name__}: "
        f"{(str(error).splitlines() or [''])[0]}); convert the weights again from a complete folder"
      ) from error
    return found

  def __len__(self) -> int:
    return len(self._tokenizer)

  def text(self, texts: Sequence[str]) -> str:
    """The captions of one query as one sentence.

    Raises:
      ValueError: no caption at all, or a string in place of a sequence of captions.
    """
    if isinstance(texts, str) or not texts:
      raise ValueError(f"expected the captions of one query, e.g. ('is blue',), got {texts!r}")
    sentence = " and ".join(texts)
    return sentence.lower() if self.lower_case else sentence

  def read(self, texts: Sequence[str]) -> list[tuple[str, int]]:
    """See `base.Tokenizer`."""
    ids, mask = self.encode(texts)
    return [(self._written(i), i) for i in ids[mask].tolist()]

  def _written(self, i: int) -> str:
    """An id for people, never empty."""
    text = self._tokenizer.decode([i]).strip()
    if self.role(i) == "marker":
      text = text.strip("<|/>")
    return text or self._tokenizer.convert_ids_to_tokens(i).replace("▁", "_")

  def role(self, i: int) -> str:
    """See `base.Tokenizer`. CLIP's unknown pieces have the id of its end mark."""
    found = self._tokenizer
    if i == found.unk_token_id != found.eos_token_id:
      return "unknown"
    return "marker" if i in found.all_special_ids else ""

  def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """See `base.Tokenizer`; a longer text is cut before its end mark."""
    ids, mask = self._encode([texts])
    return ids[0], mask[0]

  def encode_all(self, queries: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """See `base.Tokenizer`."""
    if n_cut := self.truncated_count(queries):
      logging.warning(
        "%d of %d texts are longer than the %d tokens that these towers read and were cut.",
        n_cut, len(queries), self.max_words,
      )  # fmt: skip
    return self._encode(queries)

  def truncated_count(self, queries: Sequence[Sequence[str]]) -> int:
    """See `base.Tokenizer`."""
    if not queries:
      return 0
    whole = self._tokenizer([self.text(texts) for texts in queries], verbose=False)["input_ids"]
    return sum(len(ids) > self.max_words for ids in whole)

  def save(self, path: str | os.PathLike) -> None:
    """Copies the files into the folder `FOLDER` beside `path`, and writes settings and digests."""
    path = pathlib.Path(path)
    names = found_files(self.folder)
    if self.folder.absolute() != (path.parent / FOLDER).absolute():
      copy_files(self.folder, path.parent)
    content = {
      "max_words": self.max_words,
      "lower_case": self.lower_case,
      "files": {name: _sha256(self.folder / name) for name in names},
    }
    with files.replacing(path) as partial:
      partial.write_text(json.dumps(content, indent=1), encoding="utf-8")

  @classmethod
  def load(cls, path: str | os.PathLike) -> "PretrainedTokenizer":
    """Reads what `save` wrote.

    Raises:
      UserError: a file is missing, or not as it was saved.
    """
    path = pathlib.Path(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    folder = path.parent / FOLDER
    if set(content) != {"max_words", "lower_case", "files"}:
      raise UserError(f"{path}: expected max_words, lower_case and files, found {sorted(content)}")
    for name, digest in content["files"].items():
      file = folder / name
      if not file.is_file() or _sha256(file) != digest:
        raise UserError(
          f"{file}: {'changed' if file.exists() else 'removed'} since the run was begun, so that "
          f"texts would be read as others; restore the file"
        )
    return cls(folder, content["max_words"], content["lower_case"])

  def _encode(self, queries: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    if not queries:
      empty = np.zeros((0, self.max_words))
      return empty.astype(np.int32), empty.astype(bool)
    rows = self._tokenizer(
      [self.text(texts) for texts in queries],
      padding="max_length",
      max_length=self.max_words,
      truncation=True,
      return_attention_mask=True,
    )
    return np.asarray(rows["input_ids"], np.int32), np.asarray(rows["attention_mask"], bool)


def transformers_library():
  """transformers, which takes a second to import, and then is silent about what it misses."""
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
  import transformers

  return transformers


def found_files(folder: str | os.PathLike) -> list[str]:
  """Names of a tokenizer's files in a folder, in the order of `FILES`."""
  return [name for name in FILES if (pathlib.Path(folder) / name).is_file()]


def check_files(folder: str | os.PathLike) -> None:
  """Raises UserError unless a folder has the files of a tokenizer; names those that would do."""
  found = found_files(folder)
  if not any(set(names) <= set(found) for names in _SUFFICIENT):
    wanted = "; ".join(" and ".join(names) for names in _SUFFICIENT)
    raise UserError(f"{folder}: no tokenizer in this folder; it needs one of: {wanted}")


def copy_files(source: str | os.PathLike, target: str | os.PathLike) -> None:
  """Copies a tokenizer's files into the folder `FOLDER` of `target`, which must be there."""
  folder = pathlib.Path(target) / FOLDER
  folder.mkdir(exist_ok=True)
  for name in found_files(source):
    with files.replacing(folder / name) as partial:
      shutil.copyfile(pathlib.Path(source) / name, partial)


def _sha256(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()
