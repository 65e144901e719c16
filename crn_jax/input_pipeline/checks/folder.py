"""What the readers of Shoes and Fashion200k share: roots, text files, image files, counts."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from crn_jax.input_pipeline.checks import missing, verify
from crn_jax.input_pipeline.dataset import EvalSplit, TrainSplit

ON_MISSING = ("error", "skip")


@dataclasses.dataclass(frozen=True)
class Folder:
  """What a folder holds.

  Attributes:
    train: the train split, or None if it was not asked for.
    evals: the splits to evaluate on.
    skipped: counts of what was left out, as in `datasets.Dataset`.
    image_digest: of the image files, for `known_digest` of a later call.
    remarks: what is odd but harmless, in sentences.
  """

  train: TrainSplit | None
  evals: tuple[EvalSplit, ...]
  skipped: dict
  image_digest: str
  remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
  """What was asked of one split and what is left, for `count_skipped`.

  Attributes:
    problems: all that is wrong with it.
    lost: e.g. "triplets", "queries" or the name of a gallery -> (lost, of how many).
  """

  problems: Sequence[missing.Problem]
  lost: Mapping[str, tuple[int, int]]

  def counts(self) -> dict[str, int]:
    """As in `datasets.Dataset.skipped`."""
    counts = missing.count(self.problems)
    for name, (lost, of) in self.lost.items():
      counts |= {name: lost, f"of_{name}": of}
    return counts


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises ValueError if a value is none of the choices."""
  if value not in choices:
    raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_root(root: str | os.PathLike, expected: str) -> pathlib.Path:
  """The root with ~ expanded; FileNotFoundError, saying what is expected, if it is no folder."""
  # Shells leave the ~ of --config.data.root=~/x as it is.
  path = pathlib.Path(root).expanduser()
  if not path.is_dir():
    raise FileNotFoundError(f"{path}: no such folder; expected {expected}")
  return path


def read_lines(root: pathlib.Path, name: str) -> tuple[list[str], list[missing.Problem]]:
  """Lines of a text file, without their ends (of any system) and without a byte order mark.

  Returns:
    The lines, and a fatal problem if there are none.
  """
  try:
    with open(root / name, encoding="utf-8-sig") as f:
      lines = [line.rstrip("\n") for line in f]
  except FileNotFoundError:
    return [], [missing.Problem(missing.FATAL, name, "no such file")]
  except OSError as error:
    return [], [missing.Problem(missing.FATAL, name, f"cannot be opened ({error.strerror})")]
  except ValueError as error:
    return [], [missing.Problem(missing.FATAL, name, f"not UTF-8 ({error})")]
  if not any(line.strip() for line in lines):
    return [], [missing.Problem(missing.FATAL, name, "empty")]
  return lines, []


def leaves_root(path: str) -> bool:
  """Whether a path of an annotation file could name something outside the data folder."""
  parts = path.replace("\\", "/").split("/")
  return path.startswith(("/", "\\")) or ":" in parts[0] or ".." in parts


def image_problems(
  root: pathlib.Path, keys: Iterable[str], paths: Mapping[str, str], unreadable: Mapping[str, str]
) -> list[missing.Problem]:
  """A problem for each key without a path, or with one that cannot be read."""
  problems = []
  for key in keys:
    if key not in paths:
      problems.append(missing.Problem(missing.IMAGES_MISSING, key))
    elif paths[key] in unreadable:
      where = os.path.relpath(paths[key], root)
      problems.append(missing.Problem(missing.IMAGES_UNREADABLE, where, unreadable[paths[key]]))
  return problems


def find_unreadable(
  root: pathlib.Path, paths: Iterable[str], known_digest: str | None
) -> tuple[dict[str, str], str]:
  """`verify.find_unreadable`, for paths that may come several times."""
  return verify.find_unreadable(tuple(dict.fromkeys(paths)), root, known_digest)


def count_skipped(train: Part | None, name: str, val: Part) -> dict:
  """See `datasets.Dataset.skipped`; empty if there is no problem."""
  if not val.problems and not (train and train.problems):
    return {}
  return ({"train": train.counts()} if train else {}) | {"val": {name: val.counts()}}


def check_problems(
  root: pathlib.Path,
  problems: Sequence[missing.Problem],
  skipped: dict,
  on_missing: str,
  looked_for: str,
) -> None:
  """Raises ValueError, with everything in one message, unless all can and shall be skipped."""
  if problems and (on_missing == "error" or any(p.sort == missing.FATAL for p in problems)):
    raise ValueError(missing.error_message(str(root), problems, skipped, looked_for))
