"""Training against the PyTorch release: three alternating iterations with Adam, both branches.

The goldens (tests/goldens/train_steps.npz) hold the release's float32 run and its float64 run.

In float64 the whole trajectory is held to 1e-7.

In float32 a trajectory is a poor yardstick: Adam's first step is the sign of the gradient, so that
the few gradients that are zero to within rounding move either way. So float32 arithmetic is checked
on equal ground, one update at a time from the states of the float64 trajectory, within the bounds
of `tests/rounding.py`: ten times what a PyTorch model of the tests' own needs from the same states.
That model is held to the goldens, too. The free-running float32 trajectory is held to ten times the
distance of the release's own float32 run to its float64 run.

All float32 updates keep to float64's side of every kink (`tests/kinks.py`). Otherwise one ReLU
whose input is zero to within rounding would change gradients by percents, on some processors.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax.input_pipeline.tokenizers import words
from crn_jax.models import crn
from tests import release, rounding, training
from tests.goldens import recipe
from tests.methods.train_checks import (
  NO_TRUE_GRADIENT,
  assert_gradients_close,
  assert_losses_close,
)
from tests.rounding import SAFETY

FACTS = release.load_json("train_steps.json")
GOLDENS = np.load(release.GOLDENS / "train_steps.npz")
ITERATIONS = 3
# Our names of the release's loss terms.
TERMS = {'class': 'classification', 'img': 'cross_branch', 'mul_kl': 'mutual_kl',
         'perceptual': 'perceptual'}  # fmt: skip
LOSSES = [
  (kind, term) for kind in crn.BRANCHES for term in TERMS if f"{kind}.loss.{term}" in GOLDENS.files
]

pytestmark = pytest.mark.slow


def batch(i: int) -> dict[str, np.ndarray]:
  """Iteration i's batch; the text is padded to the longest of the batch, as the release does."""
  texts = [(text,) for text in FACTS["texts"][i]]
  longest = max(len(words.tokenize(text)) for (text,) in texts)
  vocabulary = words.Vocabulary.build(
    FACTS["texts_to_build_vocab"], markers="words", max_words=longest
  )
  tokens, mask = vocabulary.encode_all(texts)
  images = {
    key: recipe.image(f"train.{name}.{i}", (4, 3, 64, 64))
    for key, name in (("reference", "src"), ("target", "tgt"))
  }
  return images | {"tokens": tokens, "token_mask": mask}


PROBLEM = training.Problem("", [batch(i) for i in range(ITERATIONS)])


def facts(kind: str, *keys: str):
  """Names of the goldens' parameters and, in the same order, values: 'f64.x' is f64.<kind>.x."""
  columns = [
    GOLDENS[f"f64.{kind}.{k.removeprefix('f64.')}" if k.startswith("f64.") else f"{kind}.{k}"]
    for k in keys
  ]
  return [str(n) for n in GOLDENS[f"{kind}.names"]], *columns


def released_losses(i: int, precision: str = "f64.") -> dict[str, float]:
  """The release's losses of iteration i by our names, with their sum."""
  found = {}
  for kind in crn.BRANCHES:
    terms = {
      f"{kind}/{TERMS[t]}": float(GOLDENS[f"{precision}{kind}.loss.{t}"][i])
      for k, t in LOSSES
      if k == kind
    }
    found |= terms | {f"{kind}/total": sum(terms.values())}
  return found


