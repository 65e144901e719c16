"""Results: what eval.json holds, and back."""

import dataclasses
import json

import pytest

from crn_jax.errors import UserError
from crn_jax.reports.results import Recalls, Results, Summary
from tests import made_up


@pytest.fixture
def results(tmp_path):
  config = made_up.config()
  splits = made_up.split(tmp_path, "dress"), made_up.split(tmp_path, "shirt")
  data = made_up.dataset(*splits, skipped={"train": {"triplets": 1}}, ceilings={"image_only": 3.0})
  found = made_up.evaluation(config, data).results
  return dataclasses.replace(found, also="best", beside=(found,))


def test_what_is_written_is_read_back(results):
  content = json.loads(json.dumps(results.to_json()))
  assert Results.from_json(content) == results
  assert content["protocols"]["val_split"]["gallery"] == 50
  assert set(content["categories"]) == {"dress", "shirt"}
  assert content["beside"][0]["n_queries"] == 40


def test_what_is_empty_is_not_written(results):
  content = dataclasses.replace(results, also=None, beside=(), categories={}, skipped={}).to_json()
  assert not {"also", "beside", "categories", "skipped"} & content.keys()


@pytest.mark.parametrize("name", ["captions", "by_query", "n_queries"])
def test_an_older_version_is_told_by_what_is_missing(results, name):
  content = {k: v for k, v in results.to_json().items() if k != name}
  with pytest.raises(UserError, match=f"lacks {name}, so an older version wrote it"):
    Results.from_json(content)


def test_an_unknown_best_metric_lists_what_there_is():
  summary = Summary(1, {"val_split": Recalls({"R@1": 1.0}, {"R@1": (0, 2)}, {"gallery": 3})}, {})
  results = Results("x", 1, "last", "joined", True, "val_split/R@7", "val_split", summary)
  with pytest.raises(UserError, match=r"val_split/R@7.*val_split/R@1"):
    _ = results.best_value
