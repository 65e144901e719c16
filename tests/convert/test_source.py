"""Files and folders of weights, as libraries write them, and what is told of others."""

import hashlib
import json

import numpy as np
import pytest
import safetensors.torch

from crn_jax.convert import backbone, recognise, source
from crn_jax.errors import UserError
from tests.convert import small_swin
from tests.torch_models import timm, torch, torchvision, transformers

SIZES = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 2}


@pytest.fixture(scope="module")
def swin():
  return timm.models.swin_transformer.SwinTransformer(img_size=16, num_classes=3, **SIZES)


@pytest.fixture(scope="module")
def tensors(swin):
  return swin.state_dict()


def convert(path, content, tmp_path) -> str:
  torch.save(content, path)
  return backbone.convert(path, tmp_path / "out")


def prefixed(prefix, tensors):
  return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
  "prefix",
  ["module.", "model.", "backbone.", "encoder.", "_orig_mod.", "module._orig_mod.model.backbone."],
)
def test_names_with_a_prefix(prefix, tensors, tmp_path):
  said = convert(tmp_path / "f.pth", prefixed(prefix, tensors) | {"other": torch.ones(1)}, tmp_path)
  assert f"removed from the names: {prefix!r}" in said
  assert f"left out (not under {prefix!r}): other" in said
  assert f"left out (classifier): {prefix}head.fc.weight" in said


def test_prefixes_of_real_wrappers(swin, tmp_path):
  for wrapped, prefix in (
    (torch.nn.DataParallel(swin), "module."),
    (torch.compile(swin), "_orig_mod."),
    (torch.nn.DataParallel(torch.compile(swin)), "module._orig_mod."),
  ):
    torch.save(wrapped.state_dict(), tmp_path / "f.pth")
    kind, found = recognise.recognise(source.read(tmp_path / "f.pth").tensors, "f")
    assert (kind.name, found) == ("Swin Transformer, names of timm", prefix)


def test_prefixes_of_every_kind(tmp_path):
  resnet = torchvision.models.resnet50().state_dict()
  huggingface = transformers.SwinForImageClassification(
    transformers.SwinConfig(image_size=16, **SIZES)
  )
  for names, told in (
    (resnet, "torchvision"),
    (small_swin.old_timm_state_dict(small_swin.params()), "Microsoft"),
    (small_swin.huggingface_state_dict(small_swin.params()), "Hugging Face"),
    (huggingface.state_dict(), "Hugging Face"),
  ):
    kind, prefix = recognise.recognise(prefixed("model.", names), "f")
    assert told in kind.name and prefix == "model."


def test_several_models_in_one_file_are_named(tensors, tmp_path):
  content = prefixed("student.backbone.", tensors) | prefixed("teacher.backbone.", tensors)
  with pytest.raises(UserError, match="several models, .*'student.backbone.', 'teacher.backbone.'"):
    convert(tmp_path / "f.pth", content, tmp_path)


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
  ("wrap", "key"),
  [
    (lambda t: {"model_state_dict": t, "optimizer": OPTIMIZER, "epoch": 3}, "model_state_dict"),
    (lambda t: {"net": t, "acc": 0.5, "epoch": 3}, "net"),
    (lambda t: {"model_ema": t}, "model_ema"),
    (lambda t: {"state_dict_ema": t, "args": None}, "state_dict_ema"),
    (lambda t: {"anything": t, "rng": torch.ones(3), "optimizer": OPTIMIZER}, "anything"),
    (lambda t: {"teacher": t, "student": dict(t)}, "teacher"),
    (lambda t: {"state_dict": t, "state_dict_ema": dict(t)}, "state_dict"),
    (lambda t: {"checkpoint": {"model": t, "model_ema": dict(t)}}, "checkpoint.model"),
    (lambda t: {"epoch": 3, "meta": {"x": torch.ones(1)}} | t, ""),
  ],
)
def test_keys_under_which_weights_are_kept(wrap, key, tensors, tmp_path):
  said = convert(tmp_path / "f.pth", wrap(dict(tensors)), tmp_path)
  assert (f"taken from {key!r} in the file" in said) == bool(key)


def test_a_whole_model_under_a_key(swin, tmp_path):
  said = convert(tmp_path / "f.pth", {"model": torch.nn.DataParallel(swin), "epoch": 1}, tmp_path)
  assert "taken from 'model'" in said and "'module.'" in said


def test_keys_that_cannot_be_told_apart_are_listed(tensors, tmp_path):
  with pytest.raises(UserError, match="several sets of tensors.*: 'first', 'second'"):
    convert(tmp_path / "f.pth", {"first": dict(tensors), "second": dict(tensors)}, tmp_path)
  with pytest.raises(UserError, match="holds no tensors; its keys are 'epoch', 'log'"):
    convert(tmp_path / "f.pth", {"epoch": 3, "log": {"loss": 0.5}}, tmp_path)
  with pytest.raises(UserError, match="holds a list, not weights"):
    convert(tmp_path / "f.pth", [1, 2], tmp_path)