def summarize(update: np.ndarray) -> tuple[float, np.ndarray, bool]:
  """L2 norm, strided sample, and whether any element changed."""
  flat = update.reshape(-1)
  sample = flat[:: -(-flat.size // 24)].copy()
  return float(np.linalg.norm(flat)), sample, bool(flat.any())


@pytest.fixture(scope="module")
def reference() -> rounding.Reference:
  found = rounding.follow(release.config(), PROBLEM, keep=lambda name: False)
  release.release_memory()
  return found


@pytest.fixture(scope="module")
def runs(reference) -> training.Runs:
  """After the reference, whose memory is free by then."""
  del reference
  return training.train(training.Programs(release.config(), PROBLEM), PROBLEM, summarize)


def trained(kind: str) -> set[tuple[str, str]]:
  return {(kind, name) for name, has in zip(*facts(kind, "has_grad"), strict=True) if has}


def test_the_reference_equals_the_release(reference):
  """The tests' PyTorch model in float64: losses and first gradients; 1e-7 relative."""
  for i, metrics in enumerate(reference.metrics):
    assert metrics == pytest.approx(released_losses(i), rel=1e-7)
  for kind in crn.BRANCHES:
    for name, has, norm in zip(*facts(kind, "has_grad", "f64.grad_l2"), strict=True):
      assert ((kind, name) in reference.gradient_norms[0]) == has, name
      if has and (kind, name) not in NO_TRUE_GRADIENT:
        assert reference.gradient_norms[0][kind, name] == pytest.approx(norm, rel=1e-7), name


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_the_bounds_hold_for_the_release(reference, kind):
  """Its float32 run: losses and gradient norms of the first iteration, the only one at equal state.

  A norm is no further away than the vector is.
  """
  assert_losses_close(kind, released_losses(0, ""), released_losses(0), reference.loss_scales[0])
  for name, has, single, double in zip(
    *facts(kind, "has_grad", "grad_l2", "f64.grad_l2"), strict=True
  ):
    if has and (kind, name) not in NO_TRUE_GRADIENT:
      apart = abs(single / double - 1)
      assert apart < SAFETY * reference.gradient_scales[0][kind, name], name


@pytest.mark.parametrize(("kind", "term"), LOSSES)
def test_float64_losses_equal_the_release(runs, kind, term):
  """All three iterations; 1e-7 relative (measured: 2e-12)."""
  got = [m[f"{kind}/{TERMS[term]}"] for m in runs.double.metrics]
  np.testing.assert_allclose(got, GOLDENS[f"f64.{kind}.loss.{term}"], rtol=1e-7)


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float64_updates_of_all_parameters_equal_the_release(runs, kind):
  """After three iterations, norm and samples; 1e-7 relative (measured: 2e-12 and 4e-8).

  The samples are stored in float32. Parameters without a gradient stay as they are, bit for bit.
  """
  for name, has, length in zip(*facts(kind, "has_grad", "f64.delta_l2"), strict=True):
    got_length, got_sample, changed = runs.double.updates[kind, name]
    if not has:
      assert not changed, name
      continue
    assert got_length == pytest.approx(length, rel=1e-7), name
    sample = GOLDENS[f"f64.{kind}.delta_sample.{name}"]
    assert np.linalg.norm(got_sample - sample) < 1e-7 * np.linalg.norm(sample), name


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float64_gradient_norms_equal_the_release(runs, kind):
  """First iteration; 1e-7 relative (measured: 4e-14)."""
  for name, has, length in zip(*facts(kind, "has_grad", "f64.grad_l2"), strict=True):
    got = runs.gradient_norms[0][kind, name]
    if not has:
      assert got == 0.0, name
    elif (kind, name) in NO_TRUE_GRADIENT:
      assert got < 1e-12, name
    else:
      assert got == pytest.approx(length, rel=1e-7), name


@pytest.mark.parametrize("kind", crn.BRANCHES)
@pytest.mark.parametrize(("precision", "factor"), [("double", 2.0), ("single", SAFETY)])
def test_running_statistics_are_those_of_the_passes_with_gradients(runs, kind, precision, factor):
  """After three iterations; the scale is the distance of the release's float32 run to float64.

  The release feeds its frozen and its unused passes to them, too; `grad_only` is its float32 run
  without that. How far that is from float64 is known only with these passes, as the largest
  distance of any array: twice it for our float64, whose own distance is nothing.
  """
  prefix = f"f64.{kind}.bn."
  arrays = [k.removeprefix(prefix) for k in GOLDENS.files if k.startswith(prefix)]
  assert len(arrays) == 28
  scale = max(
    release.distance(GOLDENS, prefix + name, GOLDENS[f"{kind}.bn.{name}"]) for name in arrays
  )
  for name in arrays:
    value = getattr(runs, precision).statistics[kind, name]
    apart = release.distance(GOLDENS, f"grad_only.{kind}.bn.{name}", value)
    assert apart < factor * scale, (name, apart, scale)


@pytest.mark.parametrize("iteration", range(ITERATIONS))
@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_losses_along_the_float64_trajectory(runs, reference, kind, iteration):
  """Each iteration from the float64 state before it."""
  assert_losses_close(
    kind, runs.forced_metrics[iteration], released_losses(iteration),
    reference.loss_scales[iteration],
  )  # fmt: skip


@pytest.mark.parametrize("iteration", range(ITERATIONS))
@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_gradients_along_the_float64_trajectory(runs, reference, kind, iteration):
  """Every parameter's gradient, as a vector."""
  assert_gradients_close(
    kind, runs.forced_distances[iteration], runs.forced_norms[iteration],
    reference.gradient_scales[iteration], trained(kind),
  )  # fmt: skip


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_losses_stay_near_the_release(runs, kind):
  """Of the trajectory, against the release's float64 run.

  The release's own float32 run is a single draw for each loss, which may be near float64 by chance:
  the scale is its largest distance in any iteration, of the mutual KL and of the other terms. The
  KL is a small difference of rankings and far more sensitive.
  """
  distances = {
    name: max(abs(released_losses(i, "")[name] / released_losses(i)[name] - 1) for i in range(3))
    for name in released_losses(0)
    if name.startswith(kind)
  }
  sensitive = {f"{kind}/mutual_kl"}
  others = max(v for k, v in distances.items() if k not in sensitive)
  scales = {k: v if k in sensitive else others for k, v in distances.items()}
  for i in range(ITERATIONS):
    assert_losses_close(kind, runs.single.metrics[i], released_losses(i), scales)


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_updates_stay_near_the_release(runs, kind):
  """After three iterations, against the release's float64 run: norms, and samples taken together.

  The scale is the distance of the release's own float32 update. A norm is less sensitive than the
  vector: three times its own distance, or `SAFETY` times that of all together, whichever is larger;
  in a small parameter the own distance may be small by chance.
  """
  names, *columns = facts(kind, "has_grad", "f64.delta_l2", "f64.delta_rel_diff")
  rows = [row for row in zip(names, *columns, strict=True) if row[1]]
  together = np.sqrt(
    sum((length * own) ** 2 for _, _, length, own in rows) / sum(row[2] ** 2 for row in rows)
  )
  for name, _, length, own in rows:
    apart = abs(runs.single.updates[kind, name][0] / length - 1)
    assert apart < max(3 * own, SAFETY * together), (name, apart, own, together)
  for key, (_, _, changed) in runs.single.updates.items():
    assert key[0] != kind or changed == (key in trained(kind)), key

  def samples(prefix):
    return np.concatenate([GOLDENS[f"{prefix}{kind}.delta_sample.{row[0]}"] for row in rows])

  expected = samples("f64.")
  ours = np.concatenate([runs.single.updates[kind, row[0]][1] for row in rows])
  own = np.linalg.norm(samples("") - expected)
  assert np.linalg.norm(ours - expected) < SAFETY * own


def test_float64_does_not_leak(runs):
  del runs
  assert jnp.zeros(1).dtype == jnp.float32
