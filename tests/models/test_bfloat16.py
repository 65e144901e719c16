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
from crn_jax.methods.base import TrainState
from crn_jax.models import crn, precision
from crn_jax.models.backbones import registry
from tests import tiny_model as tiny
from tests import tiny_towers

# What computes in `model.dtype`, by the names of its modules in a traced program.
BLOCKS = ("backbone", "image/encoder", "text/encoder", "patch_embed")
# They move numbers, or round them once.
MOVES = {
  "convert_element_type", "reshape", "broadcast_in_dim", "slice", "concatenate", "squeeze", "pad",
  "transpose",
}  # fmt: skip
# Some hold the program of one addition, of scalars. Max-pooling's gradient is none of them: there a
# position gets a sum of no more than the four windows that it is in.
SUMS = {"reduce_sum", "reduce_window_sum", "reduce_window", "scatter-add", "cumsum", "reduce"}


def equations(jaxpr):
  """All of a program, those of functions that it calls included."""
  return [equation for equation, _ in placed_equations(jaxpr)]


def placed_equations(jaxpr, inside: str = ""):
  """All of a program, each with the names of the modules that it belongs to.

  In the place of what only calls a program (jit, scan, remat ...) stand the equations of that one.
  """
  for equation in jaxpr.eqns:
    modules = f"{inside}/{equation.source_info.name_stack}"
    inner_programs = list(_programs(equation.params.values()))
    if equation.primitive.name in SUMS or not inner_programs:
      yield equation, modules
      continue
    for program in inner_programs:
      yield from placed_equations(program, modules)


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


def sums(jaxpr):
  """(name of the operation, its modules, dtype) of all that add up numbers along an axis."""
  return [
    (equation.primitive.name, modules, str(equation.outvars[0].aval.dtype))
    for equation, modules in placed_equations(jaxpr)
    if equation.primitive.name in SUMS
  ]


PRESETS = [name for name in presets.PRESETS if name not in presets.TOWER_PRESETS]
# Methods whose towers are trained; and one that only sees their features.
ON_TOWERS, ON_FEATURES = ["fine_tuning", "bank", "crn_towers"], "clip4cir"


@functools.cache
def update_of(name: str):
  """The program of an update in bfloat16; of a preset, or of a method on towers."""
  tx = optax.sgd(1.0)
  if name in PRESETS:
    config = tiny.config(name)
    method, batch = tiny.model(config), tiny.batch(config, 2)
  else:
    method = tiny_towers.method(name)
    config = method.config
    if tiny_towers.registry.uses_features(name):
      batch = method.abstract_batch(2, 8)
    else:
      words = tiny_towers.ids(2)
      batch = dict.fromkeys(("reference", "target"), tiny_towers.pictures(2))
      batch |= {"tokens": words, "token_mask": words > 0}
  config.model.dtype = "bfloat16"
  state = jax.eval_shape(lambda: TrainState.create(method.init(jax.random.key(0)), tx))
  step = jax.make_jaxpr(lambda state, batch: method.train_step(tx, state, batch))
  return step(state, batch).jaxpr


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


_add = {
  "reduce_sum": lambda x: jax.lax.reduce_sum(x, (0,)),
  "reduce": lambda x: jax.lax.reduce(x, jnp.zeros((), x.dtype), lambda a, b: (a + b) * 1, (0,)),
  "reduce_window_sum": lambda x: jax.lax.reduce_window(
    x, np.zeros((), x.dtype), jax.lax.add, (2, 1), (2, 1), "valid"
  ),
  "reduce_window": lambda x: jax.lax.reduce_window(
    x, np.zeros((), x.dtype), lambda a, b: (a + b) * 1, (2, 1), (2, 1), "valid"
  ),
  "scatter-add": jax.grad(lambda x: jnp.sum(x[jnp.asarray([0, 2, 0])].astype(jnp.float32))),
  "cumsum": lambda x: jax.lax.cumsum(x, 0),
}
_call = {
  "nothing": lambda f: f,
  "jit": jax.jit,
  "remat2": jax.checkpoint,
  "scan": lambda f: lambda x: jax.lax.scan(lambda carry, _: (carry, f(x)), x, length=2),
  "cond": lambda f: lambda x: jax.lax.cond(x[0, 0] > 0, f, f, x),
}


