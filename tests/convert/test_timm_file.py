"""Files of timm weights -> files for `model.pretrained`, with weights that the test writes."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from crn_jax import weights
from crn_jax.convert import timm
from crn_jax.models import swin

ARGUMENTS = {
  "embed_dim": 8,
  "depths": (1, 2),
  "num_heads": (1, 2),
  "patch_size": 4,
  "window_size": 2,
}


@pytest.fixture
def params():
  """Made-up parameters of a small backbone."""
  module = swin.SwinTransformer(**ARGUMENTS)
  shapes = jax.eval_shape(
    lambda x: module.init(jax.random.key(0), x, train=False)["params"], np.zeros((1, 16, 16, 3))
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def timm_state_dict(params) -> dict:
  """The same weights with timm's names and layouts (the inverse of the conversion)."""
  out = {}
  for path, value in traverse_util.flatten_dict(params).items():
    if path == ("patch_embed", "kernel"):
      value = value.reshape(4, 4, 3, 8).transpose(3, 2, 0, 1)
    elif path[-1] == "kernel":
      value = value.T
    out[timm.timm_name(path)] = np.ascontiguousarray(value)
  return out


def test_a_file_is_converted_and_loads_into_the_backbone(params, tmp_path):
  safetensors.numpy.save_file(timm_state_dict(params), tmp_path / "timm.safetensors")
  said = timm.convert_file(tmp_path / "timm.safetensors", tmp_path / "out" / "swin.safetensors")
  assert str(ARGUMENTS) in said  # the sizes are read off the weights
  loaded = weights.load_backbone(tmp_path / "out" / "swin.safetensors", {"params": params})
  jax.tree.map(np.testing.assert_array_equal, loaded, {"params": params})


def test_an_existing_file_is_replaced_only_on_demand(params, tmp_path):
  safetensors.numpy.save_file(timm_state_dict(params), tmp_path / "timm.safetensors")
  target = tmp_path / "swin.safetensors"
  target.write_text("mine")
  with pytest.raises(FileExistsError, match="--force"):
    timm.convert_file(tmp_path / "timm.safetensors", target)
  assert target.read_text() == "mine"
  timm.convert_file(tmp_path / "timm.safetensors", target, replace=True)
  weights.load_backbone(target, {"params": params})


def test_other_weights_are_refused_with_the_differences(params, tmp_path):
  path = tmp_path / "swin.safetensors"
  weights.save_backbone({"params": params}, path)
  del params["norm"]
  with pytest.raises(ValueError, match=r"params/norm/scale: \(16,\) in the file, absent"):
    weights.load_backbone(path, {"params": params})


def test_files_that_are_no_swin_weights_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="none.safetensors: not found"):
    timm.convert_file(tmp_path / "none.safetensors", tmp_path / "out")
  (tmp_path / "text.safetensors").write_text("no")
  with pytest.raises(ValueError, match="not a readable safetensors file"):
    timm.convert_file(tmp_path / "text.safetensors", tmp_path / "out")
  safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "other.safetensors")
  with pytest.raises(ValueError, match="not the weights of a Swin Transformer"):
    timm.convert_file(tmp_path / "other.safetensors", tmp_path / "out")
