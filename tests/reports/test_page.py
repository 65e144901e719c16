"""Pages: what they get by themselves, texts of their pictures, odd texts."""

import dataclasses
import os
import subprocess
import sys

import flax
import jax
import pytest
from PIL import Image

from crn_jax.reports import page, texts
from crn_jax.reports.pictures import palette
from crn_jax.reports.tables import Cell, Table
from tests.reports.test_report import Page

ODD = os.fsdecode(b"r\xffn")  # A name in another encoding.


@dataclasses.dataclass
class Section:
  title: str
  figures: tuple


@pytest.fixture
def write(tmp_path):
  """write(template, rows, title) writes a page of either kind and reads it."""
  picture = tmp_path / "a.png"
  Image.new("RGB", (40, 30)).save(picture)
  table = Table("Table", ("", "R@1"), (("row", (Cell("1"),)),))

  def write_(template="report.html", rows=(), title="a title", folder="run 7"):
    figure = page.Figure("A grid", picture, "eight queries", rows)
    shown = {
      "report.html": {
        "summary": "", "unit": "", "tables": [table], "notes": [], "config": {}, "preset": "crn",
        "sections": [Section("First", (figure,)), Section("Second", (figure,))],
      },
      "compare.html": {
        "unit": "", "warnings": [], "tables": [table], "figure": figure, "differences": table
      },
    }  # fmt: skip
    path = tmp_path / folder / template
    page.write(template, path, title=title, **shown[template])
    return Page(path)

  return write_


@pytest.mark.parametrize("template", ["report.html", "compare.html"])
class TestEveryPage:
  def test_links_at_the_top_lead_to_all_sections(self, write, template):
    found = write(template)
    links = [link[1:] for link in found.links if link.startswith("#")]
    assert len(links) > 3
    assert set(links) == found.ids
    assert found.source.index("<nav") < found.source.index("<h2")
    headings = found.tags.count("h2")
    assert len(links) == headings

  def test_it_names_its_folder(self, write, template):
    assert ": run 7 " in write(template).text

  def test_rows_of_a_figure_are_text(self, write, template):
    found = write(template, rows=("is <b>blue</b>: target at rank 1", "has sleeves"))
    assert "is <b>blue</b>: target at rank 1 has sleeves" in found.text
    assert "b" not in found.tags
    assert "ol" in found.tags
    assert "ol" not in write(template).tags

  def test_its_colours_are_the_palettes(self, write, template):
    source = write(template).source
    for theme in (palette.LIGHT, palette.DARK, palette.PRINT):
      assert " ".join(f"--{name}: {colour};" for name, colour in theme.items()) in source

  def test_what_utf8_cannot_hold_is_a_question_mark(self, write, template):
    found = write(template, rows=(f"text {ODD}",), title=f"title {ODD}", folder=ODD)
    for text in ("text r?n", "title r?n", ": r?n "):
      assert text in found.text


def test_a_failed_page_leaves_nothing(tmp_path):
  with pytest.raises(Exception, match="undefined"):
    page.write("report.html", tmp_path / "report.html", title="without all else")
  assert os.listdir(tmp_path) == []


def test_versions_are_those_installed():
  found = page.versions()
  assert found["jax"] == jax.__version__
  assert found["flax"] == flax.__version__
  assert found["Python"] == ".".join(map(str, sys.version_info[:3]))


def test_neither_pages_nor_pictures_load_jax():
  modules = "page, pictures.attention, pictures.curves, pictures.grid"
  imports = "".join(f"import crn_jax.reports.{m}\n" for m in modules.split(", "))
  check = "import sys\nassert not {'jax', 'flax', 'tensorflow'} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", imports + check], check=True)


@pytest.mark.parametrize(
  ("text", "printable"), [("is blue", "is blue"), ("größer 长", "größer 长"), (ODD, "r?n")]
)
def test_printable_texts_change_nothing_that_can_be_written(text, printable):
  assert texts.printable(text) == printable
