"""What readers share: choices, roots, problems of images, counts of what is left out."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

from crn_jax.errors import UserError
from crn_jax.input_pipeline import images
from crn_jax.input_pipeline.checks import missing, verify

ON_MISSING = ("error", "skip")


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
    """As in `dataset.Dataset.skipped`."""
    counts = missing.count(self.problems)
    for name, (lost, of) in self.lost.items():
      counts |= {name: lost, f"of_{name}": of}
    return counts


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises UserError if a value is none of the choices."""
  if value not in choices:
    raise UserError(f"{name}: expected one of {choices}, got {value!r}")


def expand(path: str | os.PathLike) -> pathlib.Path:
  """The path with ~ expanded: shells leave the one of --config.data.root=~/x as it is."""
  return pathlib.Path(os.path.expanduser(path))


def check_root(root: str | os.PathLike, expected: str) -> pathlib.Path:
  """The root with ~ expanded; UserError, saying what is expected, if it is no folder."""
  path = expand(root)
  if not path.is_dir():
    raise UserError(f"data.root: {path}: no such folder; expected {expected}")
  return path


def image_problems(
  root: pathlib.Path, keys: Iterable[str], paths: Mapping[str, str], unreadable: Mapping[str, str]
) -> list[missing.Problem]:
  """A problem for each key without a path, or with one that cannot be read."""
  problems = []
  for key in keys:
    if key not in paths:
      problems.append(missing.Problem(missing.IMAGES_MISSING, key))
    elif paths[key] in unreadable:
      problems.append(unreadable_problem(root, paths[key], unreadable[paths[key]]))
  return problems


def unreadable_problem(root: pathlib.Path, path: str, reason: str) -> missing.Problem:
  """The problem of an image file that cannot be read, given its reason, see `verify.Verified`."""
  where = os.path.relpath(path, root)
  return missing.Problem(missing.IMAGES_UNREADABLE, where, reason, images.mend(reason))


def verify_images(
  root: pathlib.Path, paths: Iterable[str], known_digest: str | None
) -> verify.Verified:
  """`verify.verify`, for paths that may come several times."""
  return verify.verify(tuple(dict.fromkeys(paths)), root, known_digest)


def count_skipped(train: Part | None, name: str, val: Part) -> dict:
  """See `dataset.Dataset.skipped`; empty if there is no problem."""
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
  """Raises UserError, with everything in one message, unless all can and shall be skipped."""
  if problems and (on_missing == "error" or any(p.sort == missing.FATAL for p in problems)):
    raise UserError(missing.error_message(str(root), problems, skipped, looked_for))
