"""Keys made at once are those that Flax gives one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax.models import random_keys
from crn_jax.models.remat import CHOICES, rematerialised

NAMES = ("stage0_block0", "stage0_block1", "stage2_block17")


class Child(nn.Module):
  def __call__(self, x):
    return x

  def drawn(self):
    return [self.make_rng("drop_path") for _ in range(3)]


class Parent(nn.Module):
  remat: str

  @nn.compact
  def __call__(self):
    kind = rematerialised(Child, self.remat)
    children = [kind(name=name) for name in NAMES]
    one_by_one = jnp.stack([key for child in children for key in child.drawn()])
    return random_keys.of_children(self, "drop_path", NAMES, draws=3), one_by_one


class Grandparent(nn.Module):
  remat: str

  @nn.compact
  def __call__(self):
    return Parent(self.remat, name="backbone")()


@pytest.mark.parametrize("module", [Parent, Grandparent])
@pytest.mark.parametrize("remat", CHOICES)
def test_they_are_those_of_flax_at_any_depth(module, remat):
  rngs = {"drop_path": jax.random.key(7), "params": jax.random.key(8)}
  at_once, one_by_one = jax.jit(lambda: module(remat).apply({}, rngs=rngs))()
  assert at_once.shape == (9,)
  np.testing.assert_array_equal(*map(jax.random.key_data, (at_once, one_by_one)))
  assert len(np.unique(jax.random.key_data(at_once), axis=0)) == 9
