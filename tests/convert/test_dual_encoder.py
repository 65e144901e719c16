"""Hugging Face folders of CLIP and SigLIP -> folders for `model.pretrained`."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch

from crn_jax import pretrained
from crn_jax.convert import backbone, dual_encoder, hub
from crn_jax.errors import UserError
from crn_jax.models.dual_encoder import DualEncoderConfig
from crn_jax.workdir import weights
from tests import small_towers
from tests.small_towers import FAMILIES
from tests.torch_models import torch, transformers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """family -> folder of a whole model."""
  made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
  for family, folder in made.items():
    small_towers.save(family, folder)
  return made


@pytest.fixture
def clip(folders, tmp_path):
  """A copy, to be spoiled."""
  return shutil.copytree(folders["clip"], tmp_path / "clip")


def edit(path, **fields):
  """Changes an object in a JSON file; None removes a field, dots lead into groups."""
  content = json.loads(path.read_text())
  for name, value in fields.items():
    *groups, field = name.split(".")
    group = content
    for key in groups:
      group = group[key]
    group[field] = value
    if value is None:
      del group[field]
  path.write_text(json.dumps(content))


def params_of(folder):
  config = pretrained.read(str(folder))
  like = jax.eval_shape(
    lambda: dual_encoder.DualEncoder(config).init(
      jax.random.key(0),
      np.zeros((1, config.image.image_size, config.image.image_size, 3)),
      np.zeros((1, config.text.length), np.int32),
    )
  )
  return weights.load_backbone(folder, dict(like))["params"]


def reference(folder):
  """Parameters as read from a folder of safetensors."""
  tensors = safetensors.torch.load_file(folder / "model.safetensors")
  tensors = {n: t.numpy() for n, t in tensors.items() if not n.startswith("logit_")}
  return dual_encoder.to_params(dual_encoder.read_config(folder), tensors, str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_becomes_one_with_description_and_tokenizer(family, folders, tmp_path):
  said = backbone.convert(folders[family], tmp_path / "out")
  found = pretrained.read(str(tmp_path / "out"))
  assert found == dual_encoder.read_config(folders[family])
  assert (found.image.width, found.image.depth, found.text.width, found.text.depth) == (
    24, 3, 28, 2,
  )  # fmt: skip
  assert found.preprocessing.mean == tuple(small_towers.MEAN)
  assert (found.preprocessing.interpolation, found.preprocessing.squeeze) == {
    "clip": ("bicubic", False), "siglip": ("bicubic", True), "siglip2": ("bilinear", False),
  }[family]  # fmt: skip
  assert found.text.length == small_towers.LENGTH[family]
  jax.tree.map(
    np.testing.assert_array_equal, params_of(tmp_path / "out"), reference(folders[family])
  )
  assert {"clip": "CLIP", "siglip": "SigLIP", "siglip2": "SigLIP"}[family] in said
  assert "logit_scale" in said and "24, 23 px" in said or family == "siglip2"
  for name in ("config.json", {"clip": "merges.txt", "siglip": "spiece.model",
                               "siglip2": "tokenizer.json"}[family]):  # fmt: skip
    copied = tmp_path / "out" / "tokenizer" / name
    assert copied.read_bytes() == (folders[family] / name).read_bytes()


def test_every_way_of_keeping_the_tensors(folders, tmp_path):
  expected = reference(folders["clip"])
  model = transformers.CLIPModel.from_pretrained(folders["clip"])
  others = [p for p in folders["clip"].iterdir() if p.suffix != ".safetensors"]
  sharded, pickled, wrapped = (tmp_path / name for name in ("sharded", "pickled", "wrapped"))
  model.save_pretrained(sharded, max_shard_size="30KB")
  assert len(list(sharded.glob("model-*.safetensors"))) > 1
  # As BGE-VL's and OpenAI's first files: with constants, in half precision.
  tensors = {n: t.clone() for n, t in model.state_dict().items()}
  tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
  for folder in (pickled, wrapped):
    folder.mkdir()
  torch.save(tensors, pickled / "pytorch_model.bin")
  torch.save(
    {"model": {f"module.{n}": t for n, t in tensors.items()}}, wrapped / "pytorch_model.bin"
  )
  for folder in (sharded, pickled, wrapped):
    for path in others:
      shutil.copyfile(path, folder / path.name)
    said = backbone.convert(folder, tmp_path / f"out_{folder.name}")
    assert ("position_ids" in said) == (folder != sharded)
    jax.tree.map(
      np.testing.assert_array_equal, params_of(tmp_path / f"out_{folder.name}"), expected
    )
  half = tmp_path / "half"
  shutil.copytree(folders["clip"], half)
  model.half().save_pretrained(half)
  backbone.convert(half, tmp_path / "out_half")
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float16).astype(np.float32)),
    params_of(tmp_path / "out_half"), expected,
  )  # fmt: skip


def test_sizes_that_config_json_leaves_out_are_those_of_transformers(clip):
  for field in ("layer_norm_eps", "hidden_act"):
    edit(clip / "config.json", **{f"vision_config.{field}": None, f"text_config.{field}": None})
  found = dual_encoder.read_config(clip)
  assert found.image.epsilon == 1e-5 and found.text.activation == "quick_gelu"


def test_preprocessing_of_transformers_5_is_found(clip):
  content = json.loads((clip / "preprocessor_config.json").read_text()) | {"resample": 2}
  (clip / "preprocessor_config.json").unlink()
  (clip / "processor_config.json").write_text(json.dumps({"image_processor": content}))
  assert dual_encoder.read_config(clip).interpolation == "bilinear"


def test_a_folder_as_bge_vl_has_it(clip, tmp_path):
  """A CLIP with code of its own, which is not run, and the wrong end of CLIP's first files."""
  edit(
    clip / "config.json",
    **{"auto_map": {"AutoModel": "modeling_MMRet_CLIP.CLIPModel"}, "torch_dtype": "float32",
       "transformers_version": "4.45.2", "text_config.eos_token_id": 2},
  )  # fmt: skip
  (clip / "modeling_MMRet_CLIP.py").write_text("raise SystemExit('code of the folder was run')\n")
  backbone.convert(clip, tmp_path / "out")
  found = pretrained.read(str(tmp_path / "out"))
  assert (found.family, found.text.pooling) == ("clip", "largest_id")
  assert not (tmp_path / "out" / "tokenizer" / "modeling_MMRet_CLIP.py").exists()


