"""Runs side by side, of made-up results."""

import json
import pathlib
import shutil

import pytest
from PIL import Image

import crn_jax
from crn_jax.errors import UserError
from crn_jax.reports import compare, published
from crn_jax.workdir import run
from tests import made_up
from tests.reports.test_report import Page


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return made_up.dataset(made_up.split(tmp_path_factory.mktemp("images")))


@pytest.fixture
def add(tmp_path, data):
  """add(name) makes a finished run and returns its folder."""

  def make(name, evaluations=((4, 10.0), (7, 20.0)), change=None, **facts):
    config = made_up.config()
    config.num_epochs = 7
    if change:
      change(config)
    workdir = tmp_path / name
    results = made_up.evaluation(config, data).results.to_json() | {"also": "best"} | facts
    run.save_config(config, workdir)
    run.write_json(results, workdir / "eval.json")
    lines = [{"step": s, "epoch": float(s), "eval/val_split/R@10": r} for s, r in evaluations]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir

  return make


def edit(workdir, **changes):
  """Changes eval.json; a value of None removes the key."""
  path = workdir / "eval.json"
  results = json.loads(path.read_text()) | changes
  run.write_json({k: v for k, v in results.items() if v is not None}, path)


class TestResult:
  def test_table_picture_and_page(self, add, tmp_path):
    runs = [add("a"), add("b", change=lambda c: c.optimizer.update(learning_rate=1e-4))]
    shown = compare.compare(runs, tmp_path / "out")
    for part in ("fashioniq/dress", "val_split", "original_split", "gallery", "25", "30",
                 "excluded", "joined", "checkpoint step", "last and best", "best by",
                 "Image only queries", "optimizer.learning_rate", "0.0001",
                 str(tmp_path / "out" / "compare.html")):  # fmt: skip
      assert part in shown, part
    assert "WARNING" not in shown
    results = json.loads((runs[0] / "eval.json").read_text())["protocols"]["val_split"]
    low, high = results["intervals"]["R@10"]
    assert f"{results['R@10']:.2f} ({low:.1f}-{high:.1f})" in shown
    with Image.open(tmp_path / "out" / "compare.png") as picture:
      assert picture.width > 1000
    page = Page(tmp_path / "out" / "compare.html")
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert f"{results['R@10']:.2f} {low:.1f}-{high:.1f}" in page.text
    assert "optimizer.learning_rate 3e-05 0.0001" in page.text

  def test_published_numbers_of_the_methods_stand_beside_measured_ones(self, add, tmp_path):
    runs = [add("a"), add("b", change=lambda c: c.update(preset="clvc_net_equal"))]
    (table,) = compare.paper_tables([compare.load(r, r.name) for r in runs])
    assert table.header == ("", "dress R@10", "dress R@50")
    rows = {name: [cell.text for cell in cells] for name, cells in table.rows}
    measured = json.loads((runs[0] / "eval.json").read_text())["protocols"]["val_split"]
    assert rows["a"] == [f"{measured['R@10']:.2f}", "-"]  # R@50 was not measured.
    assert rows["published: crn, Swin-L"] == ["32.67", "59.30"]
    assert rows["published: clvc_net, ResNet-50"] == ["29.85", "56.47"]
    assert "published: crn, Swin-L" in compare.compare(runs, tmp_path / "out")

  def test_means_are_not_put_beside_one_category(self, add):
    runs = [add(name, change=lambda c: c.update(preset="dcnet")) for name in "ab"]
    (table,) = compare.paper_tables([compare.load(r, r.name) for r in runs])
    assert [name for name, _ in table.rows] == ["a", "b"]

  def test_another_composition_in_a_presets_place_is_not_that_method(self, add):
    def change(config):
      config.preset, config.model.composition = "tirg_equal", "attended"

    runs = [add(name, change=change) for name in "ab"]
    (table,) = compare.paper_tables([compare.load(r, r.name) for r in runs])
    assert [name for name, _ in table.rows] == ["a", "b"]

    def own(config):
      config.preset, config.model.composition = "tirg_equal", "tirg"

    (table,) = compare.paper_tables([compare.load(add("c", change=own), "c")])
    assert [name for name, _ in table.rows] == ["c", "published: tirg, ResNet-50"]

  def test_published_numbers_are_those_of_the_docs(self):
    text = (pathlib.Path(crn_jax.__file__).parents[1] / "docs" / "results.md").read_text()
    for row in published.ROWS:
      for part, recalls in row.percent.items():
        digits = 1 if row.dataset == "fashion200k" else 2
        shown = " / ".join(f"{value:.{digits}f}" for value in recalls.values())
        assert shown in text, (row.preset, part)

  @pytest.mark.parametrize(
    ("preset", "methods"),
    [("tirg_equal", {"tirg"}), ("tirg_map_equal", set()), ("crn_towers", set()),
     ("crn_released_swin_tiny", {"crn"}), ("val_equal_resnet18", {"val"})],
  )  # fmt: skip
  def test_methods_are_known_by_what_a_run_records(self, preset, methods):
    assert {row.preset for row in published.rows_of("shoes", [preset])} == methods

  def test_methods_that_nobody_published_have_a_row_each(self, add):
    runs = [add(name, change=lambda c: c.update(preset="text_only_equal")) for name in "ab"]
    (table,) = compare.paper_tables([compare.load(r, r.name) for r in runs])
    assert table.header == ("", "dress R@1", "dress R@10")
    assert [name for name, _ in table.rows] == ["a", "b"] and not table.note

  def test_only_fields_that_differ_are_listed_and_places_are_not(self, add, tmp_path):
    def elsewhere(config):
      config.name, config.data.root, config.seed = "other", "elsewhere", 1

    table = compare.differences([compare.load(add("a"), "a"),
                                 compare.load(add("b", change=elsewhere), "b")])  # fmt: skip
    assert [(name, [c.text for c in cells]) for name, cells in table.rows] == [
      ("seed", ["599", "1"])
    ]

  def test_equal_configurations_are_said_to_be(self, add, tmp_path):
    shown = compare.compare([add("a"), add("b")], tmp_path / "out")
    assert "the runs have the same configuration" in shown

  @pytest.mark.parametrize("evaluations", [(), ((7, 20.0),), tuple((i, 2.0) for i in range(1, 8))])
  def test_runs_with_other_numbers_of_evaluations(self, add, tmp_path, evaluations):
    compare.compare([add("a"), add("b", evaluations)], tmp_path / "out")
    Image.open(tmp_path / "out" / "compare.png").verify()

  def test_a_run_without_records_is_compared_by_its_results(self, add, tmp_path):
    folders = [add("a"), add("b")]
    (folders[1] / "metrics.jsonl").unlink()
    assert "R@10" in compare.compare(folders, tmp_path / "out")

  def test_the_other_checkpoint_stands_beside(self, add, tmp_path):
    folders = [add("a"), add("b", also=None)]
    other = json.loads((folders[1] / "eval.json").read_text())
    edit(folders[1], beside=[other | {"selection": "best", "checkpoint_step": 3}])
    assert "best, step 3" in compare.compare(folders, tmp_path / "out")

  def test_names_are_as_short_as_they_stay_different(self, add, tmp_path):
    shown = compare.compare([add("a/run"), add("b/run"), add("b/other")], tmp_path / "out")
    for name in ("a/run", "b/run", "b/other"):
      assert name in shown
    assert "/a/run" not in shown.partition("written")[0]


