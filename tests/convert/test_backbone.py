"""Files of backbone weights -> folders for `model.pretrained`: kinds, refusals, metadata."""

import hashlib
import json
import subprocess
import sys

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import default
from crn_jax import state
from crn_jax.convert import backbone, hub, recognise, timm, torchvision
from crn_jax.errors import UserError
from crn_jax.models.backbones import resnet
from crn_jax.workdir import weights
from tests.convert import small_swin
from tests.release import load_json
from tests.torch_models import torch

PARAMS = small_swin.params()
VARIABLES = {"params": PARAMS}
SAFETENSORS = {
  "timm": small_swin.timm_state_dict(PARAMS),
  "old": small_swin.old_timm_state_dict(PARAMS),
  "huggingface": small_swin.huggingface_state_dict(PARAMS),
  "huggingface_without_prefix": small_swin.huggingface_state_dict(PARAMS, prefix=""),
}


def write(path, tensors):
  path.parent.mkdir(exist_ok=True)
  safetensors.numpy.save_file(tensors, path)
  return path


def as_torch(tensors):
  return {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}


def assert_converts(source, tmp_path, expected=VARIABLES) -> str:
  said = backbone.convert(source, tmp_path / "out")
  loaded = weights.load_backbone(tmp_path / "out", expected)
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)
  return said


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_of_every_naming(name, tmp_path):
  tensors = SAFETENSORS[name]
  said = assert_converts(write(tmp_path / "model.safetensors", tensors), tmp_path)
  kind = name.split("_")[0]
  assert {"timm": "timm", "old": "Microsoft", "huggingface": "Hugging Face"}[kind] in said
  for left_out in ("head.weight", "relative_position_index", "attn_mask", "classifier.weight"):
    assert any(n.endswith(left_out) for n in tensors) == (left_out in said)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_torch_files_with_and_without_wrapper(wrapper, legacy, tmp_path):
  content = as_torch(SAFETENSORS["old"])
  if wrapper:
    content = {wrapper: content, "epoch": 3, "optimizer": {"lr": 0.1}}
  path = tmp_path / "swin.pth"
  torch.save(content, path, _use_new_zipfile_serialization=not legacy)
  said = assert_converts(path, tmp_path)
  assert ("left out (not the model): " in said) == bool(wrapper)


def test_half_precision_becomes_float32(tmp_path):
  tensors = as_torch(SAFETENSORS["timm"])
  torch.save({n: t.bfloat16() for n, t in tensors.items()}, tmp_path / "model.bin")
  rounded = jax.tree.map(lambda x: torch.from_numpy(x).bfloat16().float().numpy(), VARIABLES)
  assert_converts(tmp_path / "model.bin", tmp_path, rounded)


def test_folders_with_either_file(tmp_path):
  (tmp_path / "a").mkdir()
  torch.save(as_torch(SAFETENSORS["huggingface"]), tmp_path / "a" / "pytorch_model.bin")
  assert_converts(tmp_path / "a", tmp_path)
  with pytest.raises(UserError, match="none of model.safetensors, .*pytorch_model.bin"):
    backbone.convert(tmp_path, tmp_path / "other")


def test_metadata_tells_where_weights_come_from(tmp_path):
  path = write(tmp_path / "in" / "model.safetensors", SAFETENSORS["timm"])
  settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
  (tmp_path / "in" / "preprocessor_config.json").write_text(json.dumps(settings))
  backbone.convert(tmp_path / "in", tmp_path / "out")
  assert weights.read_metadata(tmp_path / "out") == {
    "kind": "Swin Transformer, names of timm",
    "architecture": {"module": "SwinTransformer"}
    | {
      key: list(value) if isinstance(value, tuple) else value
      for key, value in small_swin.ARGUMENTS.items()
    },
    "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"},
    "source": {
      "file": "model.safetensors",
      "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    },
  }


