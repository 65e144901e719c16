"""Initial values: those of the module's `init`, bit by bit, without compiling the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax import initial_values, state
from crn_jax.models.backbones import remat
from crn_jax.models.preprocessing import IMAGENET
from crn_jax.workdir import weights
from tests import tiny_model

KEY = jax.random.key(599)


def leaves(tree) -> dict:
  paths, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


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


def test_values_drawn_alike_share_a_program_and_nothing_else_is_compiled(monkeypatch):
  compiled = []
  original = initial_values._compile

  def recording(programs):
    compiled.extend(programs)
    return original(programs)

  monkeypatch.setattr(initial_values, "_compile", recording)

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
  assert len(compiled) == 4
  assert not any("dot_general" in text for text in compiled)


def several(key):
  """Draws of several kinds and sizes, by keys of the top and by keys made on the way."""
  a, b, c, d = jax.random.split(key, 4)
  long = initial_values._PIECE
  made_on_the_way = jax.jit(lambda key: jax.random.uniform(jax.random.fold_in(key, 3), (5,)))
  return {
    "longer than a piece": jax.random.normal(a, (2, long // 2 + 1)),
    "a piece": jax.random.uniform(a, (long,), minval=-0.3, maxval=0.1),
    "shorter": jax.random.truncated_normal(b, -2, 2, (7, 3)),
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
  for name, value in expected.items():
    assert found[name].dtype == value.dtype
    np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_random_bits_are_compiled_once_for_all(monkeypatch):
  """Most of a program's compilation would go into them."""
  texts = []
  original = initial_values._lower

  def recording(*arguments):
    lowered, draws = original(*arguments)
    texts.append(lowered.as_text())
    return lowered, draws

  monkeypatch.setattr(initial_values, "_lower", recording)
  initial_values.draw(tiny_model.model(tiny_model.config()).init, KEY)
  assert len(texts) > 10
  assert not any("threefry" in text for text in texts)


@pytest.mark.parametrize("choice", remat.CHOICES)
def test_whatever_blocks_keep_no_program_of_initial_values_holds_the_model(choice, monkeypatch):
  """The same values for all, and no matrix product compiled for them."""
  compiled = []
  original = initial_values._compile

  def recording(programs):
    compiled.extend(programs)
    return original(programs)

  c = tiny_model.config()
  expected = leaves(initial_values.draw(tiny_model.model(c).init, KEY))
  c.model.remat = choice
  monkeypatch.setattr(initial_values, "_compile", recording)
  found = leaves(initial_values.draw(tiny_model.model(c).init, KEY))
  assert found.keys() == expected.keys()
  for name, value in found.items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)
  assert compiled
  assert not any("dot_general" in text for text in compiled)


def test_no_two_values_share_a_buffer():
  """A training step is given the buffers of the state to reuse: each may be given once."""
  found = initial_values.draw(lambda key: [jnp.zeros(3), jnp.zeros(3)], KEY)
  assert found[0].unsafe_buffer_pointer() != found[1].unsafe_buffer_pointer()


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
