"""Training against a PyTorch model of the tests' own, for weights and inputs of several seeds.

The goldens (test_train_parity) are one set of weights and inputs at Swin-L's widths. Here the
widths are small, and image size, window and depths others: 96 pixels, windows of 3, which shift in
three stages, and blocks (1, 2, 2, 1). Three alternating iterations with Adam. float64 is held to
1e-7, float32 to the bounds of `tests/rounding.py`.
"""

import dataclasses

import numpy as np
import pytest

from crn_jax.models import crn
from tests import release, rounding, training
from tests.goldens import recipe
from tests.methods.train_checks import (
  NO_TRUE_GRADIENT,
  assert_gradients_close,
  assert_losses_close,
)

SEEDS = ("first", "second", "third")
ITERATIONS = 3
IMAGE_SIZE, WORDS, BATCH = 96, 7, 4

pytestmark = pytest.mark.slow


def make_config():
  config = release.config()
  config.model.backbone.update(
    embed_dim=32, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), patch_size=4, window_size=3
  )
  config.model.update(feature_dim=64, map_dim=128, word_dim=48)
  return config


def make_problem(seed: str) -> training.Problem:
  """The recipe's weights and inputs, whose seeds are the names with `seed` before them."""

  def batch(i):
    images = {
      key: recipe.image(f"{seed}.train.{name}.{i}", (BATCH, 3, IMAGE_SIZE, IMAGE_SIZE))
      for key, name in (("reference", "src"), ("target", "tgt"))
    }
    tokens = recipe.rng(f"{seed}.train.tokens.{i}").integers(0, release.VOCAB_SIZE, (BATCH, WORDS))
    return images | {"tokens": tokens.astype(np.int32), "token_mask": np.ones_like(tokens, bool)}

  return training.Problem(f"{seed}.", [batch(i) for i in range(ITERATIONS)])


@dataclasses.dataclass
class Results:
  """Ours and the reference's, of one seed; `free_runs` are the reference's in float32."""

  ours: training.Runs
  reference: rounding.Reference
  free_metrics: list[list[dict[str, float]]]
  free_last: list[dict[tuple[str, str], np.ndarray]]

  def update(self, key, last=None) -> np.ndarray:
    """The reference's update of a parameter."""
    return (last or self.reference.last)[key] - self.reference.first[key]

  def trained(self, kind: str) -> list[tuple[str, str]]:
    return [key for key in self.reference.gradient_norms[0] if key[0] == kind]

  def statistics(self, kind: str) -> list[tuple[str, str]]:
    return [key for key in self.reference.last if key[0] == kind and "running_" in key[1]]


@pytest.fixture(scope="module")
def programs():
  return training.Programs(make_config(), make_problem(SEEDS[0]))


@pytest.fixture(scope="module", params=SEEDS)
def results(request, programs):
  problem = make_problem(request.param)
  reference = rounding.follow(make_config(), problem, keep=lambda name: True)
  free = rounding.free_runs(make_config(), problem, reference.sides)
  return Results(training.train(programs, problem, lambda update: update), reference, *free)


def distance(value: np.ndarray, expected: np.ndarray) -> float:
  return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float64_equals_the_reference(results, kind):
  """Losses, gradient norms, updates and running statistics; 1e-7 (measured: 2e-9)."""
  for ours, expected in zip(results.ours.double.metrics, results.reference.metrics, strict=True):
    for name in expected:
      assert ours[name] == pytest.approx(expected[name], rel=1e-7), name
  for ours, expected in zip(
    results.ours.gradient_norms, results.reference.gradient_norms, strict=True
  ):
    for key in results.trained(kind):
      if key not in NO_TRUE_GRADIENT:
        assert ours[key] == pytest.approx(expected[key], rel=1e-7), key
  trained = results.trained(kind)
  for key, update in results.ours.double.updates.items():
    if key in trained:
      # Adam divides what is only rounding noise by its size; a parameter then walks at random.
      if key not in NO_TRUE_GRADIENT:
        assert distance(update, results.update(key)) < 1e-7, key
    elif key[0] == kind:
      assert not update.any(), key
  assert len(results.statistics(kind)) == 28
  for key in results.statistics(kind):
    assert distance(results.ours.double.statistics[key], results.reference.last[key]) < 1e-7, key


@pytest.mark.parametrize("iteration", range(ITERATIONS))
@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_losses_along_the_float64_trajectory(results, kind, iteration):
  assert_losses_close(
    kind, results.ours.forced_metrics[iteration], results.reference.metrics[iteration],
    results.reference.loss_scales[iteration],
  )  # fmt: skip


@pytest.mark.parametrize("iteration", range(ITERATIONS))
@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_gradients_along_the_float64_trajectory(results, kind, iteration):
  assert_gradients_close(
    kind, results.ours.forced_distances[iteration], results.ours.forced_norms[iteration],
    results.reference.gradient_scales[iteration], set(results.trained(kind)),
  )  # fmt: skip


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_trajectory_stays_as_near_as_the_reference(results, kind):
  """Losses, all updates together, running statistics, after three iterations of its own.

  Updates of single parameters say less: an element whose gradient is zero to within rounding is
  moved one way or the other by Adam, and in a small tensor one such element is all of the distance.
  """
  for i, expected in enumerate(results.reference.metrics):
    relative = [{k: run[i][k] / expected[k] - 1 for k in expected} for run in results.free_metrics]
    assert_losses_close(
      kind, results.ours.single.metrics[i], expected, rounding.root_mean_square(relative)
    )
  trained = results.trained(kind)
  update = np.concatenate([results.update(key).ravel() for key in trained])
  ours = np.concatenate([results.ours.single.updates[key].ravel() for key in trained])
  theirs = [
    {"all": distance(np.concatenate([results.update(k, last).ravel() for k in trained]), update)}
    for last in results.free_last
  ]
  scale = rounding.root_mean_square(theirs)["all"]
  assert distance(ours, update) < rounding.SAFETY * scale
  expected = results.reference.last
  keys = results.statistics(kind)
  scales = rounding.root_mean_square(
    [{key: distance(last[key], expected[key]) for key in keys} for last in results.free_last]
  )
  for key in keys:
    apart = distance(results.ours.single.statistics[key], expected[key])
    assert apart < rounding.SAFETY * scales[key], (key, apart, scales[key])