class TestNotComparable:
  """What differs is said at the top of all that is written; the numbers are shown all the same."""

  @pytest.mark.parametrize(
    ("changes", "expected"),
    [
      ({"dataset": "demo/dress"}, "the data sets differ: fashioniq/dress in a, demo/dress in b"),
      ({"n_queries": 7}, "the numbers of queries differ: 20 in a, 7 in b"),
      ({"captions": "separate"}, "the captions differ: joined in a, separate in b"),
      ({"exclude_reference": False}, "the uses of the reference image differ: excluded in a, "
                                     "kept in b"),
      (
        {"selection": "best", "also": None, "best_metric": "val_split/R@1"},
        "the choices of the checkpoint differ: last and best by val_split/R@10 in a, "
        "best by val_split/R@1 in b",
      ),
      ({"skipped": {"train": {"triplets": 3}}}, "the skipped data differ: none in a, "
                                                "train.triplets 3 in b"),
    ],
  )  # fmt: skip
  def test_warnings(self, add, tmp_path, changes, expected):
    folders = [add("a"), add("b")]
    edit(folders[1], **changes)
    shown = compare.compare(folders, tmp_path / "out")
    assert shown.startswith(f"WARNING, not comparable: {expected}\n")
    assert expected in Page(tmp_path / "out" / "compare.html").text

  def test_other_galleries_and_missing_protocols(self, add, tmp_path):
    folders = [add("a"), add("b")]
    protocols = json.loads((folders[1] / "eval.json").read_text())["protocols"]
    protocols["val_split"]["gallery"] = 9
    del protocols["original_split"]
    edit(folders[1], protocols=protocols)
    shown = compare.compare(folders, tmp_path / "out")
    assert "the galleries of val_split differ: 25 in a, 9 in b" in shown
    assert "the galleries of original_split differ: 30 in a, not measured in b" in shown

  def test_the_best_and_the_last_may_be_the_same_checkpoint(self, add, tmp_path):
    folders = [add("a"), add("b")]
    edit(folders[1], selection="last", also=None)
    assert "WARNING" not in compare.compare(folders, tmp_path / "out")
    edit(folders[0], also=None, selection="best")
    assert "choices of the checkpoint" in compare.compare(folders, tmp_path / "out")

  def test_a_run_that_goes_on_is_named(self, add, tmp_path):
    shown = compare.compare([add("a"), add("b", evaluations=((4, 10.0),))], tmp_path / "out")
    assert "b is not finished: epoch 4.00 of 7" in shown


