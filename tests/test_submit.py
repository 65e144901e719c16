"""CIRR and CIRCO end to end: a tiny CRN trained, evaluated on both, its files for the servers."""

import json
import shutil

import numpy as np
import pytest

from configs import circo, cirr, zero_shot
from crn_jax import pretrained, submit, train
from crn_jax.convert import backbone
from crn_jax.errors import UserError
from crn_jax.input_pipeline.dataset import EvalSplit, SubmissionFile, Triplets
from crn_jax.input_pipeline.registry import DATASETS
from crn_jax.workdir import run
from tests import cir_folders, small_towers, tiny


def small(config, root):
  """As `tiny.config`, of another data set."""
  like = tiny.config(root)
  for name in ("model", "optimizer"):
    config[name] = like[name]
  config.update(num_epochs=1, batch_size=16)
  config.data.update(root=str(root), max_words=12, image_size=32, resize=32)
  config.eval.batch_size = 16
  return config


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  return {name: getattr(cir_folders, name)(folder / name) for name in ("cirr", "circo")}


@pytest.fixture(scope="module")
def configs(roots):
  return {
    "cirr": small(cirr.get_config(), roots["cirr"]),
    "circo": small(circo.get_config(), roots["circo"]),
  }


@pytest.fixture(scope="module")
def trained(quick_compile, configs, tmp_path_factory):
  """A run on CIRR, and what it showed."""
  del quick_compile
  workdir = tmp_path_factory.mktemp("run") / "a"
  return workdir, train.train(configs["cirr"], workdir)


def read(path):
  return json.loads(path.read_text())


def test_a_run_on_cirr_reports_both_rankings(trained):
  workdir, shown = trained
  results = read(workdir / "eval.json")
  assert results["best_metric"] == "cirr_val/mean"
  recalls = results["protocols"]["cirr_val"]
  assert recalls["R@50"] == 100  # Of 18 images.
  assert {"R@5", "Rsub@1", "Rsub@3", "mean"} < set(recalls)
  assert "Rsub@K: recall among the images of the query's subset." in shown
  assert (workdir / "pictures" / "retrieval_cirr.png").exists()


def test_it_is_evaluated_on_circo_beside_its_own_results(trained, configs):
  workdir, _ = trained
  own = (workdir / "eval.json").read_bytes()
  shown = train.evaluate_run(configs["circo"], workdir, "best")
  assert (workdir / "eval.json").read_bytes() == own
  results = read(workdir / "other_data" / "circo" / "eval.json")
  assert results["dataset"] == "circo"
  assert set(results["protocols"]["coco_unlabeled"]) >= {"mAP@5", "mAP@50", "R@10"}
  # The checkpoint was not chosen on these queries, nor by what they measure.
  assert "chosen by cirr_val/mean on other queries" in shown
  assert (workdir / "other_data" / "circo" / "report.html").exists()


def test_another_model_is_still_refused(trained, configs):
  other = configs["circo"].copy_and_resolve_references()
  other.data.max_words = 9
  with pytest.raises(UserError, match="data.max_words: 12 in the run, 9 now"):
    train.evaluate_run(other, trained[0], "best")


def test_overwriting_removes_what_was_found_elsewhere(trained, configs, tmp_path):
  copy = shutil.copytree(trained[0], tmp_path / "copy")
  for name in ("other_data/circo", "submission", "notes"):
    (copy / name).mkdir(parents=True, exist_ok=True)
  run.remove(copy)
  assert {path.name for path in copy.iterdir()} == {"notes", ".lock"}


def test_the_files_of_cirr_are_what_its_server_takes(trained, configs, roots):
  workdir, _ = trained
  shown = submit.submit(configs["cirr"], workdir, "last")
  recall = read(workdir / "submission" / "cirr_recall.json")
  subset = read(workdir / "submission" / "cirr_recall_subset.json")
  assert str(workdir / "submission" / "cirr_recall_subset.json") in shown
  assert "cirr.cecs.anu.edu.au" in shown
  pairs = read(roots["cirr"] / "captions/cap.rc2.test1.json")
  assert (recall.pop("version"), recall.pop("metric")) == ("rc2", "recall")
  assert (subset.pop("version"), subset.pop("metric")) == ("rc2", "recall_subset")
  assert set(recall) == set(subset) == {str(p["pairid"]) for p in pairs}
  names = set(read(roots["cirr"] / "image_splits/split.rc2.test1.json"))
  for pair in pairs:
    ranked, within = recall[str(pair["pairid"])], subset[str(pair["pairid"])]
    assert len(ranked) == len(set(ranked)) == 50
    assert set(ranked) <= names - {pair["reference"]}
    assert len(within) == len(set(within)) == 3
    assert set(within) <= set(pair["img_set"]["members"]) - {pair["reference"]}
    # Both are parts of one ranking.
    inside = [name for name in ranked if name in within]
    assert inside == within[: len(inside)]


