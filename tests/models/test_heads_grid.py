"""Composition, relation and pooling on a 7 x 7 map against the PyTorch release.

On the release's own 1 x 1 map attention over positions is trivial and 3 x 3 kernels reduce to their
centre; its classes accept any map, and so these goldens (tests/goldens/heads_grid.npz) exercise
everything. Bound: 1e-5 of the largest value of each array, in float32 on a CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax.convert import release as names
from crn_jax.methods.crn import CRN
from crn_jax.models import crn, layers
from tests import release
from tests.goldens import recipe

TOLERANCE = 1e-5
GOLDENS = np.load(release.GOLDENS / "heads_grid.npz")
IMAGE_MAP = jnp.asarray(recipe.normal("grid.img", (3, 2048, 7, 7)).transpose(0, 2, 3, 1))
WORDS = jnp.asarray(recipe.normal("grid.text", (3, 6, 1024), 0.1))
OTHER = jnp.asarray(recipe.normal("grid.other", (3, 1024)))
COTANGENT = jnp.asarray(recipe.normal("grid.cotangent", (3, 1024)))
ALL_WORDS = jnp.ones(WORDS.shape[:2], bool)


@pytest.fixture(scope="module")
def branches():
  """kind -> (branch, variables)."""
  model = CRN(release.config(), release.VOCAB_SIZE)
  return {k: (b, release.variables(k, b)) for k, b in model.branches.items()}


def run(branch, variables, train: bool):
  """Values, gradients of (params, map, words) and new running statistics of one pass."""

  def heads(params, image_map, words):
    def method(module):
      query = module.compose(image_map, words, ALL_WORDS, train=train, update_stats=train)
      fusdiff = module.relation(query.vector, OTHER)
      return query, module.query_pool(query.composed), fusdiff

    (query, pooled, fusdiff), updated = branch.apply(
      variables | {"params": params}, method=method, mutable=["batch_stats"]
    )
    loss = jnp.sum((query.vector + fusdiff) * COTANGENT)
    return loss, (query, pooled, fusdiff, updated["batch_stats"] if train else {})

  gradient = jax.jit(jax.grad(heads, argnums=(0, 1, 2), has_aux=True))
  gradients, (query, pooled, fusdiff, stats) = gradient(variables["params"], IMAGE_MAP, WORDS)
  composed = query.composed
  values = {
    "fuse_out": composed.transpose(0, 3, 1, 2) if composed.ndim == 4 else composed.swapaxes(1, 2),
    "attn": query.attention.reshape(*query.attention.shape[:2], -1),
    "pooled": pooled,
    "feature": query.vector,
    "fusdiff": fusdiff,
    "grad_img": gradients[1].transpose(0, 3, 1, 2),
    "grad_text": gradients[2],
  }
  return values, gradients[0], stats


@pytest.fixture(scope="module", params=[(k, m) for k in crn.BRANCHES for m in ("eval", "train")])
def heads(request, branches):
  kind, mode = request.param
  return kind, mode, run(*branches[kind], train=mode == "train")


@pytest.mark.parametrize("name", ["fuse_out", "attn", "pooled", "feature", "fusdiff"])
def test_every_value_equals_the_release(heads, name):
  kind, mode, (values, _, _) = heads
  assert release.distance(GOLDENS, f"{kind}.{mode}.{name}", values[name]) < TOLERANCE


@pytest.mark.parametrize("name", ["grad_img", "grad_text"])
def test_gradients_of_the_inputs_equal_the_release(heads, name):
  kind, mode, (values, _, _) = heads
  assert release.distance(GOLDENS, f"{kind}.{mode}.{name}", values[name]) < TOLERANCE


def test_gradient_norms_of_every_parameter_equal_the_release(heads):
  kind, mode, (_, gradients, _) = heads
  flat = names.to_release(kind, gradients, release.SHAPES[kind])
  expected = dict(
    zip(GOLDENS[f"{kind}.{mode}.grad_names"], GOLDENS[f"{kind}.{mode}.grad_l2"], strict=True)
  )
  assert len(expected) > 40
  for name, norm in expected.items():
    got = np.linalg.norm(flat[name].astype(np.float64))
    assert got == pytest.approx(norm, rel=TOLERANCE), name


def test_one_pass_moves_the_running_statistics_as_in_the_release(heads):
  """PyTorch's running variance takes the unbiased batch variance."""
  kind, mode, (_, _, stats) = heads
  if mode == "eval":
    assert not stats
    return
  flat = names.to_release(kind, stats, release.SHAPES[kind])
  assert len(flat) == 28
  for name, value in flat.items():
    assert release.distance(GOLDENS, f"{kind}.train.bn.{name}", value) < TOLERANCE, name


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_pooling_and_projection_of_a_map_equal_the_release(branches, kind):
  params = branches[kind][1]["params"]["head"]
  pooled = layers.gem_pool(IMAGE_MAP, params["pool"]["p"])
  vector = pooled @ params["fc"]["kernel"] + params["fc"]["bias"]
  assert release.distance(GOLDENS, f"{kind}.gem_of_map", pooled) < TOLERANCE
  assert release.distance(GOLDENS, f"{kind}.img_fc_of_map", vector) < TOLERANCE


def test_a_text_of_one_word_equals_the_release(branches):
  branch, variables = branches["global"]
  query = branch.bind(variables).compose(IMAGE_MAP, WORDS[:, :1], ALL_WORDS[:, :1], train=False)
  assert release.distance(GOLDENS, "global.eval.one_token.feature", query.vector) < TOLERANCE


CASES = {
  "3d": jnp.asarray(recipe.normal("gem.3d", (2, 5, 6)).transpose(0, 2, 1)),
  "4d": jnp.asarray(recipe.normal("gem.4d", (2, 5, 4, 3)).transpose(0, 2, 3, 1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("p", [3.0, 2.5])
def test_generalised_mean_equals_the_release(case, p):
  pooled = layers.gem_pool(CASES[case], p)
  assert release.distance(GOLDENS, f"gem.{case}.p{p:g}", pooled) < TOLERANCE


def test_gradients_of_the_generalised_mean_equal_the_release():
  """No gradient where the clamp at 1e-6 is active."""
  x, p = CASES["4d"], jnp.array([3.0])
  grad_x, grad_p = jax.grad(lambda x, p: jnp.sum(layers.gem_pool(x, p)), argnums=(0, 1))(x, p)
  assert release.distance(GOLDENS, "gem.4d.p3.grad_x", grad_x.transpose(0, 3, 1, 2)) < TOLERANCE
  assert release.distance(GOLDENS, "gem.4d.p3.grad_p", grad_p) < TOLERANCE


def test_averages_do_not_count_the_padding():
  two = jnp.asarray(recipe.normal("avg.2d", (1, 2, 4, 5)).transpose(0, 2, 3, 1))
  one = jnp.asarray(recipe.normal("avg.1d", (1, 2, 5)).transpose(0, 2, 1))
  averaged = layers.average_3(two, None).transpose(0, 3, 1, 2)
  assert release.distance(GOLDENS, "avgpool2d", averaged) < TOLERANCE
  averaged = layers.average_3(one, None).swapaxes(1, 2)
  assert release.distance(GOLDENS, "avgpool1d", averaged) < TOLERANCE
