"""DCNet against its equations in NumPy, and what reaches its parameters."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.composition.dcnet import EXPERTS, POSITIONS, DCNet
from tests.dcnet_by_hand import ByHand

D, BATCH, WORDS = 6, 8, 5
CONFIG = ml_collections.FrozenConfigDict({"feature_dim": D})
MASK = np.arange(WORDS) < np.array([5, 1, 3, 2, 4, 5, 2, 1])[:, None]
# Relative, in float64: some ten layers of sums of up to 18 products, and sums over experts: some
# hundred roundings of 1e-16, and as much again where terms have different signs.
TOLERANCE = 1e-12


def maps(rng, side=7):
  """Of the last two stages of a backbone, 5 and 4 channels."""
  before = rng.normal(size=(BATCH, 2 * side, 2 * side, 5))
  last = rng.normal(size=(BATCH, side, side, 4))
  return FeatureMaps(last, (before, last))


def one_pass(module, reference, target, words, mask, *, train):
  """Queries, target vectors and scores of pairs."""
  x, _ = module.image(reference, train=train)
  _, targets = module.image(target, train=train)
  queries, pairs = module.compose_against(x, words, mask, targets, train=train)
  return queries[0], targets[0], pairs


@pytest.fixture(scope="module")
def given():
  """float64 variables and inputs: reference maps, target maps, words, mask."""
  rng = np.random.default_rng(0)
  inputs = (maps(rng), maps(rng), rng.normal(size=(BATCH, WORDS, D)), MASK)
  module = DCNet(CONFIG, backbone=None)
  variables = module.init(jax.random.key(0), *inputs, train=False, method=one_pass)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), variables), inputs


def apply(variables, *inputs, train=False, key=None, axis_name=None, dtype=jnp.float64):
  module = DCNet(CONFIG, None, axis_name, dtype)
  rngs = {} if key is None else {"dropout": key}
  return module.apply(variables, *inputs, train=train, method=one_pass, rngs=rngs)


def normalised(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_it_computes_its_equations(given):
  """s_r as the harness has it, the query's product with the image's unit vector, and both scores
  of pairs, of every query with every target."""
  variables, (reference, target, words, mask) = given
  hand = ByHand(variables["params"])
  x, y = (
    [hand.image(m.stages[-2][i], m.map[i]) for i in range(BATCH)] for m in (reference, target)
  )
  t = [hand.text(w[m]) for w, m in zip(words, mask, strict=True)]
  expected = np.array([[hand.scores(x[i], t[i], y_) for y_ in y] for i in range(BATCH)])
  with jax.enable_x64():
    queries, targets, pairs = jax.tree.map(np.asarray, apply(variables, *given[1]))
  assert queries.shape == targets.shape == (BATCH, EXPERTS * D)
  found = [queries @ normalised(targets).T, pairs["correction"], pairs["joint"]]
  np.testing.assert_allclose(np.stack(found, -1), expected, rtol=TOLERANCE)
  assert np.std(expected, axis=(0, 1)).min() > 1e-3  # The scores are not all the same.


def test_retrieval_and_training_make_the_same_queries(given):
  variables, (reference, target, words, mask) = given

  def retrieval(module):
    return module.compose(module.image(reference, train=False)[0], words, mask, train=False)[0]

  with jax.enable_x64():
    found = DCNet(CONFIG, None, dtype=jnp.float64).apply(variables, method=retrieval)
    expected, _, _ = apply(variables, reference, target, words, mask)
  np.testing.assert_array_equal(found, expected)


def test_images_are_ranked_by_both_scores(given):
  """The product of unit vectors and what is added to it: s_r + s_c over the query's length, in the
  units of which retrieval has both."""
  variables, (reference, target, words, mask) = given
  hand = ByHand(variables["params"])
  x, y = (
    [hand.image(m.stages[-2][i], m.map[i]) for i in range(BATCH)] for m in (reference, target)
  )
  t = [hand.text(w[m]) for w, m in zip(words, mask, strict=True)]
  expected = np.array([[sum(hand.scores(x[i], t[i], y_)[:2]) for y_ in y] for i in range(BATCH)])
  lengths = [hand.length(x[i], t[i]) for i in range(BATCH)]

  def scores(module):
    (_, (references,)), (_, (images,)) = (module.image(m, train=False) for m in (reference, target))
    recovered, queried = (
      module.from_vectors(v / jnp.linalg.norm(v, axis=1, keepdims=True))
      for v in (images, references)
    )
    (query,) = module.compose(queried, words, mask, train=False)
    added = module.pair_scores(module.pair_query(queried, words, mask), recovered)
    return normalised(query) @ normalised(images).T + added

  with jax.enable_x64():
    found = np.asarray(DCNet(CONFIG, None, dtype=jnp.float64).apply(variables, method=scores))
  np.testing.assert_allclose(found * np.array(lengths)[:, None], expected, rtol=TOLERANCE)


def test_the_positions_are_those_of_the_paper(given):
  """Each of them reaches the vector of its own expert, and no other position does."""
  variables, (reference, *_) = given

  def vectors(last):
    features = FeatureMaps(last, reference.stages)
    module = DCNet(CONFIG, None)
    return module.apply(variables, features, train=False, method="image")[0][:, 2:]

  gradient = jax.jacobian(lambda last: vectors(last).sum((0, 2)))(jnp.float32(reference.map))
  reached = [np.argwhere(np.any(g, axis=(0, 3))).tolist() for g in gradient]
  # Top, left, centre, right, bottom, as (y, x).
  assert reached == [[[1, 3]], [[3, 1]], [[3, 3]], [[3, 5]], [[5, 3]]]


@pytest.mark.parametrize("side", [1, 2, 3, 4, 10, 14])
def test_maps_of_another_size_have_the_positions_at_the_same_places(given, side):
  """The position that is read holds the centre of the paper's."""
  variables, _ = given
  last = np.zeros((1, side, side, 4), np.float32)
  last[..., 0] = np.arange(side * side).reshape(side, side) + 1
  features = FeatureMaps(jnp.asarray(last), (jnp.zeros((1, 1, 1, 5)), jnp.asarray(last)))
  params = jax.tree.map(np.zeros_like, variables["params"])
  for i in range(2, EXPERTS):
    params["image_experts"][f"expert{i}"]["linear"]["kernel"][0] = 1.0
  module = DCNet(CONFIG, None)
  _, state = module.apply(
    {"params": params}, features, train=False, method="image", capture_intermediates=True
  )
  seen = state["intermediates"]["image_experts"]
  read = [int(seen[f"expert{i}"]["__call__"][0][0, 0]) - 1 for i in range(2, EXPERTS)]
  expected = [(int((y + 0.5) / 7 * side), int((x + 0.5) / 7 * side)) for x, y in POSITIONS]
  assert [divmod(r, side) for r in read] == expected


