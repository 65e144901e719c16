"""Losses against a bank of images: by hand, and spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crn_jax.methods import losses

BATCH, IMAGES, DIM = 8, 21, 5
COUNTS = np.arange(24) < IMAGES


@pytest.fixture(scope="module")
def given():
  """Queries, a bank filled up to 24 rows, targets."""
  rng = np.random.default_rng(0)
  queries = rng.normal(size=(BATCH, DIM)).astype(np.float32)
  bank = rng.normal(size=(24, DIM)).astype(np.float32)
  bank[IMAGES:] = queries[:3]  # The best of all answers, were they not masked.
  return queries, bank, rng.integers(0, IMAGES, BATCH)


def by_hand(queries, bank, targets, temperature):
  q, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in
          (queries.astype(np.float64), bank[:IMAGES].astype(np.float64)))  # fmt: skip
  logits = q @ b.T / temperature
  return np.mean(
    [np.log(np.sum(np.exp(row - row[t]))) for row, t in zip(logits, targets, strict=True)]
  )


def test_every_image_of_the_bank_is_a_negative(given):
  queries, bank, targets = given
  found = losses.info_nce(queries, bank, COUNTS, targets, 0.02, losses.Batch())
  # Cosines of float32 over 0.02: fifty times 1e-7 of a nat.
  np.testing.assert_allclose(found, by_hand(queries, bank, targets, 0.02), rtol=0, atol=1e-5)


def test_loss_and_gradient_do_not_depend_on_the_devices(given):
  queries, bank, targets = given

  def whole(queries):
    return losses.info_nce(queries, bank, COUNTS, targets, 0.1, losses.Batch())

  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))

  def shares(queries, targets):
    def share(queries):
      return losses.info_nce(queries, bank, COUNTS, targets, 0.1, losses.Batch("data"))

    loss, grad = jax.value_and_grad(share)(queries)
    return loss[None], grad

  split = jax.shard_map(shares, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
  loss, grad = split(queries, targets)
  expected, expected_grad = jax.value_and_grad(whole)(jnp.asarray(queries))
  np.testing.assert_allclose(loss.sum(), expected, rtol=1e-6)
  np.testing.assert_allclose(grad, expected_grad, atol=1e-6)
  assert np.isfinite(grad).all()


def triplet_by_hand(queries, targets, margin):
  """The loss as its definition says it, an anchor at a time, in float64."""
  q, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in
          (queries.astype(np.float64), targets.astype(np.float64)))  # fmt: skip
  total = 0.0
  for anchors, others in ((q, t), (t, q)):
    for i, anchor in enumerate(anchors):
      d = [np.sum((anchor - other) ** 2) for other in others]
      semi_hard = [d[j] for j in range(len(d)) if j != i and d[j] >= d[i]]
      if semi_hard:
        total += max(d[i] - min(semi_hard) + margin, 0.0) / len(anchors)
  return total


@pytest.fixture(scope="module")
def pairs():
  """Queries near their targets, so that hinges are at work and at rest, with and without harder
  negatives."""
  rng = np.random.default_rng(1)
  targets = rng.normal(size=(BATCH, DIM))
  queries = targets + 1.5 * rng.normal(size=(BATCH, DIM))
  return queries.astype(np.float32), targets.astype(np.float32)


# At 5, beyond the largest distance, every hinge is at work.
@pytest.mark.parametrize("margin", [0.05, 0.2, 5.0])
def test_triplet_is_its_definition(pairs, margin):
  found = losses.triplet(*pairs, margin, losses.Batch())
  # 32 distances of float32, each off by some 2 x 6e-8 x 5 terms, in two means.
  np.testing.assert_allclose(found, triplet_by_hand(*pairs, margin), rtol=0, atol=2e-6)


def test_a_triplets_negative_is_the_nearest_that_is_not_nearer_than_the_positive():
  """Angles in degrees. The query at 0 has its target at 20; the target at 10 is nearer, and no
  negative of it; of those at 40 and 90 the former is."""
  queries, targets = (
    np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1).astype(np.float32)
    for angles in ([0.0, 190.0, 220.0, 270.0], [20.0, 10.0, 40.0, 90.0])
  )

  def d(angle):
    return 2 - 2 * np.cos(np.radians(angle))

  hinges = losses._hinges(queries, targets, 0.5, losses.Batch())
  expected = [d(20) - d(40) + 0.5, 0, 0, 0]
  # The other queries' targets stand opposite to them: nothing is farther, no negative is left.
  np.testing.assert_allclose(hinges, expected, atol=1e-6)


def test_a_triplet_without_negatives_has_no_loss_and_no_gradient():
  queries = jnp.eye(3)
  value, grad = jax.value_and_grad(losses.triplet)(queries, -queries, 0.2, losses.Batch())
  assert value == 0 and not np.any(grad)


def test_triplet_and_its_gradient_do_not_depend_on_the_devices(pairs):
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))

  def shares(queries, targets):
    def share(both):
      return losses.triplet(*both, 0.2, losses.Batch("data"))

    loss, grads = jax.value_and_grad(share)((queries, targets))
    return loss[None], grads

  split = jax.shard_map(shares, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
  loss, grads = split(*pairs)
  expected, expected_grads = jax.value_and_grad(
    lambda both: losses.triplet(*both, 0.2, losses.Batch())
  )(tuple(map(jnp.asarray, pairs)))
  assert expected > 0.05
  np.testing.assert_allclose(loss.sum(), expected, rtol=1e-6)
  for grad, expected_grad in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)
