"""Subsets, several right images and references that are kept: from the folder to the page."""

import dataclasses
import html
import json

import numpy as np
import pytest

from configs import circo, cirr
from crn_jax import configuration, evaluate
from crn_jax.errors import UserError
from crn_jax.input_pipeline import registry
from crn_jax.reports import compare, report, tables
from crn_jax.reports.results import Results
from crn_jax.retrieval import ranking
from crn_jax.workdir import run
from tests import cir_folders, made_up

# Percentages of at most 12 queries, each computed by few operations in float64.
EXACT = {"rtol": 1e-12}
CONFIGS = {"cirr": cirr, "circo": circo}


def configured(name, root):
  config = CONFIGS[name].get_config()
  config.data.update(root=str(root), image_size=32, resize=32)
  configuration.check(config)
  return config


@pytest.fixture(scope="module", params=["cirr", "circo"])
def evaluated(request, tmp_path_factory):
  """(configuration, data set, evaluation) with made-up vectors."""
  folder = tmp_path_factory.mktemp("data")
  config = configured(request.param, getattr(cir_folders, request.param)(folder))
  data = registry.open_dataset(config.data, train=False)
  return config, data, made_up.evaluation(config, data)


def rankings(vectors, images, split, protocol, keep):
  """[queries][...] rows of the gallery, best first, without the reference unless it is kept."""
  rows = split.galleries[protocol]
  order = rows[np.argsort(-(vectors @ images[rows].T), axis=1, kind="stable")]
  references = split.queries.reference
  return [[r for r in o if keep or r != ref] for o, ref in zip(order, references, strict=True)]


def test_metrics_are_their_definitions_on_sorted_lists(evaluated):
  """The server's way: sort everything, take out the reference, keep the members of the group."""
  config, data, found = evaluated
  (split,) = data.evals
  ((protocol, recalls),) = found.results.summary.protocols.items()
  encoded = found.encoded[split.name]
  ranked = rankings(
    encoded.composed, encoded.images, split, protocol, keep=split.truths is not None
  )
  target = split.queries.target
  for k in config.eval.recall_at:
    hits = [t in r[:k] for r, t in zip(ranked, target, strict=True)]
    np.testing.assert_allclose(recalls.percent[f"R@{k}"], 100 * np.mean(hits), **EXACT)
  if split.subsets is not None:
    within = [[r for r in o if r in s] for o, s in zip(ranked, split.subsets, strict=True)]
    for k in (1, 2, 3):
      hits = [t in r[:k] for r, t in zip(within, target, strict=True)]
      np.testing.assert_allclose(recalls.percent[f"Rsub@{k}"], 100 * np.mean(hits), **EXACT)
    mean = (recalls.percent["R@5"] + recalls.percent["Rsub@1"]) / 2
    np.testing.assert_allclose(recalls.percent["mean"], mean, **EXACT)
  if split.truths is not None:
    for k in (5, 10, 25, 50):
      each = []
      for order, truths in zip(ranked, split.truths, strict=True):
        right = [r in truths[truths >= 0] for r in order[:k]]
        at = [sum(right[: i + 1]) / (i + 1) for i, r in enumerate(right) if r]
        each.append(sum(at) / min((truths >= 0).sum(), k))
      np.testing.assert_allclose(recalls.percent[f"mAP@{k}"], 100 * np.mean(each), **EXACT)


def test_every_metric_has_an_interval_and_is_given_by_query(evaluated):
  config, _, found = evaluated
  summary = found.results.summary
  spec = registry.DATASETS[config.data.dataset]
  for recalls in (*summary.protocols.values(), *summary.by_query.values()):
    assert list(recalls.percent) == found.results.metrics
    for name, value in recalls.percent.items():
      low, high = recalls.intervals[name]
      assert 0 <= low <= value <= high <= 100
  assert ("Rsub@1" in found.results.metrics) == spec.has_subsets
  assert ("mAP@10" in found.results.metrics) == spec.has_truths


def test_the_best_checkpoint_can_be_chosen_by_them(evaluated):
  config, _, found = evaluated
  protocol, _, metric = config.eval.best_metric.partition("/")
  assert metric in ("mean", "mAP@10")
  assert found.results.best_value == found.results.summary.protocols[protocol].percent[metric]
  assert f"eval/{config.eval.best_metric}" in found.results.scalars()


