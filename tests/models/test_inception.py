"""Inception units that are computed together are what each is by itself, branch by branch."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax.models.composition.crn import GlobalComposition, LocalComposition
from crn_jax.models.layers import InceptionUnit, average_3, inception, masked

pytestmark = pytest.mark.usefixtures("quick_compile")

FEATURES, CHANNELS, BATCH = 32, 64, 4
SHAPES = {"maps": (BATCH, 3, 2), "texts": (BATCH, 5), "masked texts": (BATCH, 5)}


class Together(nn.Module):
  names: ClassVar[tuple[str, ...]] = ("gamma", "beta")

  @nn.compact
  def __call__(self, x, mask, **mode):
    units = [InceptionUnit(FEATURES, dtype=jnp.float64, name=name) for name in self.names]
    return inception(units, x, mask, **mode)


def one_unit(params, stats, x, mask, *, train: bool):
  """The unit's definition; also the running statistics after a training pass."""
  moved = {}

  def conv_unit(name, x):
    kernel, bn = params[name]["conv"]["kernel"], params[name]["bn"]
    if kernel.ndim == 2:
      x = x @ kernel
    else:
      sides = kernel.shape[:-2]
      conv = nn.Conv(kernel.shape[-1], sides, use_bias=False, dtype=jnp.float64)
      x = conv.apply({"params": {"kernel": kernel}}, masked(x, mask))
    mean, var = stats[name]["bn"]["mean"], stats[name]["bn"]["var"]
    if train:
      rows = x[mask] if mask is not None else x.reshape(-1, x.shape[-1])
      moved[name] = {
        "bn": {
          "mean": 0.9 * mean + 0.1 * rows.mean(0),
          "var": 0.9 * var + 0.1 * rows.var(0, ddof=1),
        }
      }
      mean, var = rows.mean(0), rows.var(0)
    return nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * bn["scale"] + bn["bias"])

  branches = [
    conv_unit("branch0", x),
    conv_unit("branch1_1", conv_unit("branch1_0", x)),
    conv_unit("branch2_2", conv_unit("branch2_1", conv_unit("branch2_0", x))),
    conv_unit("branch3", average_3(x, mask)),
  ]
  return jnp.concatenate(branches, -1), moved


def problem(case: str):
  """Variables of two units, none of them at its initial value, input and mask."""
  rng = np.random.default_rng(0)
  shape = SHAPES[case]
  x = jnp.asarray(rng.normal(size=(*shape, CHANNELS)))
  lengths = np.asarray([5, 1, 3, 4])[:, None]
  mask = np.arange(shape[1]) < lengths if case == "masked texts" else None
  mode = {"train": False, "update_stats": False}
  variables = Together().init(jax.random.key(0), x, mask, **mode)
  noise = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.1, 0.5, v.shape)) + v, variables)
  return noise["params"], noise["batch_stats"], x, mask


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("train", [True, False])
def test_units_together_are_the_units_one_by_one(case, train):
  """Results, running statistics and gradients in float64, to 1e-12 of the largest.

  A sum of 144 products (3 x 3 x 16 channels) is off by 144 * 1.1e-16 = 1.6e-14 of them at most, six
  such sums in a row (three convolutions and their gradients) by 1e-13; norms of six values or more
  make up to ten times that of it.
  """
  with jax.enable_x64():
    params, stats, x, mask = problem(case)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, *x.shape[:-1], FEATURES)))
    counted = weight if mask is None else weight * mask[..., None]

    def together(params, x):
      out, updated = Together().apply(
        {"params": params, "batch_stats": stats}, x, mask, train=train, update_stats=train,
        mutable=["batch_stats"],
      )  # fmt: skip
      return jnp.sum(counted * jnp.stack(out)), (out, updated["batch_stats"])

    def apart(params, x):
      out, moved = zip(
        *(one_unit(params[n], stats[n], x, mask, train=train) for n in Together.names), strict=True
      )
      moved = dict(zip(Together.names, moved, strict=True)) if train else stats
      return jnp.sum(counted * jnp.stack(out)), (list(out), moved)

    grads = {}
    values = {}
    for name, function in (("together", together), ("apart", apart)):
      (_, values[name]), grads[name] = jax.value_and_grad(function, (0, 1), has_aux=True)(params, x)

    def close(a, b):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * float(jnp.abs(b).max()))

    if mask is not None:
      values = {k: ([masked(o, mask) for o in v[0]], v[1]) for k, v in values.items()}
    jax.tree.map(close, values["together"], values["apart"])
    jax.tree.map(close, grads["together"], grads["apart"])


def test_a_pass_that_does_not_update_statistics_leaves_them():
  with jax.enable_x64():
    params, stats, x, mask = problem("maps")
    variables = {"params": params, "batch_stats": stats}
    _, updated = Together().apply(
      variables, x, mask, train=True, update_stats=False, mutable=["batch_stats"]
    )
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], stats)


@pytest.mark.parametrize("composition", [LocalComposition, GlobalComposition])
def test_a_composition_has_one_product_of_its_context_and_three_norms(composition):
  """Beside it are the products of embedding, logits and attention."""
  module = composition(64, 4.0)
  mode = {"train": True, "update_stats": True, "mutable": True}
  arrays = jnp.zeros((2, 3, 3, 64)), jnp.zeros((2, 5, 64)), jnp.ones((2, 5), bool)
  init = module.init(jax.random.key(0), *arrays, train=False, update_stats=False)
  text = str(jax.make_jaxpr(lambda v: module.apply(v, *arrays, **mode))(init))
  assert text.count("dot_general[") == 4
  assert text.count(" sqrt ") == 3