def test_the_file_of_circo_is_what_its_server_takes(trained, configs, roots):
  workdir, _ = trained
  submit.submit(configs["circo"], workdir, "best")
  answers = read(workdir / "submission" / "circo.json")
  assert list(answers) == [str(q["id"]) for q in read(roots["circo"] / "annotations/test.json")]
  coco = roots["circo"] / "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
  ids = {image["id"] for image in read(coco)["images"]}
  for ranked in answers.values():
    assert len(ranked) == len(set(ranked)) == 50
    assert all(type(i) is int for i in ranked) and set(ranked) <= ids


def test_data_that_lack_a_query_cannot_be_submitted(trained, configs, roots, tmp_path):
  """With on_missing = 'skip', too: a server wants every query."""
  root = shutil.copytree(roots["cirr"], tmp_path / "cirr")
  reference = read(root / "captions/cap.rc2.test1.json")[0]["reference"]
  (root / f"img_raw/test1/{reference}.png").unlink()
  config = configs["cirr"].copy_and_resolve_references()
  config.data.update(root=str(root), on_missing="skip")
  with pytest.raises(UserError, match=reference):
    submit.submit(config, trained[0], "last")


def test_a_data_set_without_a_server_is_refused(tmp_path):
  config = tiny.config(tmp_path)
  with pytest.raises(UserError, match="'fashioniq' has no server to submit to; cirr, circo have"):
    submit.submit(config, tmp_path, "best")


def test_a_folder_without_a_run_is_refused(configs, tmp_path):
  with pytest.raises(UserError, match="holds no trained run"):
    submit.submit(configs["circo"], tmp_path, "best")


# --- Rankings and the check of files, on made-up vectors.


@pytest.fixture
def split():
  """Four queries, 60 images, of which each query's own six are its group."""
  rng = np.random.default_rng(0)
  reference = np.arange(4, dtype=np.int32)
  groups = np.stack([rng.permutation(np.arange(4, 60))[:5] for _ in reference]).astype(np.int32)
  return EvalSplit(
    name="cirr",
    image_ids=tuple(map(str, 1000 + rng.permutation(60))),
    image_paths=("",) * 60,
    queries=Triplets(reference, np.full(4, -1, np.int32), (("x",),) * 4),
    galleries={"test": np.arange(60, dtype=np.int32)},
    ranks_reference={"test": False},
    subsets=groups,
    query_ids=("12", "7", "30", "4"),
  )


FILES = (*DATASETS["cirr"].submission.files, *DATASETS["circo"].submission.files)


@pytest.fixture
def vectors():
  rng = np.random.default_rng(1)
  return [rng.normal(size=(n, 8)).astype(np.float32) for n in (4, 60)]


def test_answers_are_the_sorted_scores(split, vectors):
  queries, images = vectors
  (_, recall), (_, subset), (_, numbers) = submit.answers(split, queries, images, FILES)
  order = np.argsort(-(queries @ images.T), axis=1, kind="stable")
  for q, query in enumerate(split.query_ids):
    rows = [row for row in order[q] if row != split.queries.reference[q]]
    assert recall[query] == [split.image_ids[row] for row in rows[:50]]
    assert numbers[query] == [int(split.image_ids[row]) for row in rows[:50]]
    within = [row for row in rows if row in split.subsets[q]]
    assert subset[query] == [split.image_ids[row] for row in within[:3]]


def test_answers_are_those_of_all_scores(split, vectors):
  """What is added to the products counts in every file."""
  queries, images = vectors
  added = np.random.default_rng(2).normal(size=(4, 60)).astype(np.float32)
  found = submit.answers(split, queries, images, FILES, added)
  # The same as products alone: a column of its own for each query.
  wide = [np.hstack([queries, np.eye(4)]), np.hstack([images, added.T])]
  assert found == submit.answers(split, *wide, FILES)
  assert found != submit.answers(split, queries, images, FILES)


