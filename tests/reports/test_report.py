"""report.html and the pictures beside it, of a made-up evaluation."""

import dataclasses
import html.parser
import json
import re

import pytest
from PIL import Image

from crn_jax.reports import report
from crn_jax.workdir import logs
from tests import made_up
from tests.reports.test_tables import SKIPPED


class Page(html.parser.HTMLParser):
  """What of a page matters here: its text, its links, its pictures, its tags."""

  def __init__(self, path):
    super().__init__()
    self.source = path.read_text(encoding="utf-8")
    self.text, self.links, self.images, self.tags, self.ids = "", [], [], [], set()
    self.feed(self.source)
    self.text = re.sub(r"\s+", " ", self.text)

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.append(tag)
    self.links += [attrs[a] for a in ("src", "href", "srcset", "data", "poster") if a in attrs]
    self.ids |= {attrs["id"]} if "id" in attrs else set()
    if tag == "img":
      self.images.append(attrs)

  def handle_data(self, data):
    self.text += data + " "


def write(folder, config, dataset, evaluation, history=True):
  """Writes the report; returns the work directory and the paths written."""
  workdir = folder / "run"
  workdir.mkdir(exist_ok=True)
  if history:
    for step in (3, 7):
      losses = {f"train/{b}/total": 1.0 / step for b in ("local", "global")}
      logs.append_line(workdir / "metrics.jsonl", json.dumps({"step": step, **losses}))
  shown = made_up.cases(config, dataset, evaluation)
  return workdir, report.write(
    config, workdir, evaluation.results, evaluation.outcomes, shown, made_up.vocabulary(config)
  )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A report of a best checkpoint with the last one beside it, on data with holes."""
  folder = tmp_path_factory.mktemp("report")
  config = made_up.config()
  data = made_up.dataset(made_up.split(folder), skipped=SKIPPED)
  evaluation = made_up.evaluation(config, data, step=7, selection="best")
  last = made_up.evaluation(config, data, step=9).results
  results = dataclasses.replace(evaluation.results, beside=(last,))
  evaluation = dataclasses.replace(evaluation, results=results)
  workdir, paths = write(folder, config, data, evaluation)
  return workdir, paths, evaluation.results, Page(workdir / "report.html")


class TestPage:
  def test_it_opens_without_a_network(self, written):
    page = written[-1]
    assert page.links
    for link in page.links:
      assert link.startswith("data:") or (link.startswith("#") and link[1:] in page.ids), link
    assert not {"script", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"@import|url\(", page.source)

  def test_all_pictures_are_in_it_with_a_text_for_those_who_do_not_see_them(self, written):
    _, paths, _, page = written
    assert len(page.images) == len([p for p in paths if p.suffix == ".png"]) == 6
    for image in page.images:
      assert image["alt"].strip()
      assert int(image["width"]) > 100

  def test_it_says_all_that_changes_the_numbers(self, written):
    text = written[-1].text
    for part in (
      "fashioniq/dress: 20 queries", "captions joined", "reference image excluded",
      "val_split, gallery 25", "original_split, gallery 30",
      "best checkpoint (step 7), chosen by val_split/R@10 on these queries",
      "Beside it: last checkpoint (step 9)", "95 % bootstrap interval",
      "skipped in train: 4 of 9 triplets", "skipped in val: dress 3 of 23 queries",
      "Recall at every cut-off", "Course of the training", "Found", "Missed", "Attention",
    ):  # fmt: skip
      assert part in text, part

  def test_every_recall_stands_with_its_interval(self, written):
    _, _, results, page = written
    assert len(results.summary.protocols) == 2
    for part in (results, *results.beside):
      for recalls in (*part.summary.protocols.values(), *part.summary.by_query.values()):
        for name, value in recalls.percent.items():
          low, high = recalls.intervals[name]
          assert f"{value:.2f} {low:.1f}-{high:.1f}" in page.text

  def test_the_whole_configuration_is_in_it(self, written):
    text = written[-1].text
    for part in ("optimizer.learning_rate 3e-05", 'model.backbone.name "swin_large"',
                 'data.root "nowhere"', "preset crn"):  # fmt: skip
      assert part in text, part


def test_texts_of_the_user_are_escaped(tmp_path):
  config = made_up.config()
  config.name = "<script>alert(1)</script>"
  config.data.root = '"><img src=x>'
  data = made_up.dataset(made_up.split(tmp_path, "<b>dress"))
  workdir, _ = write(tmp_path, config, data, made_up.evaluation(config, data))
  page = Page(workdir / "report.html")
  assert "script" not in page.tags
  assert "b" not in page.tags
  assert "x" not in page.links
  assert "<script>alert(1)</script>: composed image retrieval" in page.text


@pytest.mark.parametrize("preset", ["crn", "crn_released"])
def test_files_of_either_preset(tmp_path, preset):
  config = made_up.config(preset)
  data = made_up.dataset(made_up.split(tmp_path))
  evaluation = made_up.evaluation(config, data)
  workdir, paths = write(tmp_path, config, data, evaluation)
  assert json.loads((workdir / "eval.json").read_text()) == json.loads(
    json.dumps(evaluation.results.to_json())
  )
  assert sorted(p.name for p in paths) == [
    "attention_dress.png", "eval.json", "loss_curves.png", "recall_curve.png", "report.html",
    "retrieval_dress.png", "retrieval_dress_found.png", "retrieval_dress_missed.png",
  ]  # fmt: skip
  for path in paths:
    assert path.stat().st_size
    if path.suffix == ".png":
      Image.open(path).verify()


def test_pictures_of_an_earlier_evaluation_do_not_stay(tmp_path):
  config = made_up.config()
  data = made_up.dataset(made_up.split(tmp_path))
  evaluation = made_up.evaluation(config, data)
  workdir, _ = write(tmp_path, config, data, evaluation)
  (workdir / "pictures" / "mine.png").touch()
  for kinds in evaluation.outcomes["dress"].values():
    kinds["composed"].ranks[:] = 0  # Now everything is found, and nothing left that was missed.
  write(tmp_path, config, data, evaluation)
  names = {p.name for p in (workdir / "pictures").iterdir()}
  assert "retrieval_dress_missed.png" not in names
  assert {"retrieval_dress_found.png", "mine.png"} <= names


def test_a_run_without_records_has_no_curves_of_its_training(tmp_path):
  config = made_up.config()
  data = made_up.dataset(made_up.split(tmp_path))
  _, paths = write(tmp_path, config, data, made_up.evaluation(config, data), history=False)
  assert "loss_curves.png" not in {p.name for p in paths}


def test_a_picture_that_cannot_be_drawn_costs_no_results(tmp_path, monkeypatch, caplog):
  config = made_up.config()
  data = made_up.dataset(made_up.split(tmp_path))
  evaluation = made_up.evaluation(config, data)

  def fail(*args, **kwargs):
    raise RuntimeError("no ink")

  monkeypatch.setattr(report.grid, "retrieval_grid", fail)
  workdir, paths = write(tmp_path, config, data, evaluation)
  assert json.loads((workdir / "eval.json").read_text())["n_queries"] == 20
  assert {p.name for p in paths} == {
    "eval.json", "report.html", "recall_curve.png", "loss_curves.png", "attention_dress.png"
  }  # fmt: skip
  assert "retrieval_dress.png: not drawn (RuntimeError: no ink)" in caplog.text


def test_a_method_without_attention_has_no_picture_of_it(tmp_path):
  config = made_up.config()
  data = made_up.dataset(made_up.split(tmp_path))
  evaluation = made_up.evaluation(config, data)
  (shown,) = made_up.cases(config, data, evaluation)
  shown = dataclasses.replace(shown, attention={})
  paths = report.write(
    config, tmp_path, evaluation.results, evaluation.outcomes, [shown], made_up.vocabulary(config)
  )
  assert not any("attention" in p.name for p in paths)


class TestRecallCurves:
  def curves(self, *splits):
    config = made_up.config()
    data = made_up.dataset(*splits)
    evaluation = made_up.evaluation(config, data)
    found = report.recall_curves(config, evaluation.outcomes, splits, "val_split")
    return found, evaluation.results.summary.protocols

  def test_both_protocols_and_all_kinds_of_query(self, tmp_path):
    found, results = self.curves(made_up.split(tmp_path))
    assert [c.label for c in found] == [
      "composed, val_split (gallery 25)", "composed, original_split (gallery 30)",
      "image only, val_split (gallery 25)", "text only, val_split (gallery 25)",
    ]  # fmt: skip
    assert [len(c.recalls) for c in found] == [25, 30, 25, 25]
    assert found[0].recalls[9] == pytest.approx(results["val_split"].percent["R@10"])
    assert found[1].recalls[0] == pytest.approx(results["original_split"].percent["R@1"])
    for curve in found:
      low, high = curve.intervals.T
      assert (low <= curve.recalls).all()
      assert (curve.recalls <= high).all()

  def test_protocols_with_the_same_gallery_share_a_curve(self, tmp_path):
    split = made_up.split(tmp_path)
    split.galleries["original_split"] = split.galleries["val_split"][::-1]
    found, _ = self.curves(split)
    assert [c.label for c in found][:2] == [
      "composed, val_split = original_split (gallery 25)", "image only, val_split (gallery 25)"
    ]  # fmt: skip

  def test_several_categories_are_averaged(self, tmp_path):
    dress, shirt = made_up.split(tmp_path, "dress"), made_up.split(tmp_path, "shirt")
    shirt.galleries["val_split"] = shirt.galleries["val_split"][:12]
    found, results = self.curves(dress, shirt)
    assert len(found[0].recalls) == 12  # As far as the smallest gallery goes.
    assert found[0].recalls[9] == pytest.approx(results["val_split"].percent["R@10"])