def test_eval_json_holds_them(evaluated):
  _, _, found = evaluated
  content = json.loads(json.dumps(found.results.to_json()))
  assert Results.from_json(content) == found.results
  ((_, protocol),) = content["protocols"].items()
  assert protocol["reference"] == {"cirr": "excluded", "circo": "kept"}[content["dataset"]]
  assert set(found.results.metrics) < set(protocol)


def test_tables_and_page_show_and_explain_them(evaluated, tmp_path):
  config, data, found = evaluated
  shown = made_up.cases(config, data, found)
  vocabulary = made_up.vocabulary(config)
  report.write(config, tmp_path, found.results, found.outcomes, shown, vocabulary)
  page = html.unescape((tmp_path / "report.html").read_text())
  text = tables.results_as_text(found.results)
  reference, *expected = {
    "cirr": (
      "reference image excluded from its ranking", "Rsub@3", "mean", "recall among the images of",
      "mean: of R@5 and Rsub@1", "cirr_val ranks the images of split.rc2.val.json",
      "reference excluded",
    ),
    "circo": (
      "reference image kept in its ranking", "mAP@25", "mAP@K: mean over queries of the precision",
      "coco_unlabeled ranks all images", "reference kept",
    ),
  }[data.name]  # fmt: skip
  assert "Metrics in percent" in text and "Metrics in percent" in page
  for part in (reference, *expected[:-1]):
    assert part in text, part
    assert part in page, part
  title = report.title(data.evals[0], next(iter(registry.DATASETS[data.name].protocols)),
                       found.results)  # fmt: skip
  assert expected[-1] in title


def test_runs_are_compared_by_them(evaluated, tmp_path):
  config, _, found = evaluated
  for name in ("a", "b"):
    run.save_config(config, tmp_path / name)
    content = dataclasses.replace(found.results, also="best").to_json()
    run.write_json(content, tmp_path / name / "eval.json")
  text = compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
  assert "WARNING" not in text
  lines = [line.split()[0] for line in text.splitlines() if line.strip()]
  first = lines.index("gallery") + 1
  assert lines[first : first + len(found.results.metrics)] == found.results.metrics


@pytest.mark.parametrize("name", CONFIGS)
def test_another_metric_is_refused_with_those_there_are(name):
  config = CONFIGS[name].get_config()
  protocol = config.eval.best_metric.partition("/")[0]
  config.eval.best_metric = f"{protocol}/Rsub@9"
  last = {"cirr": "Rsub@3 or mean", "circo": "mAP@25 or mAP@50"}[name]
  with pytest.raises(UserError, match=f"expected R@1 or .* or {last} behind the slash"):
    configuration.check(config)
  config.eval.recall_at = (1, 10)  # The mean of CIRR is of R@5.
  config.eval.best_metric = f"{protocol}/mean"
  with pytest.raises(UserError, match="behind the slash"):
    configuration.check(config)


