"""Files of a data folder as all readers find and read them."""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

from crn_jax.input_pipeline.checks.missing import FATAL, Problem

# Endings of image files, in upper or lower case; an earlier one wins over a later one.
EXTENSIONS = (".jpg", ".jpeg", ".png")


def read_text(root: pathlib.Path, name: str) -> tuple[str, list[Problem]]:
  """A text file without its byte order mark; line ends of any system become "\\n".

  Returns:
    The text, and a fatal problem (beside an empty text) if it cannot be read.
  """
  try:
    return (root / name).read_text(encoding="utf-8-sig"), []
  except FileNotFoundError:
    return "", [Problem(FATAL, name, "no such file")]
  except OSError as error:
    return "", [Problem(FATAL, name, f"cannot be opened ({error.strerror})")]
  except ValueError as error:
    return "", [Problem(FATAL, name, f"not UTF-8 ({error})")]


def read_lines(root: pathlib.Path, name: str) -> tuple[list[str], list[Problem]]:
  """Lines of a text file, without their ends.

  Returns:
    The lines, and a fatal problem if there are none.
  """
  text, problems = read_text(root, name)
  if not problems and not text.strip():
    problems = [Problem(FATAL, name, "empty")]
  # Not `splitlines`, which also splits at characters that captions may hold.
  return ([] if problems else text.removesuffix("\n").split("\n")), problems


def parse_json(text: str) -> object:
  """The value of a JSON text; ValueError if it is none, or nested deeper than can be parsed."""
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError("nested too deeply") from error


def read_json_list(root: pathlib.Path, name: str, what: str) -> tuple[list, list[Problem]]:
  """The list in a JSON file.

  Args:
    root: the data folder.
    name: of the file below it.
    what: its items in the plural, for messages.

  Returns:
    The list, and a fatal problem if there is none, or an empty one.
  """
  return _read_json(root, name, list, f"a list of {what}")


def read_json_object(root: pathlib.Path, name: str, what: str) -> tuple[dict, list[Problem]]:
  """The object in a JSON file.

  Args:
    root: the data folder.
    name: of the file below it.
    what: what it holds, for messages, to go on after "an object with ".

  Returns:
    The object, and a fatal problem if there is none, or an empty one.
  """
  return _read_json(root, name, dict, f"an object with {what}")


def _read_json(root, name, kind, expected):
  text, problems = read_text(root, name)
  if problems:
    return kind(), problems
  try:
    value = parse_json(text)
  except ValueError as error:
    return kind(), [Problem(FATAL, name, f"not valid JSON ({error})")]
  if not isinstance(value, kind) or not value:
    empty = {list: "an empty list", dict: "an empty object"}[kind]
    found = empty if value == kind() else f"a JSON value of type {type(value).__name__}"
    return kind(), [Problem(FATAL, name, f"expected {expected}, found {found}")]
  return value, []


def leaves_root(path: str) -> bool:
  """Whether a path of an annotation file could name something outside the data folder."""
  parts = path.replace("\\", "/").split("/")
  return path.startswith(("/", "\\")) or ":" in parts[0] or ".." in parts


def stem(name: str) -> str:
  """A name without the ending of an image file."""
  root, extension = os.path.splitext(name)
  return root if extension.lower() in EXTENSIONS else name


def list_images(folder: str | os.PathLike) -> dict[str, str] | None:
  """Stem -> path of the image files in a folder, sorted, or None if there is no such folder."""
  if not os.path.isdir(folder):
    return None
  found: dict[str, tuple[int, str]] = {}
  with os.scandir(folder) as entries:
    for entry in entries:
      key = stem(entry.name)
      if key == entry.name or not _is_file(entry):
        continue
      # Listings come in any order.
      candidate = (EXTENSIONS.index(entry.name[len(key) :].lower()), entry.path)
      if key not in found or candidate < found[key]:
        found[key] = candidate
  return {key: found[key][1] for key in sorted(found)}


def find_images(folders: Sequence[pathlib.Path], paths: Iterable[str]) -> dict[str, str]:
  """Files of many images, each folder that they lie in listed once.

  Args:
    folders: to which the paths are relative; an earlier one wins over a later one.
    paths: that do not leave them; files may differ in the ending.

  Returns:
    path -> that of the file, of those found.
  """
  listings: dict[str, dict[str, str]] = {}
  found = {}
  for path in paths:
    inner, name = os.path.split(os.path.normpath(path))
    for folder in folders:
      place = os.path.join(folder, inner)
      if place not in listings:
        listings[place] = list_images(place) or {}
      if (key := stem(name)) in listings[place]:
        found[path] = listings[place][key]
        break
  return found


def _is_file(entry: os.DirEntry) -> bool:
  try:
    return entry.is_file()  # False for a link that leads nowhere.
  except OSError:  # A link that leads to itself.
    return False


def find_image(path: str) -> str | None:
  """The path itself if it is a file, else a file that differs from it in the ending only."""
  if os.path.isfile(path):
    return path
  folder, name = os.path.split(path)
  return (list_images(folder) or {}).get(stem(name))
