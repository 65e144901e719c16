"""CRN's composition on towers: their features in the place of Swin's and the LSTM's."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax import configuration, pretrained, state, train
from crn_jax.convert import backbone
from crn_jax.methods import registry
from crn_jax.models.crn_towers import TowerBranch
from crn_jax.models.dual_encoder import DualEncoder
from tests import small_towers, tiny


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """family -> folder of converted towers."""
  folder = tmp_path_factory.mktemp("towers")
  for family in ("clip", "siglip"):
    small_towers.save(family, folder / family)
    backbone.convert(folder / family, folder / f"{family}_converted")
  return {family: str(folder / f"{family}_converted") for family in ("clip", "siglip")}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tiny.draw(tmp_path_factory.mktemp("data"))


def config_of(folder, root):
  c, small = importlib.import_module("configs.crn_towers").get_config(), tiny.config(root)
  for name in ("num_epochs", "batch_size"):
    c[name] = small[name]
  c.data.update(root=str(root), category="dress")
  c.eval.update(small.eval)
  c.model.update(pretrained=folder, feature_dim=32, map_dim=32)
  pretrained.describe(c)
  configuration.check(c)
  return c


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_maps_and_words_are_the_towers_own(family, weights, root):
  config = config_of(weights[family], root)
  method = registry.create(config, 350)
  variables = state.initial_variables(method, method.config.model.pretrained)
  pictures = np.random.default_rng(0).normal(size=(2, 23, 23, 3)).astype(np.float32)
  ids = np.full((2, config.data.max_words), 1, np.int32)
  towers = DualEncoder(method.encoder_config)
  for kind, branch in method.branches.items():
    own = {c: tree[kind] for c, tree in variables.items()}
    params = {"params": own["params"]["encoder"]}
    images = towers.apply(params, pictures, method=DualEncoder.encode_images)
    texts = towers.apply(params, ids, method=DualEncoder.encode_texts)
    maps = branch.apply(own, pictures, train=True, method=TowerBranch.image_maps)
    np.testing.assert_allclose(maps.map, images.map, atol=1e-6)
    assert [stage.shape for stage in maps.stages] == [(2, 4, 4, 24)] * 3
    layers = towers.apply(params, pictures, method=lambda m, x: m.image(x, each=True).layers)
    first = layers[0][:, 1:] if family == "clip" else layers[0]  # Of three blocks.
    np.testing.assert_allclose(maps.stages[0].reshape(first.shape), first, atol=1e-6)
    words = branch.apply(own, ids, method=TowerBranch.word_features)
    dense = own["params"]["word_fc"]
    np.testing.assert_allclose(words, texts.tokens @ dense["kernel"] + dense["bias"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_what_no_loss_reaches_is_left_alone_and_the_rest_is_trained(family, weights, root):
  config = config_of(weights[family], root)
  method = registry.create(config, 350)
  rng = np.random.default_rng(0)
  pictures = rng.normal(size=(2, 4, 23, 23, 3)).astype(np.float32)
  ids = rng.integers(5, 200, (4, config.data.max_words)).astype(np.int32)
  ids[:, -2:] = 1
  batch = {"reference": pictures[0], "target": pictures[1], "tokens": ids,
           "token_mask": ids != 1}  # fmt: skip
  tx = method.optimizer(steps_per_epoch=1, total_steps=1)
  before = state.initial(method, tx, config.model.pretrained)
  after, metrics = jax.jit(lambda s, b: method.update(tx, s, b))(before, batch)
  assert all(jnp.isfinite(value).all() for value in metrics.values())
  unused = method.unused_parameters()
  for path, old in jax.tree_util.tree_leaves_with_path(before.params):
    new = after.params
    for key in path:
      new = new[key.key]
    alone = any(key.key in unused for key in path)
    assert np.array_equal(old, new) == alone, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_a_run_is_trained_evaluated_and_read_from_its_folder_alone(weights, root, tmp_path):
  config = config_of(weights["clip"], root)
  shown = train.train(config, tmp_path / "run")
  assert str(tmp_path / "run" / "pictures" / "attention_dress.png") in shown
  before = json.loads((tmp_path / "run" / "eval.json").read_text())
  saved = importlib.import_module("configs.run").get_config(str(tmp_path / "run"))
  pretrained.describe(saved)
  saved.model.pretrained = config.model.pretrained
  train.evaluate_run(saved, tmp_path / "run", "last")
  after = json.loads((tmp_path / "run" / "eval.json").read_text())
  assert after["protocols"] == before["protocols"]
