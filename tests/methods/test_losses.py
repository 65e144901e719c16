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