class TestErrors:
  """Each names the folder or file, and what to do."""

  def error(self, folders, out, kind=UserError):
    with pytest.raises(kind) as error:
      compare.compare(folders, out)
    assert not out.exists()
    return str(error.value)

  def test_fewer_than_two_runs(self, add, tmp_path):
    for folders in ([], [add("a")], [add("b"), tmp_path / "b" / "."]):
      message = self.error(folders, tmp_path / "out")
      assert "two or more different folders, e.g. runs/a,runs/b" in message

  def test_no_such_folder(self, add, tmp_path):
    message = self.error([add("a"), tmp_path / "b"], tmp_path / "out", UserError)
    assert f"{tmp_path / 'b' / 'config.json'}: not found" in message
    assert "--workdirs takes folders of runs" in message

  def test_a_file_in_place_of_a_folder(self, add, tmp_path):
    (tmp_path / "b").touch()
    message = self.error([add("a"), tmp_path / "b"], tmp_path / "out", UserError)
    assert str(tmp_path / "b") in message

  def test_a_run_without_results(self, add, tmp_path):
    folders = [add("a"), add("b")]
    (folders[1] / "eval.json").unlink()
    message = self.error(folders, tmp_path / "out", UserError)
    assert f"{folders[1] / 'eval.json'}: not found" in message
    assert f"--mode=eval --checkpoint=last --workdir={folders[1]}" in message

  @pytest.mark.parametrize("content", ["{", "[]"])
  @pytest.mark.parametrize(
    ("name", "mend"), [("eval.json", "--mode=eval"), ("config.json", "restore it")]
  )
  def test_damaged_files(self, add, tmp_path, name, mend, content):
    folders = [add("a"), add("b")]
    (folders[1] / name).write_text(content)
    message = self.error(folders, tmp_path / "out")
    assert message.startswith(f"{folders[1] / name}: ")
    assert mend in message

  def test_results_of_an_older_version(self, add, tmp_path):
    folders = [add("a"), add("b")]
    edit(folders[1], by_query=None, captions=None)
    message = self.error(folders, tmp_path / "out")
    assert f"{folders[1] / 'eval.json'}: lacks captions, by_query" in message
    assert "older version" in message
    assert "--mode=eval" in message

  def test_results_without_intervals(self, add, tmp_path):
    folders = [add("a"), add("b")]
    protocols = json.loads((folders[1] / "eval.json").read_text())["protocols"]
    del protocols["original_split"]["intervals"]
    edit(folders[1], protocols=protocols)
    assert "lacks intervals" in self.error(folders, tmp_path / "out")


def test_results_of_the_run_are_left_alone(add, tmp_path):
  folders = [add("a"), add("b")]
  shutil.copytree(folders[0], tmp_path / "before")
  compare.compare(folders, tmp_path / "out")
  before = {p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()}
  assert {p.name: p.read_bytes() for p in folders[0].iterdir()} == before
