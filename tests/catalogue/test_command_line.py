"""The commands of docs/catalogue.md, from a trained run to pictures."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests import tiny
from tests.catalogue import made

REPOSITORY = pathlib.Path(__file__).parents[2]
MAIN = REPOSITORY / "main.py"
DOCS = (REPOSITORY / "docs" / "catalogue.md").read_text(encoding="utf-8")

CONFIG = """
from tests import tiny

def get_config():
  config = tiny.config({root!r})
  config.num_epochs = 1
  # As little to compile as can be.
  config.update_mode = "simultaneous"
  config.loss.modification = config.loss.auxiliary = 0.0
  return config
"""


def start(*options: str, folder: pathlib.Path, **environment) -> subprocess.Popen:
  environment = os.environ | {
    "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  } | environment  # fmt: skip
  return subprocess.Popen(
    [sys.executable, str(MAIN), *options], cwd=folder, env=environment, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def main(*options: str, folder: pathlib.Path) -> tuple[int, str, str]:
  """Exit status, standard output and error."""
  process = start(*options, folder=folder)
  out, error = process.communicate()
  return process.returncode, out, error


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--mode=index"], "--mode=index needs --index, e.g. --index=catalogue.db"),
    (["--mode=search"], "--mode=search needs --index"),
    (["--mode=index", "--index=a.db"], "--mode=index needs --model, e.g. --model=runs/demo_crn"),
    (["--mode=index", "--index=a.db", "--model=x"], "--mode=index needs --images"),
    (["--mode=index", "--index=a.db", "--model=x", "--images=y"], "y: no such folder"),
    (["--mode=search", "--index=a.db", "--text=x"], "a.db: no such index; make it with"),
    (["--mode=search", "--index=a.db", "--k=many"], "--k=many"),
  ],
)
def test_a_command_that_cannot_be_run(options, message, tmp_path):
  status, out, error = main(*options, folder=tmp_path)
  assert (status, out) == (1, "")
  (line,) = error.splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder as the docs have it: a trained run, pictures."""
  folder = tmp_path_factory.mktemp("place")
  root = tiny.draw(folder)
  (folder / "config.py").write_text(CONFIG.format(root=str(root)))
  status, _, error = main("--config=config.py", "--workdir=runs/demo_crn", folder=folder)
  assert status == 0, error
  (folder / "my_pictures").mkdir()
  drawn = sorted((root / "images").glob("dress*"))
  for i, path in enumerate(drawn[:40]):
    (folder / "my_pictures" / f"dress_{i}{path.suffix}").write_bytes(path.read_bytes())
  Image.open(drawn[40]).convert("RGB").save(folder / "dress.jpg")
  made.picture(folder / "my_pictures" / "broken.png", 0).write_bytes(b"broken")
  return folder


def blocks(language: str) -> list[str]:
  """The code of the docs in a language."""
  found = re.findall(r"^```(\w*)\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)
  return [code for of, code in found if of == language]


def command(mode: str) -> list[str]:
  """The options of the docs' one command of a mode that works without a server."""
  lines = [line for code in blocks("") for line in code.replace("\\\n", " ").splitlines()]
  (found,) = [line for line in lines if f"--mode={mode}" in line and "http:" not in line]
  program, name, *options = shlex.split(found)
  assert (program, name) == ("python", "main.py")
  return options


@pytest.fixture(scope="module")
def indexed(place) -> str:
  """What the docs' command says that makes the catalogue."""
  status, out, error = main(*command("index"), folder=place)
  assert status == 0, error
  return out


@pytest.mark.slow
@pytest.mark.usefixtures("indexed")
class TestDocs:
  def test_from_pictures_to_a_search(self, place, indexed):
    assert re.match(
      r"catalogue.db: 40 pictures\n  40 new or changed, 40 of them encoded; .*\n  1 skipped:\n"
      r"    .*/broken.png: not a picture of these formats",
      indexed,
    )
    status, out, error = main(*command("search"), folder=place)
    assert status == 0, error
    table = [line.split() for line in out.splitlines()]
    assert table[0] == ["rank", "score", "id"]
    assert [row[0] for row in table[1:11]] == [str(i) for i in range(1, 11)]
    assert out.splitlines()[-1] == "written found.png"
    with Image.open(place / "found.png") as grid:
      assert grid.size[0] > 10 * 112

  def test_again_as_json(self, place):
    status, out, error = main(*command("index"), "--json", folder=place)
    assert status == 0, error
    report = json.loads(out)
    assert (report["total"], report["encoded"], report["unchanged"]) == (40, 0, 40)
    assert [pathlib.Path(s["path"]).name for s in report["skipped"]] == ["broken.png"]
    status, out, error = main(
      "--mode=search", "--index=catalogue.db", "--id=dress_3.jpg", "--text=is sparkling", "--json",
      "--k=5", '--filter=id like "dress%"', folder=place,
    )  # fmt: skip
    assert status == 0, error
    found = json.loads(out)
    assert found["unknown_words"] == ["sparkling"]
    assert len(found["hits"]) == 5
    assert "dress_3.jpg" not in {hit["id"] for hit in found["hits"]}
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      (["--text=is red", "--filter=kind = "], "error: filter 'kind = ': not understood ("),
      (["--image=my_pictures/broken.png"], "error: my_pictures/broken.png: not a picture of these"),
    ],
  )
  def test_one_line_for_what_cannot_be_searched(self, options, message, place):
    status, out, error = main("--mode=search", "--index=catalogue.db", *options, folder=place)
    assert (status, out) == (1, "")
    (line,) = error.splitlines()
    assert line.startswith(message)

  def test_python(self, place, monkeypatch, capsys):
    (example,) = [code for code in blocks("python") if "import crn_jax" in code]
    monkeypatch.chdir(place)
    found = {}
    exec(compile(example, "docs/catalogue.md", "exec"), found)
    assert len(found["hits"]) == 5
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert len(found["more"]) == 3
    assert found["hits"][0].id not in {hit.id for hit in found["more"]}
    assert all(hit.score >= 0.1 and hit.id.startswith("dress") for hit in found["blue"])

  def test_a_signal_stops_it_and_the_same_command_goes_on(self, place):
    many = made.folder(place / "many", 200)
    options = ["--mode=index", "--model=runs/demo_crn", f"--images={many}", "--index=b.db"]
    process = start(*options, folder=place)
    wal = place / "b.db" / "collections" / "catalogue" / "wal"
    while process.poll() is None and not (wal.is_dir() and any(wal.iterdir())):
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    # It may just have been done.
    assert process.returncode in (0, 128 + signal.SIGINT), error
    if process.returncode:
      assert re.search(r"stopped at picture \d+ by SIGINT, everything is saved. Continue", error)
    status, out, error = main(*options, folder=place)
    assert status == 0, error
    assert out.startswith("b.db: 200 pictures")
