"""A catalogue follows its pictures: what is new is encoded, what is gone is removed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from crn_jax.catalogue import indexing, pictures
from crn_jax.catalogue.store import Store
from crn_jax.errors import UserError
from tests.catalogue import killed, made

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def catalogue(tmp_path):
  """Ten pictures, and a function that brings the index up to date: report, encoder, content."""
  made.folder(tmp_path / "pictures", 10)

  def update(images="pictures", batch_size=4, **options):
    encoders = options.pop("encoders", None) or made.FakeEncoders()
    with Store(tmp_path / "a.db", create=True) as store:
      report = indexing.update(
        store, encoders, tmp_path / images, batch_size=batch_size, **options
      )  # fmt: skip
      return report, encoders, made.content(store)

  update.root = tmp_path / "pictures"
  return update


def counts(report) -> tuple[int, ...]:
  return (report.total, report.written, report.encoded, report.described, report.unchanged,
          report.removed)  # fmt: skip


def check(content, root: pathlib.Path) -> None:
  """The content is what the files say, each with its own vector."""
  files = {p.relative_to(root).as_posix(): p for p in root.rglob("*.png")}
  assert content.keys() == files.keys()
  encoders = made.FakeEncoders()
  for identifier, (row, vector) in content.items():
    pixels = pictures.decode(files[identifier].read_bytes())
    assert vector == encoders.vector(pixels).tobytes()
    assert (row.path, row.bytes) == (str(files[identifier]), files[identifier].stat().st_size)
    assert (row.height, row.width) == pixels.shape[:2]


class TestChanges:
  def test_all_are_encoded_once(self, catalogue):
    report, encoders, content = catalogue()
    assert counts(report) == (10, 10, 10, 0, 0, 0)
    assert (encoders.encoded, report.complete, report.skipped) == (10, True, [])
    check(content, catalogue.root)
    report, encoders, again = catalogue()
    assert counts(report) == (10, 0, 0, 0, 10, 0)
    assert (encoders.encoded, again) == (0, content)

  def test_a_new_and_a_deleted_one(self, catalogue):
    catalogue()
    made.picture(catalogue.root / "sub" / "new.png", 100)
    (catalogue.root / "3.png").unlink()
    report, _, content = catalogue()
    assert counts(report) == (10, 1, 1, 0, 9, 1)
    check(content, catalogue.root)

  def test_a_replaced_one(self, catalogue):
    catalogue()
    made.picture(catalogue.root / "3.png", 100, size=(50, 40))
    report, _, content = catalogue()
    assert counts(report) == (10, 1, 1, 0, 9, 0)
    check(content, catalogue.root)

  def test_a_renamed_one_is_not_encoded(self, catalogue):
    catalogue()
    (catalogue.root / "3.png").rename(catalogue.root / "a b'\".png")
    report, encoders, content = catalogue()
    assert counts(report) == (10, 1, 0, 0, 9, 1)
    assert encoders.encoded == 0
    check(content, catalogue.root)

  @pytest.mark.parametrize("batch_size", [1, 4, 100])
  def test_copies_are_encoded_once(self, catalogue, batch_size):
    """In one batch, in two, and of what was there before."""
    for copy in ("00.png", "x/y.png", "z.png"):
      (catalogue.root / copy).parent.mkdir(exist_ok=True)
      shutil.copy(catalogue.root / "0.png", catalogue.root / copy)
    report, encoders, content = catalogue(batch_size=batch_size)
    assert counts(report) == (13, 13, 10, 0, 0, 0)
    check(content, catalogue.root)
    shutil.copy(catalogue.root / "5.png", catalogue.root / "zz.png")
    report, encoders, content = catalogue(batch_size=batch_size)
    assert (encoders.encoded, report.total) == (0, 14)
    check(content, catalogue.root)

  @pytest.mark.parametrize("batch_size", [1, 4, 100])
  def test_two_that_changed_places(self, catalogue, batch_size):
    """Neither gets the other's old vector, whether or not they share a batch."""
    catalogue(batch_size=batch_size)
    one, other, free = (catalogue.root / name for name in ("0.png", "9.png", "free"))
    one.rename(free), other.rename(one), free.rename(other)
    report, _, content = catalogue(batch_size=batch_size)
    assert (report.written, report.unchanged, report.removed) == (2, 8, 0)
    check(content, catalogue.root)

  def test_a_content_that_is_overwritten_between_reading_and_writing(self, catalogue, tmp_path):
    """It was known when the copy was read, and is not when the copy is written."""
    catalogue()
    (catalogue.root / "0.png").rename(catalogue.root / "copy.png")
    made.picture(catalogue.root / "0.png", 100)
    with Store(tmp_path / "a.db") as store:
      work = indexing._Work(store, made.FakeEncoders(), store.about(), 4)
      sources = {source.id: source for source in indexing.sources(catalogue.root)[0]}
      replaced, copy = (work.read(sources[name]) for name in ("0.png", "copy.png"))
      assert copy.picture is None
      work.finish([replaced])
      work.finish([copy])
      assert work.report.encoded == 2
    check(catalogue()[2], catalogue.root)

  def test_a_moved_folder_is_described_anew(self, catalogue):
    catalogue()
    catalogue.root.rename(catalogue.root.with_name("moved"))
    report, encoders, content = catalogue("moved")
    assert counts(report) == (10, 0, 0, 10, 0, 0)
    assert encoders.encoded == 0
    check(content, catalogue.root.with_name("moved"))

  def test_metadata(self, catalogue):
    path = catalogue.root / "list.jsonl"

    def write(*rows):
      path.write_text(
        "\n".join(json.dumps({"path": f"{i}.png"} | row) for i, row in enumerate(rows))
      )

    write({"kind": "dress", "price": 3}, {"kind": "shirt"}, {"id": "two"})
    report, _, content = catalogue("pictures/list.jsonl")
    assert counts(report) == (3, 3, 3, 0, 0, 0)
    write({"kind": "dress"}, {"kind": "shirt"}, {"id": "two", "new": True})
    report, encoders, content = catalogue("pictures/list.jsonl")
    assert counts(report) == (3, 0, 0, 2, 1, 0)
    assert encoders.encoded == 0
    assert {i: row.metadata for i, (row, _) in content.items()} == {
      "0.png": {"kind": "dress"}, "1.png": {"kind": "shirt"}, "two": {"new": True},
    }  # fmt: skip

  def test_every_change_makes_another_generation(self, catalogue, tmp_path):
    seen = []
    for change in (lambda: None, lambda: None, lambda: (catalogue.root / "3.png").unlink()):
      change()
      catalogue()
      with Store(tmp_path / "a.db") as store:
        seen.append(store.about().generation)
    assert seen[0] == seen[1] != seen[2]