def test_names_of_open_clip_are_told(tmp_path):
  names = ("visual.transformer.resblocks.0.ln_1.weight", "token_embedding.weight")
  tensors = {name: torch.zeros(2) for name in names}
  safetensors.torch.save_file(tensors, tmp_path / "open_clip_model.safetensors")
  with pytest.raises(UserError, match="looks like a CLIP with the names of OpenAI's release"):
    backbone.convert(tmp_path / "open_clip_model.safetensors", tmp_path / "out")


def unlink(name):
  return lambda folder: (folder / name).unlink()


def config_with(**fields):
  return lambda folder: edit(folder / "config.json", **fields)


def preprocessing_with(**fields):
  return lambda folder: edit(folder / "preprocessor_config.json", **fields)


def keep(prefix):
  """Leaves the tensors of one tower alone."""

  def spoil(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if n.startswith(prefix)}
    safetensors.torch.save_file(kept, folder / "model.safetensors")

  return spoil


def rename_all(folder):
  tensors = safetensors.torch.load_file(folder / "model.safetensors")
  safetensors.torch.save_file(
    {f"other.{i}": t for i, t in enumerate(tensors.values())}, folder / "model.safetensors"
  )
  edit(folder / "config.json", model_type="blip")


SPOILT = {
  "no config": (unlink("config.json"), "config.json: not found; the sizes"),
  "no preprocessing": (unlink("preprocessor_config.json"), "image_mean and image_std not found"),
  "no tokenizer": (unlink("merges.txt"), "no tokenizer in this folder; it needs one of"),
  "another type": (config_with(model_type="clipseg"), "a model of type 'clipseg'; expected one of"),
  "another model": (rename_all, "Its config.json names the model 'blip'"),
  "other width": (
    config_with(**{"vision_config.hidden_size": 27}),
    "vision_model.post_layernorm.weight has shape \\(24,\\) where \\(27,\\) is expected",
  ),
  "too deep": (config_with(**{"text_config.num_hidden_layers": 3}), "missing text_model.encoder.l"),
  "not deep": (config_with(**{"vision_config.num_hidden_layers": 2}), "unexpected vision_model.e"),
  "other pictures": (
    lambda folder: [
      config_with(**{"vision_config.image_size": 30})(folder),
      preprocessing_with(**small_towers.preprocessing("clip", 30))(folder),
    ],
    "position_embedding.weight has shape \\(17, 24\\) where \\(37, 24\\) is expected",
  ),
  "other words": (
    config_with(**{"text_config.vocab_size": 400}),
    "token_embedding.weight has shape \\(350, 28\\) where \\(400, 28\\)",
  ),
  "heads": (config_with(**{"vision_config.num_attention_heads": 5}), "can read .*heads"),
  "activation": (config_with(**{"text_config.hidden_act": "relu"}), "text.activation = 'relu'"),
  "channels": (config_with(**{"vision_config.num_channels": 4}), "num_channels is 4; expected 3"),
  "type of a size": (
    config_with(**{"vision_config.hidden_size": "many"}), "not a configuration that transformers",
  ),
  "mean": (preprocessing_with(image_mean=[0.5]), "image_mean is \\[0.5\\]; expected three"),
  "std": (preprocessing_with(image_std=[0.5, 0.5, 0]), "image_std is .*; expected three"),
  "resample": (preprocessing_with(resample=0), "resample is 0; expected 2"),
  "no text tower": (keep("vision_model."), "an image tower without its text tower"),
  "no image tower": (keep("text_model."), "a text tower without its image tower"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_is_named(name, clip, tmp_path):
  spoil, message = SPOILT[name]
  spoil(clip)
  with pytest.raises(UserError, match=message) as error:
    backbone.convert(clip, tmp_path / "out")
  assert str(clip) in str(error.value)
  assert not (tmp_path / "out").exists()


def test_siglip_without_a_pooling_is_refused(folders, tmp_path):
  folder = shutil.copytree(folders["siglip"], tmp_path / "siglip")
  edit(folder / "config.json", **{"vision_config.vision_use_head": False})
  with pytest.raises(UserError, match="vision_use_head is false"):
    dual_encoder.read_config(folder)
  edit(folder / "config.json", **{"vision_config.vision_use_head": True,
                                  "text_config.projection_size": 20})  # fmt: skip
  with pytest.raises(UserError, match="texts have vectors of 20, images of 24"):
    dual_encoder.read_config(folder)


def test_a_description_that_is_none_is_refused_by_field(folders):
  content = dual_encoder.read_config(folders["clip"]).to_dict()
  with pytest.raises(UserError, match=r"missing \['image.heads'\], unknown \['image.head'\]"):
    image = {k: v for k, v in content["image"].items() if k != "heads"}
    DualEncoderConfig.from_dict(content | {"image": image | {"head": 3}})
  with pytest.raises(UserError, match="image_size = 3: smaller than a patch of 5"):
    DualEncoderConfig.from_dict(content).with_image_size(3)


def test_a_description_from_before_squeezing_is_of_towers_that_crop(folders):
  content = dual_encoder.read_config(folders["clip"]).to_dict()
  assert "squeeze" not in content  # So what is kept by the description stays of use.
  assert not DualEncoderConfig.from_dict(content).preprocessing.squeeze
  squeezing = dual_encoder.read_config(folders["siglip"])
  assert squeezing.to_dict()["squeeze"] is True
  assert DualEncoderConfig.from_dict(squeezing.to_dict()).with_image_size(36).preprocessing.squeeze
  with pytest.raises(UserError, match="squeeze = 'yes': expected one of True, False"):
    DualEncoderConfig.from_dict(content | {"squeeze": "yes"})


def test_the_hub_is_asked_for_settings_and_tokenizer(monkeypatch, tmp_path):
  asked = {}

  def download(repository, allow_patterns):
    asked[repository] = allow_patterns
    return tmp_path

  monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
  assert hub.download("BAAI/BGE-VL-base") == tmp_path
  wanted = {"model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json",
            "vocab.json", "merges.txt", "spiece.model"}  # fmt: skip
  assert wanted <= set(asked["BAAI/BGE-VL-base"])


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (5, 5), (3, 8), (16, 24)])
@pytest.mark.parametrize("first", [0, 1])
def test_position_tables_are_resized_as_pytorch_does_it(old, new, first):
  rng = np.random.default_rng(0)
  table = rng.normal(size=(first + old * old, 6)).astype(np.float32)
  found = weights.resize_positions(table, (first + new * new, 6))
  grid = torch.from_numpy(table[first:].reshape(1, old, old, 6)).permute(0, 3, 1, 2).double()
  expected = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic")
  expected = expected.permute(0, 2, 3, 1).reshape(new * new, 6).numpy()
  # Computed in float64 on both sides; ours are rounded to float32, below 8 by less than 2^-21.
  np.testing.assert_allclose(found[first:], expected, rtol=0, atol=2.0**-21)
  np.testing.assert_array_equal(found[:first], table[:first])
  if old != new:  # JAX's bicubic is another one.
    other = jax.image.resize(table[first:].reshape(old, old, 6), (new, new, 6), "bicubic")
    assert np.abs(np.asarray(other).reshape(new * new, 6) - expected).max() > 0.05


def test_only_the_image_towers_positions_are_resized(folders, tmp_path):
  backbone.convert(folders["siglip"], tmp_path / "out")
  config = pretrained.read(str(tmp_path / "out")).with_image_size(36)
  module = dual_encoder.DualEncoder(config)
  like = jax.eval_shape(
    lambda: module.init(
      jax.random.key(0), np.zeros((1, 36, 36, 3)), np.zeros((1, 13), np.int32)
    )
  )  # fmt: skip
  found = weights.load_backbone(tmp_path / "out", dict(like))["params"]
  before = reference(folders["siglip"])
  np.testing.assert_array_equal(
    found["image"]["position_embedding"],
    weights.resize_positions(before["image"]["position_embedding"], (49, 24)),
  )
  like["params"]["text"]["position_embedding"] = jax.ShapeDtypeStruct((16, 28), np.float32)
  with pytest.raises(UserError, match="text/position_embedding: .13, 28. in the weights"):
    weights.load_backbone(tmp_path / "out", dict(like))
