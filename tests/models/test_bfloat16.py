"""bfloat16: what must stay in float32.

On a CPU XLA may leave out the rounding to bfloat16 between two operations, so that numbers would
not show it: the traced program is looked at.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import presets
from crn_jax.models import crn
from crn_jax.models.backbones import registry
from tests import tiny_model as tiny
from tests import tiny_towers

# What computes in `model.dtype`, by the names of its modules in a traced program.
BLOCKS = ("backbone", "encoder")
# They move numbers, or round them once.
MOVES = {
  "convert_element_type", "reshape", "broadcast_in_dim", "slice", "concatenate", "squeeze", "pad",
  "transpose",
}  # fmt: skip
SUMS = {"reduce_sum", "reduce_window_sum", "scatter-add", "cumsum", "reduce"}


def equations(jaxpr):
  """All of a program, those of functions that it calls included."""
  return [equation for equation, _ in placed_equations(jaxpr)]


def placed_equations(jaxpr, inside: str = ""):
  """All of a program, each with the names of the modules that it belongs to."""
  for equation in jaxpr.eqns:
    modules = f"{inside}/{equation.source_info.name_stack}"
    inner_programs = list(_programs(equation.params.values()))
    for program in inner_programs:
      yield from placed_equations(program, modules)
    if not inner_programs:
      yield equation, modules


def _programs(params):
  for value in params:
    for inner in value if isinstance(value, list | tuple) else [value]:
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield inner


def in_bfloat16(jaxpr):
  """(name of the operation, its modules) of all that gives bfloat16."""
  return [
    (equation.primitive.name, modules)
    for equation, modules in placed_equations(jaxpr)
    if any(getattr(out.aval, "dtype", None) == jnp.bfloat16 for out in equation.outvars)
  ]


@functools.cache
def update_of(preset: str):
  """The program of an update in bfloat16."""
  config = tiny.config(preset)
  config.model.dtype = "bfloat16"
  method, tx = tiny.model(config), optax.sgd(1.0)
  state = jax.eval_shape(lambda: tiny.state(config, tx))
  step = jax.make_jaxpr(lambda state, batch: method.train_step(tx, state, batch))
  return step(state, tiny.batch(config, 2)).jaxpr


@functools.cache
def gradient_of_towers(pooling: str):
  """The program of the gradient of both towers and their projections in bfloat16."""
  config = tiny_towers.config("nowhere", "clip4cir")
  config.model.dtype = "bfloat16"
  config.model.encoder.image.pooling = pooling
  method = tiny_towers.registry.create(config, tiny_towers.VOCAB_SIZE)
  params = jax.eval_shape(method.init_encoder, jax.random.key(0))
  pictures, ids = jnp.zeros((2, 32, 32, 3)), jnp.ones((2, 20), jnp.int32)

  def loss(params):
    images, texts = method.encoder.apply({"params": params}, pictures, ids)
    assert images.vectors.dtype == texts.vectors.dtype == jnp.float32
    return jnp.sum(images.vectors * texts.vectors)

  return jax.make_jaxpr(jax.grad(loss))(params).jaxpr


PRESETS = [name for name in presets.PRESETS if name not in presets.TOWER_PRESETS]


@pytest.mark.parametrize("preset", PRESETS)
def test_only_the_blocks_of_backbones_compute_in_bfloat16(preset):
  """Neither head, text encoder, composition, relation and losses do, nor any of their gradients."""
  found = in_bfloat16(update_of(preset))
  places = collections.Counter(any(name in modules for name in BLOCKS) for _, modules in found)
  assert places[True] > 50
  outside = [
    (name, modules)
    for name, modules in found
    if name not in MOVES and not any(block in modules for block in BLOCKS)
  ]
  assert not outside


@pytest.mark.parametrize("pooling", ["class_token", "attention"])
def test_behind_their_blocks_towers_compute_in_float32(pooling):
  """Pooling and projection: what images differ by may be less than 8 bits resolve."""
  outside = [
    (name, modules)
    for name, modules in in_bfloat16(gradient_of_towers(pooling))
    if name in ("dot_general", "add", "mul") and any(x in modules for x in ("pool", "projection"))
  ]
  assert not outside


@pytest.mark.parametrize("preset", PRESETS)
def test_no_update_sums_in_bfloat16(preset):
  """Of thousands of rows such a sum stands still: so do biases. Products sum in float32 anyway."""
  assert not [found for found in in_bfloat16(update_of(preset)) if found[0] in SUMS]


@pytest.mark.parametrize("pooling", ["class_token", "attention"])
def test_no_gradient_of_towers_sums_in_bfloat16(pooling):
  """Of biases, position tables, class token and word table."""
  assert not [found for found in in_bfloat16(gradient_of_towers(pooling)) if found[0] in SUMS]


def test_what_transformer_blocks_add_to_is_float32():
  """A difference between images is a small part of it; bfloat16 keeps 8 bits of the whole."""
  config = tiny.config()
  swin = registry.create(config.model.backbone, jnp.bfloat16)
  pictures = jnp.zeros((2, 32, 32, 3))
  (maps, _) = jax.eval_shape(
    lambda: swin.init_with_output(jax.random.key(0), pictures, train=False)
  )
  assert {x.dtype for x in jax.tree.leaves(maps)} == {jnp.dtype("float32")}
  towers = tiny_towers.method("clip4cir").encoder.clone(dtype=jnp.bfloat16)

  def layers(towers):
    images = towers.image(pictures, each=True)
    return images.layers, images.map, towers.text(jnp.ones((2, 20), jnp.int32), each=True).layers

  (found, _) = jax.eval_shape(lambda: towers.init_with_output(jax.random.key(0), method=layers))
  assert {x.dtype for x in found} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_what_stands_behind_the_maps_is_what_float32_gives(kind):
  """Of equal maps, nearly alike: the same numbers, bit by bit, whatever `model.dtype`.

  Their differences are 1 % of them, of which bfloat16 would leave a fifth in doubt.
  """
  rng = np.random.default_rng(0)
  alike = rng.normal(size=(1, 4, 4, 32)) + 0.01 * rng.normal(size=(4, 4, 4, 32))
  maps = jnp.asarray(alike, jnp.float32)
  maps = crn.FeatureMaps(maps, (maps, maps))
  tokens = jnp.asarray(rng.integers(1, tiny.VOCAB_SIZE, (4, 8)))

  def head_and_composition(branch):
    image = branch.head(maps)
    query = branch.compose(image.map, *branch.encode_text(tokens, tokens > 0), train=True)
    return image.vector, query.vector, branch.relation(query.vector, image.vector)

  found = {}
  for dtype in ("float32", "bfloat16"):
    config = tiny.config()
    config.model.dtype = dtype
    variables = {k: v[kind] for k, v in tiny.variables(config).items()}
    branch = tiny.model(config).branches[kind]
    found[dtype] = branch.apply(variables, method=head_and_composition)
  for one, other in zip(found["float32"], found["bfloat16"], strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("dtype", "logits"), [("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_attention_logits_are_summed_in_float32(kind, dtype, logits):
  """Of every block of the backbone and of the composition; what attention gathers is not."""
  config = tiny.config()
  config.model.dtype = dtype
  branch = tiny.model(config).branches[kind]
  image, tokens = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 8), jnp.int32)
  variables = {k: v[kind] for k, v in tiny.variables(config).items()}
  traced = jax.make_jaxpr(
    lambda variables: branch.apply(
      variables, image, image, tokens, tokens == 0, train=False, modification=False,
      auxiliary=False,
    )
  )(variables)  # fmt: skip
  results = collections.Counter(
    str(equation.outvars[0].aval.dtype)
    for equation in equations(traced.jaxpr)
    if equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][1][0]
  )
  attentions = sum(config.model.backbone.depths)
  expected = collections.Counter({logits: attentions})
  expected[dtype] += attentions
  expected["float32"] += 2  # The composition's, which is float32 in all of it.
  assert results == expected