class TestBroken:
  def test_they_are_listed_and_passed_over(self, catalogue):
    (catalogue.root / "3.png").write_bytes(b"no picture")
    (catalogue.root / "4.png").write_bytes((catalogue.root / "4.png").read_bytes()[:60])
    os.mkfifo(catalogue.root / "pipe.png")
    report, _, content = catalogue()
    assert counts(report) == (8, 8, 8, 0, 0, 0)
    assert sorted((pathlib.Path(s.path).name, s.reason[:13]) for s in report.skipped) == [
      ("3.png", "not a picture"), ("4.png", "truncated"), ("pipe.png", "no ordinary f"),
    ]  # fmt: skip
    for name in ("3.png", "4.png", "pipe.png"):
      (catalogue.root / name).unlink()
    check(content, catalogue.root)

  def test_one_that_breaks_leaves_the_catalogue_until_it_is_mended(self, catalogue):
    catalogue()
    before = (catalogue.root / "3.png").read_bytes()
    (catalogue.root / "3.png").write_bytes(b"")
    report, _, content = catalogue()
    assert (report.total, report.removed, len(report.skipped)) == (9, 1, 1)
    assert "3.png" not in content
    (catalogue.root / "3.png").write_bytes(before)
    report, _, content = catalogue()
    assert (report.total, report.encoded) == (10, 1)
    check(content, catalogue.root)

  def test_a_line_of_a_manifest_without_its_file(self, catalogue):
    (catalogue.root / "list.csv").write_text("path\n0.png\nabsent.png\n")
    report, _, content = catalogue("pictures/list.csv")
    assert list(content) == ["0.png"]
    assert [s.reason for s in report.skipped] == ["no such file"]

  @pytest.mark.parametrize(
    ("images", "message"),
    [
      ("absent", "no such folder or file"),
      ("pictures/0.png", "neither a folder nor a manifest"),
      ("empty", "no pictures in it"),
      ("broken", "none of the 2 pictures can be read; the first is .*a.png: not a picture"),
    ],
  )
  def test_a_mistaken_folder_does_not_empty_the_catalogue(self, catalogue, images, message):
    catalogue()
    (catalogue.root.with_name("empty")).mkdir()
    for name in ("a.png", "b.png"):
      made.picture(catalogue.root.with_name("broken") / name, 0).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
      catalogue(images)
    report, encoders, _ = catalogue()
    assert (report.total, encoders.encoded) == (10, 0)

  def test_vectors_that_are_not_finite_are_refused(self, catalogue):
    report, _, content = catalogue(encoders=made.FakeEncoders(bad=(3, 4)))
    assert {pathlib.Path(s.path).name for s in report.skipped} == {"3.png", "4.png"}
    assert {s.reason for s in report.skipped} == {"the model gives it no finite vector"}
    assert report.total == len(content) == 8

  def test_a_model_that_gives_no_finite_vector_at_all_stops(self, catalogue):
    with pytest.raises(
      UserError, match="made_up: the model gives no finite vectors, first of .*0.png"
    ):
      catalogue(encoders=made.FakeEncoders(bad=range(10)))

  def test_another_model_is_refused(self, catalogue):
    _, _, before = catalogue()
    other = made.FakeEncoders(digest="b")
    with pytest.raises(UserError, match="made with another model .*/models/made_up, digest aaaa"):
      catalogue(encoders=other)
    assert other.encoded == 0
    assert catalogue()[2] == before


