"""The combiner against its formulas in NumPy, and what reaches its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crn_jax.models.composition.combiner import Combiner

D, BATCH = 6, 16


@pytest.fixture(scope="module")
def given():
  rng = np.random.default_rng(0)
  image, text = rng.normal(size=(2, BATCH, D)).astype(np.float32)
  return Combiner().init(jax.random.key(0), image, text, train=False), image, text


def by_hand(params, image, text):
  """The formulas of the module's head, in float64, without dropout."""

  def layer(name, x):
    p = {k: np.asarray(v, np.float64) for k, v in params[name].items()}
    return x @ p["kernel"] + p["bias"]

  def relu(x):
    return np.maximum(x, 0)

  t, i = text.astype(np.float64), image.astype(np.float64)
  c = np.concatenate(
    [relu(layer("text_projection", t)), relu(layer("image_projection", i))], axis=-1
  )
  v = layer("mixture", relu(layer("mixture_hidden", c)))
  lam = 1 / (1 + np.exp(-layer("gate", relu(layer("gate_hidden", c)))))
  return v + lam * t + (1 - lam) * i


def test_it_computes_its_formulas(given):
  variables, image, text = given
  found = Combiner().apply(variables, image, text, train=False)
  # Sums of up to 8 d = 48 products of float32 numbers below ten.
  np.testing.assert_allclose(found, by_hand(variables["params"], image, text), atol=5e-6)


def test_its_layers_have_the_published_widths(given):
  shapes = {k: v["kernel"].shape for k, v in given[0]["params"].items()}
  assert shapes == {
    "text_projection": (D, 4 * D),
    "image_projection": (D, 4 * D),
    "mixture_hidden": (8 * D, 8 * D),
    "mixture": (8 * D, D),
    "gate_hidden": (8 * D, 8 * D),
    "gate": (8 * D, 1),
  }


def test_image_and_text_are_told_apart(given):
  variables, image, text = given
  a, b = (
    Combiner().apply(variables, *pair, train=False) for pair in ((image, text), (text, image))
  )
  assert np.abs(a - b).max() > 0.1


@pytest.mark.parametrize("train", [False, True])
def test_a_gradient_reaches_every_parameter_and_both_features(given, train):
  variables, image, text = given

  def loss(params, image, text):
    rngs = {"dropout": jax.random.key(1)}
    return jnp.sum(jnp.square(
      Combiner().apply({"params": params}, image, text, train=train, rngs=rngs)
    ))  # fmt: skip

  grads = jax.grad(loss, argnums=(0, 1, 2))(variables["params"], image, text)
  assert all(np.any(g) for g in jax.tree.leaves(grads))


def test_half_of_each_hidden_layer_is_dropped_and_the_mean_is_kept(given):
  """The mixture's bias and the features have no dropout before them: what remains is random."""
  variables, image, text = given
  keys = jax.random.split(jax.random.key(0), 4000)

  @jax.jit
  @jax.vmap
  def gate(key):
    _, state = Combiner().apply(
      variables, image, text, train=True, rngs={"dropout": key}, capture_intermediates=True
    )
    # Its input is c after dropout.
    return state["intermediates"]["mixture_hidden"]["__call__"][0]

  _, state = Combiner().apply(variables, image, text, train=False, capture_intermediates=True)
  expected = state["intermediates"]["mixture_hidden"]["__call__"][0]
  values = gate(keys)
  error = np.std(values, axis=0) / np.sqrt(len(keys))
  assert np.max(np.abs(np.mean(values, axis=0) - expected) / error) < 5  # Of 768 values.


def test_what_is_dropped_does_not_depend_on_the_devices(given):
  variables, image, text = given

  def apply(axis_name, image, text):
    return Combiner(axis_name=axis_name).apply(
      variables, image, text, train=True, rngs={"dropout": jax.random.key(3)}
    )

  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
  split = jax.shard_map(
    lambda i, t: apply("data", i, t), mesh=mesh, in_specs=P("data"), out_specs=P("data"),
    check_vma=False,
  )(image, text)  # fmt: skip
  np.testing.assert_allclose(split, apply(None, image, text), atol=1e-6)