def test_every_wrong_tensor_is_named(tmp_path):
  tensors = dict(SAFETENSORS["timm"])
  del tensors["norm.weight"]
  tensors["layers.0.blocks.0.extra"] = np.zeros(2, np.float32)
  tensors["layers.1.blocks.0.attn.proj.weight"] = np.zeros((16, 15), np.float32)
  path = write(tmp_path / "model.safetensors", tensors)
  with pytest.raises(UserError) as error:
    backbone.convert(path, tmp_path / "out")
  message = str(error.value)
  assert message.startswith(f"{path}: not the weights of this Swin Transformer (3 differences)")
  assert "missing norm.weight" in message
  assert "unexpected layers.0.blocks.0.extra (2,)" in message
  assert "layers.1.blocks.0.attn.proj.weight has shape (16, 15)" in message
  assert not (tmp_path / "out").exists()


def test_a_part_of_query_key_value_that_is_missing_is_named(tmp_path):
  tensors = dict(SAFETENSORS["huggingface"])
  del tensors["swin.encoder.layers.0.blocks.0.attention.self.key.bias"]
  path = write(tmp_path / "model.safetensors", tensors)
  with pytest.raises(UserError, match="missing layers.0.blocks.0.attn.qkv.bias"):
    backbone.convert(path, tmp_path / "out")


@pytest.mark.parametrize(
  ("names", "looks_like"),
  [
    (["head.weight", "head.bias"], "a classifier alone"),
    (["cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], "Vision Transformer"),
    (["layers.0.blocks.0.attn.logit_scale", "layers.0.blocks.0.norm1.weight"], "Transformer V2"),
    (["a"], "no model that is known here"),
  ],
)
def test_strangers_are_refused_with_what_they_look_like(names, looks_like, tmp_path):
  path = write(tmp_path / "other.safetensors", dict.fromkeys(names, np.zeros(2, np.float32)))
  with pytest.raises(UserError, match=looks_like) as error:
    backbone.convert(path, tmp_path / "out")
  assert str(path) in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(UserError, match="none.safetensors: not found"):
    backbone.convert(tmp_path / "none.safetensors", tmp_path / "out")
  for name, content, message in (
    ("empty.pth", b"", "empty file"),
    ("text.safetensors", b"no", "neither a safetensors file nor one of torch.save: .*b'no'"),
    ("text.pth", b"no", "neither a safetensors file nor one of torch.save"),
  ):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
      backbone.convert(tmp_path / name, tmp_path / "out")


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path):
  path = write(tmp_path / "model.safetensors", SAFETENSORS["timm"])
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("mine")
  with pytest.raises(UserError, match="--force"):
    backbone.convert(path, tmp_path / "out")
  assert (tmp_path / "out" / "mine").read_text() == "mine"
  backbone.convert(path, tmp_path / "out", force=True)
  assert not (tmp_path / "out" / "mine").exists()
  weights.load_backbone(tmp_path / "out", VARIABLES)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "out"]


def test_a_failure_to_write_leaves_nothing_behind(tmp_path, monkeypatch):
  path = write(tmp_path / "model.safetensors", SAFETENSORS["timm"])
  backbone.convert(path, tmp_path / "out")

  def fail(*_, **__):
    raise OSError("disk full")

  monkeypatch.setattr(weights.ocp.Checkpointer, "save", fail)
  with pytest.raises(OSError, match="disk full"):
    backbone.convert(path, tmp_path / "out", force=True)
  weights.load_backbone(tmp_path / "out", VARIABLES)


def config_for(folder, **backbone_fields):
  config = default.get_config()
  config.model.backbone.update(small_swin.ARGUMENTS | backbone_fields)
  config.model.pretrained = str(folder)
  return config