def test_only_wanted_tensors_are_read(tensors, tmp_path, monkeypatch):
  """The optimizer's are two thirds of a checkpoint."""
  torch.save({"model": dict(tensors), "optimizer": OPTIMIZER}, tmp_path / "f.pth")
  read = []
  original = source.pickles.Tensor.read
  monkeypatch.setattr(
    source.pickles.Tensor, "read", lambda self: read.append(self.shape) or original(self)
  )
  backbone.convert(tmp_path / "f.pth", tmp_path / "out")
  assert len(read) == len(tensors) - 2  # Without the classifier's.


def test_swin_v2_is_named(tmp_path):
  config = transformers.Swinv2Config(image_size=16, **SIZES)
  transformers.Swinv2ForImageClassification(config).save_pretrained(tmp_path / "huggingface")
  model = timm.models.swin_transformer_v2.SwinTransformerV2(img_size=16, **SIZES)
  torch.save(prefixed("module.", model.state_dict()), tmp_path / "timm.pth")
  for path in ("huggingface", "timm.pth"):
    with pytest.raises(UserError, match="It looks like a Swin Transformer V2"):
      backbone.convert(tmp_path / path, tmp_path / "out")


@pytest.mark.parametrize(
  ("make", "looks_like"),
  [
    (lambda: timm.create_model("vit_tiny_patch16_224"), r"a Vision Transformer \(ViT\)"),
    (lambda: timm.create_model("convnext_atto"), "no model that is known here"),
  ],
)
def test_other_models_of_the_libraries_are_named(make, looks_like):
  with pytest.raises(UserError, match=f"It looks like {looks_like}"):
    recognise.recognise(prefixed("module.", make().state_dict()), "f")


def test_formats_are_told_by_their_first_bytes(tensors, tmp_path):
  safetensors.torch.save_file(tensors, tmp_path / "a.pth")
  torch.save(tensors, tmp_path / "b.safetensors")
  torch.save(tensors, tmp_path / "c.ckpt", _use_new_zipfile_serialization=False)
  for name in ("a.pth", "b.safetensors", "c.ckpt"):
    found = source.read(tmp_path / name).tensors
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
      np.testing.assert_array_equal(found[key], tensor.numpy())


def test_a_header_that_begins_like_a_pickle(tmp_path):
  """A header of 640 bytes, as safetensors writes its length: 80 02 00 ..."""
  for n in range(600):
    content = safetensors.torch.save({"a": torch.ones(1)}, {"n": "x" * n})
    if content.startswith(b"\x80\x02"):
      break
  (tmp_path / "f.safetensors").write_bytes(content)
  np.testing.assert_array_equal(source.read(tmp_path / "f.safetensors").tensors["a"], [1])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 123\n" % (b"0" * 64)


