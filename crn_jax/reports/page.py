"""Pages for people: one HTML file that holds its pictures and opens without a network."""

import base64
import dataclasses
import importlib.metadata
import io
import os
import pathlib
import shlex
import sys

import jinja2
from PIL import Image

from crn_jax.reports import texts
from crn_jax.reports.pictures import palette
from crn_jax.workdir import files

# Photographs in a grid stand this well; lines and text stay sharp.
_QUALITY = 82


@dataclasses.dataclass(frozen=True)
class Figure:
  """A picture on a page.

  Attributes:
    title: its heading.
    path: its file.
    note: what it shows, where the picture does not say it; also its text for screen readers.
    rows: what its rows say, as text to be searched, copied and read aloud.
  """

  title: str
  path: pathlib.Path
  note: str = ""
  rows: tuple[str, ...] = ()

  @property
  def source(self) -> str:
    """The picture itself, as a data URL."""
    return embedded(self.path)

  @property
  def size(self) -> tuple[int, int]:
    """Width and height in pixels."""
    with Image.open(self.path) as image:
      return image.size


def environment(package: str) -> jinja2.Environment:
  """Templates in the folder `templates` of a package; what they show is escaped."""
  return jinja2.Environment(
    loader=jinja2.PackageLoader(package, "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )


def write(template: str, path: str | os.PathLike, **values) -> None:
  """Writes a page; the file appears complete or not at all.

  Args:
    template: name of a file in `crn_jax/reports/templates`.
    path: the HTML file.
    **values: what the template shows. Texts are escaped; "?" stands for what UTF-8 cannot hold.
      The template also gets `folder`, the name of the folder of `path`, and the palette.
  """
  path = pathlib.Path(path)
  text = (
    environment("crn_jax.reports")
    .get_template(template)
    .render(
      versions=versions(),
      command=command(),
      folder=path.absolute().parent.name,
      palette={"light": palette.LIGHT, "dark": palette.DARK, "print": palette.PRINT},
      **values,
    )
  )
  with files.replacing(path) as temporary:
    temporary.write_text(texts.printable(text), encoding="utf-8")


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
  python = ".".join(map(str, sys.version_info[:3]))
  return {name: _version(name) for name in ("crn-jax", "jax", "flax")} | {"Python": python}


def _version(distribution: str) -> str:
  try:
    return importlib.metadata.version(distribution)
  except importlib.metadata.PackageNotFoundError:  # E.g. run from a folder without installation.
    return "not installed"


def command() -> str:
  """The command line of this process."""
  return shlex.join([pathlib.Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
