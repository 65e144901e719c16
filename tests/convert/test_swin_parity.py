"""Weights of timm and transformers, converted: every stage has the features of the original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch

from crn_jax.convert import backbone
from crn_jax.models.backbones import swin
from crn_jax.workdir import weights
from tests.torch_models import randomize, timm, torch, transformers

# Widths, heads, windows and grids as published; fewer blocks.
LAYOUTS = {
  "tiny": {"embed_dim": 96, "depths": (2, 2, 1, 2), "num_heads": (3, 6, 12, 24)},
  "base": {"embed_dim": 128, "depths": (1, 2, 1, 1), "num_heads": (4, 8, 16, 32)},
  "large": {"embed_dim": 192, "depths": (2, 1, 1, 1), "num_heads": (6, 12, 24, 48)},
}
IMAGE = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)


def converted_features(source, folder, layout) -> list[np.ndarray]:
  """Stages and last map of our backbone with the converted weights, channels last."""
  backbone.convert(source, folder)
  found = weights.read_metadata(folder)["architecture"]
  module = swin.SwinTransformer(**layout, window_size=7)
  assert found == {k: list(v) if isinstance(v, tuple) else v for k, v in layout.items()} | {
    "module": "SwinTransformer",
    "patch_size": 4,
    "window_size": 7,
  }
  like = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), IMAGE)
  params = weights.load_backbone(folder, like)
  out = jax.jit(lambda p, x: module.apply(p, x, train=False))(params, IMAGE)
  return [*map(np.asarray, out.stages), np.asarray(out.map)]


def assert_same_features(found, expected):
  assert len(found) == len(expected) == 5
  for mine, theirs in zip(found, expected, strict=True):
    theirs = theirs.detach().numpy().reshape(mine.shape)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_timm(name, tmp_path, quick_compile):
  model = timm.models.swin_transformer.SwinTransformer(**LAYOUTS[name], window_size=7).eval()
  randomize(model)
  safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
  expected = []
  parts = [layer.downsample for layer in model.layers[1:]] + [model.layers[3], model.norm]
  for part in parts:
    part.register_forward_hook(lambda module, given, out: expected.append(out))
  with torch.no_grad():
    model.forward_features(torch.from_numpy(IMAGE.transpose(0, 3, 1, 2).copy()))
  found = converted_features(tmp_path / "model.safetensors", tmp_path / "out", LAYOUTS[name])
  assert_same_features(found, expected)


def test_transformers_folder(tmp_path, quick_compile):
  layout = LAYOUTS["tiny"]
  config = transformers.SwinConfig(**layout, window_size=7)
  model = transformers.SwinForImageClassification(config).eval()
  randomize(model)
  model.save_pretrained(tmp_path / "swin")
  with torch.no_grad():
    out = model.swin(
      torch.from_numpy(IMAGE.transpose(0, 3, 1, 2).copy()), output_hidden_states=True
    )
  expected = [*out.hidden_states[1:], out.last_hidden_state]
  assert_same_features(converted_features(tmp_path / "swin", tmp_path / "out", layout), expected)


@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7), (7, 8), (4, 7)])
def test_tables_of_another_window(old, new):
  table = np.random.default_rng(1).normal(size=((2 * old - 1) ** 2, 3)).astype(np.float32)
  shape = ((2 * new - 1) ** 2, 3)
  expected = timm.layers.resize_rel_pos_bias_table(torch.from_numpy(table), (new, new), shape)
  # timm computes the knots in float32.
  np.testing.assert_allclose(weights.resize_table(table, shape), expected.numpy(), atol=1e-5)
  assert jnp.shape(weights.resize_table(table, table.shape)) == table.shape
