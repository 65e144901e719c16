"""Pages for people: one HTML file that holds its pictures and opens without a network."""

import base64
import dataclasses
import importlib.metadata
import io
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

import flax
import jax
import jinja2
from PIL import Image

from crn_jax import evaluate, files

# Photographs in a grid stand this well; lines and text stay sharp.
_QUALITY = 82


@dataclasses.dataclass(frozen=True)
class Cell:
  """A cell of a table.

  Attributes:
    text: what it says.
    detail: said smaller behind it, e.g. an interval.
  """

  text: str
  detail: str = ""

  def __str__(self) -> str:
    return f"{self.text} ({self.detail})" if self.detail else self.text


@dataclasses.dataclass(frozen=True)
class Table:
  """A table.

  Attributes:
    title: its heading.
    header: names of the columns.
    rows: name of the row and its cells, one fewer than `header`.
    note: what one must know to read it.
  """

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, tuple[Cell, ...]], ...]
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture on a page.

  Attributes:
    title: its heading.
    path: its file.
    note: what it shows, where the picture does not say it; also its text for screen readers.
  """

  title: str
  path: pathlib.Path
  note: str = ""

  @property
  def source(self) -> str:
    """The picture itself, as a data URL."""
    return embedded(self.path)

  @property
  def size(self) -> tuple[int, int]:
    """Width and height in pixels."""
    with Image.open(self.path) as image:
      return image.size


def write(template: str, path: str | os.PathLike, **values) -> None:
  """Writes a page; the file appears complete or not at all.

  Args:
    template: name of a file in `crn_jax/templates`.
    path: the HTML file.
    **values: what the template shows. Texts are escaped.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("crn_jax", "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  text = environment.get_template(template).render(versions=versions(), command=command(), **values)
  with files.replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def embedded(path: str | os.PathLike) -> str:
  """A picture as a data URL, in WebP where that is smaller than the file."""
  path = pathlib.Path(path)
  data, kind = path.read_bytes(), "png"
  buffer = io.BytesIO()
  with Image.open(path) as image:
    image.convert("RGB").save(buffer, format="WEBP", quality=_QUALITY, method=4)
  if buffer.tell() < len(data):
    data, kind = buffer.getvalue(), "webp"
  return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def versions() -> dict[str, str]:
  """Versions of what computed the numbers."""
  try:
    own = importlib.metadata.version("crn-jax")
  except importlib.metadata.PackageNotFoundError:  # Run from a folder without an installation.
    own = "not installed"
  python = ".".join(map(str, sys.version_info[:3]))
  return {"crn-jax": own, "jax": jax.__version__, "flax": flax.__version__, "Python": python}


def command() -> str:
  """The command line of this process."""
  return shlex.join([pathlib.Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])


def flat(tree: dict, prefix: str = "") -> dict:
  """A nested configuration as {"data.root": value}."""
  fields = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      fields |= flat(value, f"{prefix}{name}.")
    else:
      fields[prefix + name] = value
  return fields


def recall_cells(recalls: dict, metrics: Sequence[str]) -> tuple[Cell, ...]:
  """Recalls in percent with their intervals; '-' where one was not measured."""
  cells = []
  for metric in metrics:
    if metric not in recalls:
      cells.append(Cell("-"))
      continue
    low, high = recalls["intervals"][metric]
    cells.append(Cell(f"{recalls[metric]:.2f}", f"{low:.1f}-{high:.1f}"))
  return tuple(cells)


def result_tables(results: dict) -> list[Table]:
  """The results of an evaluation, as in eval.json, as tables."""
  metrics = evaluate.metric_names(next(iter(results["protocols"].values())))
  breakdown = results["breakdown_protocol"]

  def table(title, first, rows, note=""):
    rows = tuple((name, recall_cells(recalls, metrics)) for name, recalls in rows)
    return Table(title, (first, *metrics), rows, note)

  categories = results.get("categories", {})
  rows = []
  for protocol, recalls in results["protocols"].items():
    name = f"{protocol}, gallery {recalls['gallery']}"
    rows.append((f"{name} (mean of {len(categories)})" if categories else name, recalls))
  tables = [
    table(
      f"Evaluated: {evaluate.describe_selection(results)}",
      "protocol",
      rows,
      "val_split ranks the union of the queries' images, original_split the whole list of the "
      "category; recalls of the two are not comparable.",
    )
  ]
  for other in results.get("beside", []):
    rows = [(f"{p}, gallery {r['gallery']}", r) for p, r in other["protocols"].items()]
    title = f"Beside it: {evaluate.describe_selection(other)}"
    tables.append(table(title, "protocol", rows))
  if categories:
    rows = [
      (f"{name}: {protocol}, gallery {recalls['gallery']}", recalls)
      for name, section in categories.items()
      for protocol, recalls in section["protocols"].items()
    ]
    tables.append(table("By category", "category", rows))
  rows = [(kind.replace("_", " "), recalls) for kind, recalls in results["by_query"].items()]
  tables.append(
    table(
      f"By query, {breakdown}",
      "query",
      rows,
      "image only: the reference's own vector; text only: the text composed with a zero image.",
    )
  )
  if "by_text_kind" in results:
    rows = [
      (f"{kind}, {recalls['n_queries']} queries", recalls)
      for kind, recalls in results["by_text_kind"].items()
    ]
    tables.append(table(f"By kind of text, {breakdown}", "text", rows))
  return tables


def describe(results: dict) -> str:
  """What the recalls of an evaluation mean, in one sentence."""
  return (
    f"{results['dataset']}: {results['n_queries']} queries; captions {results['captions']}; "
    f"reference image {'excluded from' if results['exclude_reference'] else 'kept in'} its ranking."
  )
