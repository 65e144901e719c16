"""Initial values: those of the module's `init`, bit by bit, without compiling the model."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax import initial_values, state
from crn_jax.models import remat
from crn_jax.models.preprocessing import IMAGENET
from crn_jax.workdir import weights
from tests import tiny_model

KEY = jax.random.key(599)


def leaves(tree) -> dict:
  paths, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


@pytest.fixture
def programs(monkeypatch) -> dict:
  """Computation as text -> its program, of all that are made while a test runs."""
  made = {}
  original = initial_values._Drawn.program

  def recording(drawn):
    assert drawn.text not in made
    made[drawn.text] = original(drawn)
    return made[drawn.text]

  monkeypatch.setattr(initial_values._Drawn, "program", recording)
  return made


@pytest.mark.slow
@pytest.mark.parametrize("names", ["crn", "crn_released", "clvc_net"])
def test_they_are_those_of_the_compiled_init(names):
  """clvc_net has a ResNet."""
  c = tiny_model.config(names)
  method = tiny_model.model(c)
  expected = jax.jit(method.init)(KEY)
  found = initial_values.draw(method.init, KEY)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for name, value in leaves(expected).items():
    assert leaves(found)[name].dtype == value.dtype
    np.testing.assert_array_equal(leaves(found)[name], value, err_msg=name)


def test_values_drawn_alike_share_a_program_and_nothing_else_is_compiled(programs):
  def init(key):
    a, b, c = jax.random.split(key, 3)
    forward = jax.random.normal(a, (64, 64)) @ jnp.ones((64, 64))
    del forward
    return {
      "one": jax.random.normal(a, (3,)), "two": jax.random.normal(b, (3,)),
      "other scale": 2 * jax.random.normal(c, (3,)), "other shape": jax.random.normal(c, (4,)),
      "zeros": [jnp.zeros(3), jnp.zeros(3)],
    }  # fmt: skip

  found = initial_values.draw(init, KEY)
  jax.tree.map(np.testing.assert_array_equal, found, jax.jit(init)(KEY))
  assert len(programs) == 4
  assert not any("dot_general" in text for text in programs)
  # Zeros are not.
  assert sum(isinstance(program, jax.stages.Compiled) for program in programs.values()) == 3


def several(key):
  """Draws of several kinds and sizes, by keys of the top and by keys made on the way."""
  a, b, c, d = jax.random.split(key, 4)
  made_on_the_way = jax.jit(lambda key: jax.random.uniform(jax.random.fold_in(key, 3), (5,)))
  return {
    "long": jax.random.normal(a, (2, 2**19 + 1)),
    "a power of two": jax.random.uniform(a, (2**20,), minval=-0.3, maxval=0.1),
    "short": jax.random.truncated_normal(b, -2, 2, (7, 3)),
    "one": jax.random.normal(b),
    "none": jax.random.normal(b, (0, 3)),
    "of one number": [jnp.full((2, 3), 0.5, "bfloat16"), jnp.array(2.5), jnp.ones(4, bool)],
    "of several": jnp.arange(5.0) + jnp.array([1, 2, 3, 4, 5]),
    "two draws": jax.random.normal(c, (3,)) * jax.random.uniform(c, (3,)),
    "a key made on the way": made_on_the_way(d),
    "half precision": jax.random.normal(d, (9,), "bfloat16"),
    "numbers": jax.random.randint(d, (4,), 0, 1000),
  }


@pytest.mark.parametrize(
  ("kind", "partitionable"), [("threefry2x32", True), ("threefry2x32", False), ("rbg", True)]
)
def test_values_are_those_of_jax_whatever_the_keys(kind, partitionable):
  with jax.threefry_partitionable(partitionable):
    key = jax.random.key(599, impl=kind)
    found, expected = initial_values.draw(several, key), jax.jit(several)(key)
  assert found.keys() == expected.keys()
  for name, value in leaves(expected).items():
    assert leaves(found)[name].dtype == value.dtype, name
    np.testing.assert_array_equal(leaves(found)[name], value, err_msg=name)


def test_no_program_has_the_loop_of_jax_s_random_bits(programs):
  """Two thirds of compiling a program would go into it."""
  initial_values.draw(tiny_model.model(tiny_model.config()).init, KEY)
  compiled = [p.as_text() for p in programs.values() if isinstance(p, jax.stages.Compiled)]
  assert len(compiled) > 10
  assert not any(" while(" in text for text in compiled)
  assert " while(" in jax.jit(jax.random.normal).lower(KEY).compile().as_text()


@pytest.mark.parametrize("choice", remat.CHOICES)
def test_whatever_blocks_keep_no_program_of_initial_values_holds_the_model(choice, programs):
  """The same values for all, and no matrix product compiled for them."""
  c = tiny_model.config()
  expected = leaves(initial_values.draw(tiny_model.model(c).init, KEY))
  c.model.remat = choice
  programs.clear()
  found = leaves(initial_values.draw(tiny_model.model(c).init, KEY))
  assert found.keys() == expected.keys()
  for name, value in found.items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)
  assert programs
  assert not any("dot_general" in text for text in programs)


def test_no_two_values_share_a_buffer():
  """A training step is given the buffers of the state to reuse: each may be given once."""
  found = initial_values.draw(lambda key: [jnp.zeros(3), jnp.zeros(3)], KEY)
  assert found[0].unsafe_buffer_pointer() != found[1].unsafe_buffer_pointer()


def test_garbage_is_collected_afterwards_as_before():
  def failing(key):
    raise ValueError("init")

  with pytest.raises(ValueError, match="init"):
    initial_values.draw(failing, KEY)
  assert gc.isenabled()
  gc.disable()
  try:
    initial_values.draw(lambda key: jnp.zeros(3), KEY)
    assert not gc.isenabled()
  finally:
    gc.enable()


def test_a_pretrained_backbone_is_not_drawn(tmp_path):
  c = tiny_model.config()
  method = tiny_model.model(c)
  random = leaves(initial_values.draw(method.init, KEY))
  shapes = initial_values.draw(method.init, KEY, without=("backbone",))
  for name, value in leaves(shapes).items():
    if "'backbone'" in name:
      assert isinstance(value, jax.ShapeDtypeStruct), name
      assert (value.shape, value.dtype) == (random[name].shape, random[name].dtype)
  saved = jax.tree.map(
    lambda x: np.full(x.shape, 0.5, x.dtype), shapes["params"]["local"]["backbone"]
  )
  fields = ("embed_dim", "depths", "num_heads", "patch_size", "window_size")
  metadata = {
    "architecture": {"module": "SwinTransformer", **{f: c.model.backbone[f] for f in fields}},
    "preprocessing": {"mean": IMAGENET.mean, "std": IMAGENET.std},
  }
  weights.save_backbone({"params": saved}, metadata, tmp_path / "weights")
  c.model.pretrained = str(tmp_path / "weights")
  c.seed = 599
  found = state.initial(method, method.optimizer(1, 1), c.model.pretrained)
  for name, value in leaves({"params": found.params}).items():
    np.testing.assert_array_equal(value, 0.5 if "'backbone'" in name else random[name])