class TestReference:
  """One run reports FashionIQ with and without the query's own reference image."""

  @pytest.fixture
  def split(self, tmp_path):
    split = made_up.split(tmp_path)
    galleries = split.galleries | {"original_with_reference": split.galleries["original_split"]}
    kept = {"original_with_reference": True}
    return dataclasses.replace(split, galleries=galleries, ranks_reference=kept)

  def test_both_are_ranked_in_one_run(self, split):
    config = made_up.config()
    ranks, kept = {}, {}
    for exclude in (True, False):
      config.eval.exclude_reference = exclude
      found = made_up.evaluation(config, made_up.dataset(split))
      outcomes = found.outcomes["dress"]
      ranks[exclude] = outcomes["original_split"]["composed"].ranks
      kept[exclude] = outcomes["original_with_reference"]["composed"].ranks
      encoded = found.encoded["dress"]
    # The option is that of the other protocols.
    np.testing.assert_array_equal(kept[True], kept[False])
    np.testing.assert_array_equal(kept[True], ranks[False])
    scores = encoded.composed @ encoded.images.T
    rows = np.arange(len(scores))
    ahead = scores[rows, split.queries.reference] > scores[rows, split.queries.target]
    assert 0 < ahead.sum() < len(ahead)
    np.testing.assert_array_equal(kept[True] - ranks[True], ahead)

  def test_results_say_which_is_which(self, split):
    config = made_up.config()
    results = made_up.evaluation(config, made_up.dataset(split)).results
    assert "reference image excluded from its ranking (kept in original_with_reference)." in (
      tables.describe(results)
    )
    content = results.to_json()["protocols"]
    assert content["original_with_reference"]["reference"] == "kept"
    assert "reference" not in content["val_split"]  # As ever: `exclude_reference` says it.
    titles = [report.title(split, p, results) for p in split.galleries]
    assert ["reference kept" in title for title in titles] == [False, False, True]
    config.eval.exclude_reference = False
    results = made_up.evaluation(config, made_up.dataset(split)).results
    assert tables.describe(results).endswith("reference image kept in its ranking.")

  def test_their_curves_are_drawn_apart_unless_they_are_the_same(self, split):
    config, labels = made_up.config(), {}
    for exclude in (True, False):
      config.eval.exclude_reference = exclude
      outcomes = made_up.evaluation(config, made_up.dataset(split)).outcomes
      found = report.recall_curves(config, outcomes, [split], "val_split")
      labels[exclude] = [c.label for c in found if c.label.startswith("composed, original")]
    assert labels[True] == [
      "composed, original_split (gallery 30)", "composed, original_with_reference (gallery 30)"
    ]  # fmt: skip
    assert labels[False] == ["composed, original_split = original_with_reference (gallery 30)"]

  def test_results_of_before_can_be_read_and_compared(self, split, tmp_path):
    """eval.json of a version that knew two protocols, beside one of today."""
    config = made_up.config()
    new = dataclasses.replace(
      made_up.evaluation(config, made_up.dataset(split)).results, also="best"
    )
    old = json.loads(json.dumps(new.to_json()))
    del old["protocols"]["original_with_reference"]
    assert Results.from_json(old).describe_reference() == "excluded"
    for name, content in (("new", new.to_json()), ("old", old)):
      run.save_config(config, tmp_path / name)
      run.write_json(content, tmp_path / name / "eval.json")
    text = compare.compare([tmp_path / "old", tmp_path / "new"], tmp_path / "out")
    assert "uses of the reference" not in text
    warning = "the galleries of original_with_reference differ: not measured in old, 30 in new"
    assert text.count("WARNING") == 1 and warning in text


def test_grids_mark_all_right_images(evaluated):
  config, data, found = evaluated
  (split,) = data.evals
  (cases,) = made_up.cases(config, data, found)
  marked = 0
  for query, row in zip(cases.groups["all"], cases.grid_rows("all"), strict=True):
    truths = () if split.truths is None else split.truths[query]
    right = {split.image_paths[t] for t in truths if t >= 0} - {row.target}
    expected = tuple(i for i, (path, _) in enumerate(row.top) if path in right)
    assert row.also_right == expected
    assert (row.target_position is None) == (row.rank >= 10)
    marked += len(expected)
  assert (marked > 0) == (split.truths is not None)


def test_scores_beside_the_vectors_count_in_every_metric(evaluated, monkeypatch):
  """As if they had been two more columns of the vectors; queries are taken a few at a time."""
  config, data, found = evaluated
  (split,) = data.evals
  encoded = found.encoded[split.name]
  rng = np.random.default_rng(5)
  queries, images = (
    rng.normal(size=(len(v), 2)).astype(np.float32) for v in (encoded.composed, encoded.images)
  )
  whole = dataclasses.replace(
    encoded,
    images=np.hstack([encoded.images, images]),
    composed=np.hstack([encoded.composed, queries]),
    text_only=np.hstack([encoded.text_only, np.zeros_like(queries)]),
  )
  parts = dataclasses.replace(encoded, added={"composed": lambda rows: queries[rows] @ images.T})
  monkeypatch.setattr(ranking, "BLOCK_SIZE", 2)
  monkeypatch.setattr(evaluate, "_ADDED_BYTES", 1)
  ((protocol, expected),) = evaluate.find(whole, split, config).items()
  outcome = evaluate.find(parts, split, config)[protocol]["composed"]
  assert len(outcome) == len(split.queries) > 2
  for field in dataclasses.fields(outcome):
    np.testing.assert_array_equal(
      getattr(outcome, field.name), getattr(expected["composed"], field.name)
    )
  plain = found.outcomes[split.name][protocol]
  assert np.any(outcome.ranks != plain["composed"].ranks)


def test_references_are_left_out_as_the_protocol_says(evaluated):
  config, data, _ = evaluated
  (split,) = data.evals
  for exclude in (True, False):
    config.eval.exclude_reference = exclude
    positions = evaluate.excluded_positions(split, evaluate.breakdown_protocol(config), config)
    assert (positions == -1).all() == (data.name == "circo")