@pytest.mark.parametrize(
  ("content", "told"),
  [
    (POINTER, "a Git LFS pointer in the place of the file: run `git lfs pull`"),
    (b"<!DOCTYPE html><html>", "a web page"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\xff" * 64, r"begins with b'\\xff"),
    (b"\x40" + b"\0" * 7 + b'{"a":', "not a readable safetensors file"),
    (b"\xff" * 8 + b'{"a":', "not a readable safetensors file"),
    (b"PK\x03\x04 and no more", "not a readable PyTorch file"),
    (b"\x80\x02}q\x00.", "not a PyTorch file"),
  ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_what_is_no_file_of_weights_is_named(name, content, told, tmp_path, monkeypatch):
  (tmp_path / name).write_bytes(content)
  monkeypatch.setattr(source, "sha256", lambda _: pytest.fail("read the whole file before"))
  with pytest.raises(UserError, match=rf"{name}: .*{told}"):
    backbone.convert(tmp_path / name, tmp_path / "out")


@pytest.mark.parametrize(
  "dtype", ["bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]
)
@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file])
def test_every_type_of_number_becomes_float32(save, dtype, tensors, tmp_path):
  given = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
  save(given, tmp_path / "f")
  found = source.read(tmp_path / "f").tensors
  for name, tensor in given.items():
    np.testing.assert_array_equal(found[name].astype(np.float32), tensor.float().numpy())
  backbone.convert(tmp_path / "f", tmp_path / "out")


def test_types_that_are_not_known_are_named(tmp_path):
  header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
  (tmp_path / "f.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
  with pytest.raises(UserError, match=r"a \(F4\)"):
    source.read(tmp_path / "f.safetensors")


def shards(folder, **options):
  model = transformers.SwinModel(transformers.SwinConfig(image_size=16, **SIZES))
  model.save_pretrained(folder, max_shard_size="5KB", **options)
  return model.state_dict()


def test_folders_of_several_files(tmp_path):
  tensors = shards(tmp_path / "a")
  index = tmp_path / "a" / "model.safetensors.index.json"
  files = sorted((tmp_path / "a").glob("model-*.safetensors"))
  assert len(files) > 1
  found = source.read(tmp_path / "a")
  assert found.path == index and list(found.files) == files
  assert len(found.tensors) >= len(tensors)
  said = backbone.convert(tmp_path / "a", tmp_path / "out")
  assert f"recognised {index}: Swin Transformer, names of transformers" in said
  backbone.convert(index, tmp_path / "out", force=True)
  # As torch.save wrote them before.
  (tmp_path / "b").mkdir()
  names = {}
  for i, file in enumerate(files):
    torch.save(safetensors.torch.load_file(file), tmp_path / "b" / f"pytorch_model-{i}.bin")
    names |= dict.fromkeys(safetensors.torch.load_file(file), f"pytorch_model-{i}.bin")
  (tmp_path / "b" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
  backbone.convert(tmp_path / "b", tmp_path / "other")


def test_indices_that_do_not_fit_are_refused(tmp_path):
  shards(tmp_path)
  path = tmp_path / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  names = index["weight_map"]
  first = min(names)

  def assert_refused(content, told):
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=told):
      source.read(tmp_path)

  assert_refused({}, "no weight_map")
  assert_refused([1], "no weight_map")
  assert_refused({"weight_map": {first: 1}}, "no weight_map")
  for outside in ("../x.safetensors", "/etc/passwd", "a/b.safetensors"):
    assert_refused({"weight_map": names | {first: outside}}, "outside of its folder")
  for absent in ("none.safetensors", "..", ""):
    assert_refused({"weight_map": names | {first: absent}}, f"not there: {absent}")
  assert_refused({"weight_map": names | {"new": names[first]}}, r"not in both: new \(")
  assert_refused({"weight_map": {n: f for n, f in names.items() if n != first}}, f"both: {first}")
  other = next(shard for shard in names.values() if shard != names[first])
  assert_refused({"weight_map": names | {first: other}}, rf"not in both: {first} \({other}\)")
  path.write_text("{")
  with pytest.raises(UserError, match="index.json: not valid JSON"):
    source.read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(value, tensors, tmp_path):
  tensors = {name: tensor.clone() for name, tensor in tensors.items()}
  tensors["norm.bias"][3] = value
  tensors["layers.0.blocks.0.attn.qkv.weight"][1, :2] = value
  with pytest.raises(UserError) as error:
    convert(tmp_path / "f.pth", tensors, tmp_path)
  assert "norm.bias holds 1 of 16 values that are not finite" in str(error.value)
  assert "layers.0.blocks.0.attn.qkv.weight holds 2 of 192 values" in str(error.value)
  assert "(2 differences)" in str(error.value) and not (tmp_path / "out").exists()


def test_numbers_beyond_float32_and_of_other_types_are_named(tensors, tmp_path):
  tensors = dict(tensors)
  tensors["norm.bias"] = torch.full((16,), 1e300, dtype=torch.float64)
  tensors["norm.weight"] = torch.ones(16, dtype=torch.int8)
  tensors["patch_embed.norm.bias"] = torch.ones(8, dtype=torch.complex64)
  with pytest.raises(UserError) as error:
    convert(tmp_path / "f.pth", tensors, tmp_path)
  assert "norm.bias holds 16 of 16 values that are not finite in float32" in str(error.value)
  assert "norm.weight has numbers of type int8" in str(error.value)
  assert "patch_embed.norm.bias has numbers of type complex64" in str(error.value)


def test_negative_variances_are_named(tmp_path):
  tensors = torchvision.models.resnet50(width_per_group=64).state_dict()
  tensors["layer1.0.bn1.running_var"][5] = -1e-3
  with pytest.raises(
    UserError, match="layer1.0.bn1.running_var is a variance, and is negative in 1"
  ):
    convert(tmp_path / "f.pth", tensors, tmp_path)


def test_large_files_show_their_progress(tmp_path, capsys, monkeypatch):
  (tmp_path / "file").write_bytes(b"a")
  source.sha256([tmp_path / "file"])
  assert not capsys.readouterr().err
  monkeypatch.setattr(source, "_LARGE", 1)
  assert source.sha256([tmp_path / "file"]) == hashlib.sha256(b"a").hexdigest()
  assert "SHA-256" in capsys.readouterr().err