def test_padding_has_no_influence(given):
  variables, (reference, target, words, mask) = given
  others = np.where(mask[..., None], words, 1e6)
  longer = np.pad(others, ((0, 0), (0, 3), (0, 0)), constant_values=-1e6)
  expected = apply(variables, reference, target, words, mask, dtype=jnp.float32)
  found = apply(
    variables, reference, target, longer, np.pad(mask, ((0, 0), (0, 3))), dtype=jnp.float32
  )
  # Zeros are added, in another order perhaps.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


def losses(outputs):
  """The three cross-entropies of eq. (14) to (16), of one device."""
  queries, targets, pairs = outputs
  unit_targets = targets / jnp.linalg.norm(targets, axis=-1, keepdims=True)
  return sum(
    -jnp.mean(jnp.diagonal(jax.nn.log_softmax(s)))
    for s in (queries @ unit_targets.T, pairs["correction"], pairs["joint"])
  )


@pytest.mark.parametrize("key", [None, jax.random.key(1)], ids=["evaluation", "training"])
def test_a_gradient_reaches_every_parameter(given, key):
  variables, inputs = given

  def loss(params):
    outputs = apply({"params": params}, *inputs, train=key is not None, key=key, dtype=jnp.float32)
    return losses(outputs)

  grads = jax.jit(jax.grad(loss))(jax.tree.map(jnp.float32, variables["params"]))
  assert all(np.any(g) for g in jax.tree.leaves(grads))


def test_an_image_that_no_expert_answers_to_has_finite_gradients(given):
  """ReLU may leave nothing of a vector that is to be normalised."""
  variables, inputs = given
  params = jax.tree.map(jnp.float32, variables["params"])
  for i in range(EXPERTS):
    params["image_experts"][f"expert{i}"]["linear"] = {
      "kernel": jnp.zeros_like(params["image_experts"][f"expert{i}"]["linear"]["kernel"]),
      "bias": jnp.full(D, -1.0),
    }

  def total(params):
    queries, targets, pairs = apply({"params": params}, *inputs, dtype=jnp.float32)
    return queries.sum() + targets.sum() + sum(p.sum() for p in pairs.values())

  value, grads = jax.value_and_grad(total)(params)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_several_devices_compute_what_one_does(given):
  """Queries against the targets of all of them, dropout included."""
  variables, inputs = given
  key = jax.random.key(3)
  mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
  with jax.enable_x64():
    split = jax.jit(jax.shard_map(
      lambda *inputs: apply(variables, *inputs, train=True, key=key, axis_name="data"),
      mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False,
    ))(*inputs)  # fmt: skip
    whole = apply(variables, *inputs, train=True, key=key)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE), split, whole
  )