class TestStopped:
  def test_what_is_done_stays_and_nothing_is_removed(self, catalogue):
    catalogue()
    for i in range(10, 20):
      made.picture(catalogue.root / f"{i}.png", i)
    (catalogue.root / "3.png").unlink()
    asked = iter([False, False, True])
    report, encoders, content = catalogue(stopped=lambda: next(asked))
    assert (report.complete, report.removed) == (False, 0)
    assert "3.png" in content
    report, rest, content = catalogue()
    assert report.complete
    assert encoders.encoded + rest.encoded == 10
    check(content, catalogue.root)

  def test_killed_ten_times_it_ends_as_if_undisturbed(self, catalogue, tmp_path):
    for i in range(10, 50):
      made.picture(catalogue.root / f"{i}.png", i)
    n, kills, batch = 50, 10, killed.BATCH_SIZE
    done = subprocess.run(
      [sys.executable, "-m", "tests.catalogue.killed", str(tmp_path / "killed.db"),
       str(catalogue.root), str(kills)],
      cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["statuses"] == [-signal.SIGKILL] * kills, done.stderr
    encoders = made.FakeEncoders()
    with Store(tmp_path / "killed.db") as store:
      report = indexing.update(store, encoders, catalogue.root, batch_size=batch)
      content = made.content(store)
    # A batch that was encoded and not yet acknowledged is encoded again; nothing else is.
    again = sum(found["encoded"]) + encoders.encoded - n
    assert sum(found["encoded"]) > 0
    assert 0 <= again <= kills * batch
    assert (report.total, report.removed) == (n, 0)
    _, _, undisturbed = catalogue()
    assert content == undisturbed


def test_files_are_read_a_batch_ahead_and_no_more(monkeypatch):
  """So that memory does not grow with their number."""
  alive, most = set(), 0

  class Outcome:
    def __init__(self, i):
      nonlocal most
      self.i = i
      alive.add(i)
      most = max(most, len(alive))

    def __del__(self):
      alive.discard(self.i)

  seen = 0
  for batch in indexing._batches(range(1_000), Outcome, 10):
    seen += len(batch)
    del batch
  assert seen == 1_000
  assert most <= 40  # The batch at hand, the one read ahead, and their futures.


def test_facets():
  metadata = [
    {"kind": "dress", "price": 3, "new": True, "name": "x" * 200, "mixed": 1, "odd": True},
    {"kind": "shirt", "price": 1.5, "new": False, "mixed": "one", "odd": 1},
    {"kind": "dress", "price": 20},
  ]
  many = [{"sku": str(i)} for i in range(60)]
  assert indexing.facets(metadata + many) == {
    "kind": {"values": ["dress", "shirt"]}, "price": {"least": 1.5, "greatest": 20},
    "new": {"values": [False, True]}, "name": {}, "mixed": {}, "odd": {}, "sku": {},
  }  # fmt: skip
  assert indexing.facets([{}, {}]) == {}


def test_memory_holds_no_vectors(catalogue):
  """Of what is stored a run keeps a few hundred bytes a row."""
  catalogue()
  with Store(catalogue.root.with_name("a.db")) as store:
    work = indexing._Work(store, made.FakeEncoders(), store.about(), 4)
  held = [*work.stored.values(), *work.holder.items()]
  assert len(held) == 20
  assert not any(isinstance(part, np.ndarray) for entry in held for part in entry)
  assert sum(len(part) for entry in held for part in entry) < 10 * 300