def test_what_is_written_passes_the_check_and_is_all_or_nothing(split, vectors, tmp_path):
  contents = submit.answers(split, *vectors, FILES)
  assert [submit.problems(c, f, split) for f, c in contents] == [[], [], []]
  paths = submit.write(contents, split, tmp_path / "new" / "submission")
  assert [read(path) for path in paths] == [content for _, content in contents]
  del contents[1][1]["7"]
  with pytest.raises(UserError, match="cirr_recall_subset.json: .*nothing is written:\n  query 7"):
    submit.write(contents, split, tmp_path / "other")
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
@pytest.mark.parametrize(
  ("spoil", "expected"),
  [
    (lambda c: c.pop("7"), "query 7: has no answer"),
    (lambda c: c.update({"8": c["7"]}), "8: no query has this id"),
    (lambda c: c["7"].pop(), "query 7: expected {} images, found {}"),
    (lambda c: c["7"].append(c["7"][0]), "query 7: expected {} images, found {}"),
    (lambda c: c["7"].__setitem__(0, c["7"][1]), "query 7: names {} twice"),
    (lambda c: c.update({"7": "all"}), "query 7: expected a list of"),
    (lambda c: c["7"].__setitem__(2, None), "query 7: expected a list of"),
    (lambda c: c["7"].__setitem__(2, 1.0), "query 7: expected a list of"),
    (lambda c: c["7"].__setitem__(2, type(c["7"][0])(5)), "query 7: 5 is none of the"),
    (lambda c: c["7"].__setitem__(2, "reference"), "query 7: {} is none of the"),
  ],
)
def test_the_check_finds(split, vectors, file, spoil, expected):
  ((_, content),) = submit.answers(split, *vectors, [file])
  spoil(content)
  for query in split.query_ids:
    if isinstance(content.get(query), list):
      own = split.image_ids[split.queries.reference[split.query_ids.index(query)]]
      name = int(own) if file.integers else own
      content[query] = [name if i == "reference" else i for i in content[query]]
  (found,) = submit.problems(content, file, split)
  start, _, end = expected.partition("{}")
  assert found.startswith(start) and end.rpartition("{}")[0] in found


def test_the_check_finds_other_headers_and_other_kinds(split, vectors):
  ((file, content),) = submit.answers(split, *vectors, FILES[:1])
  assert submit.problems(content | {"version": "rc1"}, file, split) == [
    "version: expected 'rc2', found 'rc1'"
  ]
  other = {k: v for k, v in content.items() if k != "metric"}
  assert submit.problems(other, file, split) == ["metric: expected 'recall', found None"]
  assert submit.problems([content], file, split)[0].startswith("expected an object")
  numbers = content | {"7": [int(name) for name in content["7"]]}
  assert submit.problems(numbers, file, split)[0].startswith("query 7: expected a list of str")


def test_an_image_outside_the_group_is_found(split, vectors):
  ((file, content),) = submit.answers(split, *vectors, FILES[1:2])
  outside = next(r for r in range(60) if r not in split.subsets[1] and r != 1)
  content["7"][0] = split.image_ids[outside]
  (found,) = submit.problems(content, file, split)
  assert found == f"query 7: {split.image_ids[outside]} is none of the 5 images that are ranked"


def test_a_gallery_that_is_too_small_is_not_written(split, vectors, tmp_path):
  file = SubmissionFile("more.json", 61)
  contents = submit.answers(split, *vectors, [file])
  with pytest.raises(UserError, match="query 12: expected 61 images, found 60"):
    submit.write(contents, split, tmp_path)


@pytest.mark.parametrize(("name", "files"), [("cirr", 2), ("circo", 1)])
def test_pretrained_towers_answer_without_a_run(name, files, roots, tmp_path):
  """Evaluated and submitted with no training: config and folder of weights are enough."""
  small_towers.save("clip", tmp_path / "clip")
  backbone.convert(tmp_path / "clip", tmp_path / "weights")
  config = zero_shot.get_config(name)
  config.model.pretrained, config.data.root = str(tmp_path / "weights"), str(roots[name])
  config.eval.batch_size = 16
  pretrained.describe(config)
  shown = train.evaluate_run(config, tmp_path / "results", "best")
  assert "the pretrained weights, without any training" in shown
  said = submit.submit(config, tmp_path / "results", "best")
  assert "without any training" in said
  written = list((tmp_path / "results" / "submission").iterdir())
  assert len(written) == files
  assert all(read(path) for path in written)