@pytest.mark.parametrize("call", _call)
@pytest.mark.parametrize("name", _add)
def test_sums_are_found(name, call):
  """Each of the operations, also in what calls it, by the dtype of its result."""
  assert set(_add) == SUMS
  for dtype in (jnp.bfloat16, jnp.float32):
    program = jax.make_jaxpr(_call[call](_add[name]))(jnp.ones((4, 3), dtype)).jaxpr
    assert call in {"nothing", *(equation.primitive.name for equation in program.eqns)}
    found = [kind for operation, _, kind in sums(program) if operation == name]
    assert found == [str(jnp.dtype(dtype))] * (2 if call == "cond" else 1)
    in_16_bits = {found for found, _ in in_bfloat16(program)}
    assert (name in in_16_bits) == (dtype == jnp.bfloat16)
    assert call not in in_16_bits


@pytest.mark.parametrize("name", PRESETS + ON_TOWERS)
def test_only_blocks_compute_in_bfloat16(name):
  """Neither head, text encoder, composition, relation and losses do, nor any of their gradients.

  Beside backbones those are the blocks of towers and what makes patches to tokens.
  """
  found = in_bfloat16(update_of(name))
  places = collections.Counter(any(name in modules for name in BLOCKS) for _, modules in found)
  assert places[True] > 50
  outside = [
    (name, modules)
    for name, modules in found
    if name not in MOVES and not any(block in modules for block in BLOCKS)
  ]
  assert not outside


def test_nothing_on_features_computes_in_bfloat16():
  program = update_of(ON_FEATURES)
  assert not in_bfloat16(program)
  assert any(equation.primitive.name == "dot_general" for equation in equations(program))


# Module behind the blocks -> its products; of a pool: query, key and value, logits, what attention
# gathers, what comes out of it, and two of an MLP.
_PROJECTIONS = {"image_projection": 1, "text_projection": 1}


@pytest.mark.parametrize(
  ("pooling", "behind"),
  [("class_token", _PROJECTIONS), ("attention", {"pool": 7, **_PROJECTIONS})],
)
def test_behind_their_blocks_towers_compute_in_float32(pooling, behind):
  """Pooling and projection: what images differ by may be less than 8 bits resolve."""
  program = gradient_of_towers(pooling)
  products = collections.Counter(
    (module, str(equation.outvars[0].aval.dtype))
    for equation, modules in placed_equations(program)
    for module in behind
    if equation.primitive.name == "dot_general" and module in modules.split("/")
  )
  # Each has two more in its gradient.
  assert products == {(module, "float32"): 3 * count for module, count in behind.items()}
  assert not [
    (name, modules)
    for name, modules in in_bfloat16(program)
    if name not in MOVES and not set(behind).isdisjoint(modules.split("/"))
  ]


@pytest.mark.parametrize("name", [*PRESETS, *ON_TOWERS, ON_FEATURES])
def test_no_update_sums_in_bfloat16(name):
  """Of thousands of rows such a sum stands still: so do biases. Products sum in float32 anyway."""
  found = sums(update_of(name))
  assert ("reduce_sum", "float32") in {(operation, dtype) for operation, _, dtype in found}
  assert not [each for each in found if each[2] == "bfloat16"]


@pytest.mark.parametrize("pooling", ["class_token", "attention"])
def test_no_gradient_of_towers_sums_in_bfloat16(pooling):
  """Of biases, position tables, class token and word table."""
  found = sums(gradient_of_towers(pooling))
  assert {"reduce_sum", "scatter-add"} <= {operation for operation, _, _ in found}
  assert not [each for each in found if each[2] == "bfloat16"]


@pytest.mark.parametrize(
  ("name", "module"),
  [("crn", "backbone"), ("crn", "Branch.encode_text"), ("tirg", "Single"), ("bank", "text")],
)
def test_gradients_of_tables_are_summed_in_float32(name, module):
  """A word's row is added to by all its places, that of a relative position by all windows."""
  found = [
    dtype
    for operation, modules, dtype in sums(update_of(name))
    if operation == "scatter-add" and any(module in part for part in modules.split("/"))
  ]
  assert found
  assert set(found) == {"float32"}


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


def test_numbers_that_came_out_otherwise_have_another_name():
  """Features and indexes of float32 stay good; those of bfloat16 are of before all this."""
  assert precision.numerics("float32") == "float32"
  assert precision.numerics("bfloat16") not in ("float32", "bfloat16")
