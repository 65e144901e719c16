"""Lists of pictures with metadata: CSV with a head line, or JSON lines."""

import csv
import io
import json
import math
import pathlib
import re
from collections.abc import Iterator

from crn_jax.catalogue import pictures
from crn_jax.catalogue.pictures import Source
from crn_jax.errors import UserError

SUFFIXES = (".csv", ".jsonl")

# Fields of the store, and words of its filters: no names of metadata.
RESERVED = frozenset({"key", "id", "path", "vector", "digest", "bytes", "width", "height"})
_WORDS = frozenset({"and", "or", "not", "in", "like", "is", "null", "exists", "true", "false",
                    "iso", "interval"})  # fmt: skip
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d{1,2})?")

# Bytes of a picture's metadata as JSON; Milvus takes 65,536.
_MAX_METADATA = 60_000
_SHOWN = 10


def read(path: pathlib.Path) -> list[Source]:
  """The pictures that a manifest lists, in its order.

  Each has a `path` (from the manifest's folder), may have an `id` (else it is the path as written),
  and everything else is metadata: of CSV, a column of which every cell is a number becomes numbers,
  and empty cells are left out; of JSON lines, texts, numbers, true and false, and null is left out.

  Raises:
    UserError: lists what is wrong with which lines.
  """
  rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
  found, problems, lines = [], [], {}
  for line, row in rows:
    try:
      source = _source(row, path.parent)
      if source.id in lines:
        raise UserError(f"the id {source.id!r} stands in line {lines[source.id]}, too")
      lines[source.id] = line
      found.append(source)
    except UserError as error:
      problems.append(f"line {line}: {error}")
  if problems:
    more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    raise UserError(
      f"{path}: {len(problems):,} of its lines cannot be used:\n  "
      + "\n  ".join(problems[:_SHOWN])
      + more
    )
  return found


def _source(row, folder: pathlib.Path) -> Source:
  if isinstance(row, UserError):
    raise row
  path = row.get("path")
  if not isinstance(path, str) or not path:
    raise UserError(f"expected the path of a picture as path, found {path!r}")
  identifier = row.get("id", path)
  if isinstance(identifier, int) and not isinstance(identifier, bool):
    identifier = str(identifier)
  if not isinstance(identifier, str):
    raise UserError(f"expected a text or a whole number as id, found {identifier!r}")
  metadata = {k: v for k, v in row.items() if k not in ("path", "id") and v is not None}
  for name, value in metadata.items():
    _check(name, value)
  if len(json.dumps(metadata).encode()) > _MAX_METADATA:
    raise UserError(f"its metadata have more than {_MAX_METADATA:,} bytes")
  source = Source(identifier, str((folder / path).absolute()), metadata)
  pictures.check_length(source)
  return source


def check_name(name: str) -> None:
  """Raises UserError for a name of metadata that a filter could not use."""
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise UserError(f"{name!r} is no name for a filter: expected letters, digits and _; rename it")
  if name in RESERVED or name.lower() in _WORDS:
    raise UserError(f"{name!r} has a meaning of its own in filters; rename it")


def _check(name: str, value) -> None:
  check_name(name)
  if isinstance(value, str):
    try:
      value.encode()
    except UnicodeEncodeError:
      raise UserError(f"{name}: no valid text") from None
  elif isinstance(value, float):
    if not math.isfinite(value):
      raise UserError(f"{name}: expected a finite number, found {value}")
  elif isinstance(value, int):
    if not -(2**63) <= value < 2**63:
      raise UserError(f"{name}: the number {value} does not fit 64 bits")
  else:
    raise UserError(f"{name}: expected a text, a number, true or false, found {value!r}")


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_bytes().decode("utf-8-sig")  # Spreadsheets begin files with a mark.
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: no UTF-8 (byte {error.start:,}); save it as UTF-8") from error


def _json_rows(path: pathlib.Path) -> Iterator[tuple[int, dict | UserError]]:
  for line, text in enumerate(_text(path).split("\n"), 1):
    if not text.strip():
      continue
    try:
      row = json.loads(text)
      if not isinstance(row, dict):
        raise UserError(f"expected an object, found {text.strip()[:40]}")
      yield line, row
    except UserError as error:
      yield line, error
    except (ValueError, RecursionError) as error:
      yield line, UserError(f"no JSON ({error})")


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[int, dict | UserError]]:
  reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
  try:
    head = next(reader, [])
    if "path" not in head or len(set(head)) < len(head):
      raise UserError(
        f"{path}: expected a first line with different names of columns, path among them, found "
        f"{', '.join(head) or 'nothing'}"
      )
    rows = [(reader.line_num, cells) for cells in reader if cells]
  except csv.Error as error:
    raise UserError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
  columns = {name: [cells[i] for _, cells in rows if i < len(cells)] for i, name in enumerate(head)}
  read = {name: _column_type(name, cells) for name, cells in columns.items()}
  for line, cells in rows:
    if len(cells) != len(head):
      yield line, UserError(f"expected {len(head)} cells, found {len(cells)}")
    else:
      yield line, {n: read[n](c) for n, c in zip(head, cells, strict=True) if c}


def _column_type(name: str, cells: list[str]) -> type:
  """int or float if every cell that is not empty is such a number; 007 is a text."""
  given = [cell for cell in cells if cell]
  if name in ("path", "id") or not given:
    return str
  if all(_INTEGER.fullmatch(cell) for cell in given):
    return int
  return float if all(_NUMBER.fullmatch(cell) for cell in given) else str