def test_another_architecture_is_refused_by_field(tmp_path):
  backbone.convert(write(tmp_path / "m.safetensors", SAFETENSORS["timm"]), tmp_path / "out")
  state.check_pretrained(config_for(tmp_path / "out", window_size=4))
  with pytest.raises(ValueError) as error:
    state.check_pretrained(config_for(tmp_path / "out", embed_dim=16, depths=(2, 2)))
  assert "model.backbone.embed_dim: 8 in the weights, 16" in str(error.value)
  assert "model.backbone.depths: [1, 2] in the weights, (2, 2)" in str(error.value)
  with pytest.raises(ValueError, match="not a folder of backbone weights"):
    state.check_pretrained(config_for(tmp_path))


def test_tables_of_another_window_are_interpolated_on_loading(tmp_path):
  backbone.convert(write(tmp_path / "m.safetensors", SAFETENSORS["timm"]), tmp_path / "out")
  like = {"params": small_swin.params(side=64, window_size=4)}
  table = weights.load_backbone(tmp_path / "out", like)["params"]["stage0_block0"]["attn"]
  name = "relative_position_bias_table"
  expected = weights.resize_table(PARAMS["stage0_block0"]["attn"][name], (49, 1))
  np.testing.assert_array_equal(table[name], expected)
  with pytest.raises(ValueError, match=r"patch_embed/kernel: \(48, 8\) in the weights"):
    weights.load_backbone(tmp_path / "out", {"params": small_swin.params(embed_dim=16)})


def test_the_hub_is_asked_and_its_failure_told(tmp_path, monkeypatch):
  write(tmp_path / "repo" / "model.safetensors", SAFETENSORS["timm"])

  def found(repository, allow_patterns):
    assert repository == "timm/swin" and "model.safetensors" in allow_patterns
    return str(tmp_path / "repo")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
  assert_converts(hub.download("timm/swin"), tmp_path)

  def offline(*_, **__):
    raise ConnectionError("no route to host")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
  with pytest.raises(UserError, match="--hub=timm/swin: cannot be downloaded .*no route to host"):
    hub.download("timm/swin")


def test_safetensors_are_converted_without_pytorch(tmp_path):
  path = write(tmp_path / "model.safetensors", SAFETENSORS["timm"])
  program = (
    "import sys; sys.modules['torch'] = sys.modules['timm'] = None\n"
    "from crn_jax.convert import backbone\n"
    f"print(backbone.convert({str(path)!r}, {str(tmp_path / 'out')!r}))"
  )
  subprocess.run([sys.executable, "-c", program], check=True)
  weights.load_backbone(tmp_path / "out", VARIABLES)


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_published_names_are_all_known(size):
  """Both namings of timm give the same names, and sizes of the published layout."""
  model = load_json("timm_swin_keys.json")["models"][f"swin_{size}_patch4_window7_224"]
  keys = model["keys"]
  tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in keys.items()}
  kind, _ = recognise.recognise(tensors, "file")
  kept, left_out = recognise.split(tensors, kind.left_out)
  assert set(left_out) == {"head.fc.weight", "head.fc.bias"}
  arguments, params = timm.load(kind.rename(kept), "file")
  assert len(jax.tree.leaves(params)) == len(kept)
  assert arguments["window_size"] == 7 and arguments["depths"][3] == 2


def test_torchvision_resnet(tmp_path):
  """Every block and statistic of a narrow ResNet-50; its features: tests/models/test_resnet.py."""
  module = resnet.ResNet(width=8, depths=(3, 4, 6, 3))
  like = jax.eval_shape(
    lambda x: module.init(jax.random.key(0), x, train=False), np.zeros((1, 32, 32, 3))
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda s: rng.uniform(0.5, 1, s.shape).astype(np.float32), like)
  tensors = torchvision.to_torchvision(variables) | {"fc.bias": np.zeros(3, np.float32)}
  torch.save(as_torch(tensors), tmp_path / "resnet50.pth")
  said = assert_converts(tmp_path / "resnet50.pth", tmp_path, variables)
  assert "left out (classifier): fc.bias" in said
  architecture = weights.read_metadata(tmp_path / "out")["architecture"]
  assert architecture == {"module": "ResNet", "width": 8, "depths": [3, 4, 6, 3],
                          "expansion": 4}  # fmt: skip
