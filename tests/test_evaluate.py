import dataclasses

import numpy as np
import pytest

from configs import default
from crn_jax import evaluate
from crn_jax.input_pipeline.dataset import EvalSplit, Triplets
from crn_jax.retrieval.encode import Encoded


def unit(*angles):
  """Points on the circle: the closer the angles, the higher the score."""
  return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.fixture
def config():
  c = default.get_config()
  c.eval.recall_at = (1, 2, 3)
  return c


@pytest.fixture
def split():
  """Five images at angles 0 .. 0.4; image 4 is in the whole list only."""
  return EvalSplit(
    name="dress",
    image_ids=tuple("abcde"),
    image_paths=tuple("abcde"),
    queries=Triplets(
      np.array([0, 1], np.int32),
      np.array([2, 3], np.int32),
      (("x",), ("y",)),
      ("modification", "auxiliary"),
    ),
    galleries={"val_split": np.array([0, 2, 1, 3]), "original_split": np.arange(5)},
  )


def encoded(*query_angles):
  return Encoded(unit(0.0, 0.1, 0.2, 0.3, 0.4), unit(*query_angles), unit(*query_angles))


def summarize(vectors, split, config):
  ranks = {split.name: evaluate.find(vectors, split, config)}
  return evaluate.summarize([split], ranks, config)


def recalls(part):
  return dict(part.percent)


def test_both_protocols_are_ranked_in_one_run(config, split):
  # Query 0 lies on its target; query 1 beyond image 4, which only the whole list holds.
  results = summarize(encoded(0.2, 0.45), split, config)
  assert results.n_queries == 2
  found = {name: (p.counts["gallery"], recalls(p)) for name, p in results.protocols.items()}
  assert found["val_split"] == (4, {"R@1": 100, "R@2": 100, "R@3": 100})
  assert found["original_split"] == (5, {"R@1": 50, "R@2": 100, "R@3": 100})


def test_the_reference_is_excluded_if_the_config_says_so(config, split):
  at_the_reference = encoded(0.0, 0.1)
  excluded = summarize(at_the_reference, split, config)
  config.eval.exclude_reference = False
  kept = summarize(at_the_reference, split, config)
  assert excluded.protocols["val_split"].percent["R@2"] == 50  # query 0: image 1, then the target
  assert kept.protocols["val_split"].percent["R@2"] == 0


def test_image_only_queries_are_the_reference_images(config, split):
  results = summarize(encoded(0.2, 0.3), split, config)
  assert results.by_query["composed"].percent["R@1"] == 100
  assert results.by_query["image_only"].percent["R@1"] == 0
  assert set(results.by_query) == {"composed", "image_only", "text_only"}


def test_recall_by_kind_of_text(config, split):
  results = summarize(encoded(0.2, 0.0), split, config)
  modification = results.by_text_kind["modification"]
  assert modification.counts["n_queries"] == 1
  assert recalls(modification) == {"R@1": 100, "R@2": 100, "R@3": 100}
  assert results.by_text_kind["auxiliary"].percent["R@1"] == 0


def test_several_splits_are_averaged_and_their_counts_summed(config, split):
  other = dataclasses.replace(split, name="shirt")
  ranks = {
    "dress": evaluate.find(encoded(0.2, 0.3), split, config),
    "shirt": evaluate.find(encoded(0.2, 0.0), other, config),
  }
  results = evaluate.summarize([split, other], ranks, config)
  assert results.n_queries == 4
  assert results.protocols["val_split"].counts["gallery"] == 8
  assert results.protocols["val_split"].percent["R@1"] == 75  # the mean of 100 and 50
  assert results.by_text_kind["auxiliary"].counts["n_queries"] == 2


def test_every_recall_has_an_interval_around_it(config, split):
  results = summarize(encoded(0.2, 0.0), split, config)
  parts = [*results.protocols.values(), *results.by_query.values()]
  for part in parts:
    for name, value in recalls(part).items():
      low, high = part.intervals[name]
      assert low <= value <= high
