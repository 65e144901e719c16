"""Towers against transformers' PyTorch models: every layer, the pooled vectors, gradients.

Differences, not cosines, are bounded: with a wrong activation the cosine is still 0.9999.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from crn_jax.convert import dual_encoder as names
from crn_jax.models import dual_encoder
from crn_jax.models.dual_encoder import DualEncoder
from crn_jax.models.text.transformer import TextTowerConfig
from crn_jax.workdir import weights
from tests import small_towers
from tests.small_towers import FAMILIES, LENGTH, ROWS
from tests.torch_models import torch, transformers

# Features are of order one to ten, of which float32 keeps seven digits.
TOLERANCE = 1e-5
BATCH = 3


@pytest.fixture(scope="module", params=FAMILIES)
def towers(request, tmp_path_factory):
  """family, PyTorch model, our description of it, our parameters."""
  return of_model(request.param, small_towers.model(request.param), tmp_path_factory.mktemp("hf"))


def of_model(family, model, folder):
  model.config.save_pretrained(folder)
  small_towers.save_preprocessing(family, folder)
  config = names.read_config(folder)
  return family, model, config, names.to_params(config, tensors(model), "the test's model")


def tensors(model, of=lambda parameter: parameter):
  """Named arrays of a model, but its temperature."""
  return {
    name: of(p).detach().numpy()
    for name, p in model.named_parameters()
    if not name.startswith("logit_")
  }


def pictures(side, seed=0):
  """[batch, side, side, 3] float32, as if normalised."""
  return np.random.default_rng(seed).normal(size=(BATCH, side, side, 3)).astype(np.float32)


def texts(family, end=1):
  """[batch, length] int32: texts of different lengths; behind the end only more of it."""
  rng = np.random.default_rng(1)
  ids = rng.integers(5, ROWS - 1, (BATCH, LENGTH[family]), dtype=np.int32)
  for row, length in enumerate((4, LENGTH[family] - 1, 8)):
    ids[row, length:] = end
  return ids


def torch_images(family, model, images):
  """Outputs of PyTorch's image tower: (layers, tokens, pooled, projected)."""
  images = torch.from_numpy(images)
  given = {"pixel_values": images.permute(0, 3, 1, 2)}
  if family == "siglip2":
    patch = model.config.vision_config.patch_size
    grid = images.shape[1] // patch
    patches = images.reshape(BATCH, grid, patch, grid, patch, 3).permute(0, 1, 3, 2, 4, 5)
    given = {
      "pixel_values": patches.reshape(BATCH, grid * grid, -1),
      "pixel_attention_mask": torch.ones(BATCH, grid * grid, dtype=torch.int64),
      "spatial_shapes": torch.full((BATCH, 2), grid),
    }
  elif images.shape[1] != model.config.vision_config.image_size:
    given["interpolate_pos_encoding"] = True
  out = model.vision_model(**given, output_hidden_states=True)
  # An object since transformers 5.
  projected = model.get_image_features(**given).pooler_output
  return out.hidden_states[1:], out.last_hidden_state, out.pooler_output, projected


def torch_texts(model, ids, **options):
  """Outputs of PyTorch's text tower: (layers, tokens, pooled, projected)."""
  ids = torch.from_numpy(ids).long()
  out = model.text_model(ids, output_hidden_states=True, **options)
  projected = model.get_text_features(ids, **options).pooler_output
  return out.hidden_states[1:], out.last_hidden_state, out.pooler_output, projected


def differences(towers, images, ids, **options):
  """Name of an output -> largest absolute difference between ours and PyTorch's."""
  family, model, config, params = towers
  with torch.no_grad():
    theirs = {
      "image": torch_images(family, model, images),
      "text": torch_texts(model, ids, **options),
    }

  def ours(module):
    image, text = module.image(images, each=True), module.text(ids, each=True)
    tokens = image.map.reshape(BATCH, -1, image.map.shape[-1])
    return {
      "image": (image.layers, tokens, image.pooled, module.encode_images(images).vectors),
      "text": (text.layers, text.tokens, text.pooled, module.encode_texts(ids).vectors),
    }

  found = jax.jit(nn.apply(ours, DualEncoder(config)))({"params": params})
  result = {}
  for tower, (layers, tokens, pooled, projected) in theirs.items():
    own_layers, own_tokens, own_pooled, own_projected = found[tower]
    assert len(own_layers) == len(layers) == getattr(config, tower).depth
    for i, layer in enumerate(layers):
      result[f"{tower} layer {i}"] = largest(own_layers[i], layer)
    if tower == "image" and config.image.class_tokens:
      tokens = tokens[:, 1:]
    result |= {
      f"{tower} tokens": largest(own_tokens, tokens),
      f"{tower} vectors": largest(own_projected, projected),
    }
    if family == "clip" or tower == "image":  # SigLIP's pooled text is projected already.
      result[f"{tower} pooled"] = largest(own_pooled, pooled)
  return result


def largest(ours, theirs):
  theirs = theirs.numpy() if isinstance(theirs, torch.Tensor) else theirs
  assert ours.shape == theirs.shape
  return np.abs(np.asarray(ours) - theirs).max()


def test_every_output_is_that_of_transformers(towers):
  _, _, config, _ = towers
  found = differences(towers, pictures(config.image.image_size), texts(towers[0]))
  assert max(found.values()) <= TOLERANCE, found


@pytest.mark.slow
def test_gradients_of_a_step_are_those_of_transformers(towers):
  family, model, config, params = towers
  images, ids = pictures(config.image.image_size), texts(family)

  def loss(params):
    image, text = DualEncoder(config).apply({"params": params}, images, ids)
    unit = [v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (image.vectors, text.vectors)]
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(10.0 * unit[0] @ unit[1].T)))

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  model.zero_grad()
  image, text = torch_images(family, model, images)[3], torch_texts(model, ids)[3]
  unit = [torch.nn.functional.normalize(v, dim=-1) for v in (image, text)]
  expected = torch.nn.functional.cross_entropy(10.0 * unit[0] @ unit[1].T, torch.arange(BATCH))
  expected.backward()
  assert abs(float(value) - float(expected.detach())) <= TOLERANCE
  theirs = names.to_params(config, tensors(model, lambda p: p.grad), "the test's gradients")
  ours, theirs = (traverse_util.flatten_dict(tree) for tree in (gradients, theirs))
  assert ours.keys() == theirs.keys()
  assert {path: d for path in ours if (d := largest(ours[path], theirs[path])) > TOLERANCE} == {}
  assert all(np.abs(g).max() > 0 for g in theirs.values())


def test_the_largest_id_is_the_end_where_the_configuration_names_a_wrong_one(tmp_path):
  """CLIP's first configurations say 2; so do BGE-VL's, which are made of them."""
  model = small_towers.model("clip", text={"eos_token_id": 2})
  towers = of_model("clip", model, tmp_path)
  assert towers[2].text.pooling == "largest_id"
  found = differences(towers, pictures(23), texts("clip", end=ROWS - 1))
  assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("side", [36, 12])
def test_other_picture_sizes_are_those_of_transformers(family, side, tmp_path):
  _, model, config, params = of_model(family, small_towers.model(family), tmp_path)
  config = config.with_image_size(side)
  rows = config.image.grid**2 + config.image.class_tokens
  table = params["image"]["position_embedding"]
  resized = weights.resize_positions(table, (rows, table.shape[1]))
  params = {**params, "image": {**params["image"], "position_embedding": resized}}
  found = differences((family, model, config, params), pictures(side), texts(family))
  assert max(found.values()) <= TOLERANCE, found


def changed(config, tower, **fields):
  return dataclasses.replace(
    config, **{tower: dataclasses.replace(getattr(config, tower), **fields)}
  )


# Wrong versions that are one word away. Differences are far above the tolerance, so that the tests
# above fail with any of them.
WRONG_FIELDS = [
  ("clip", "image", {"activation": "gelu"}, 1e-3),
  ("clip", "text", {"activation": "gelu_pytorch_tanh"}, 1e-3),
  ("clip", "image", {"epsilon": 1e-6}, 3e-5),
  ("clip", "text", {"pooling": "largest_id"}, 0.1),
  ("clip", "image", {"heads": 4}, 0.1),
  ("siglip", "image", {"epsilon": 1e-5}, 3e-5),
  ("siglip", "image", {"activation": "gelu"}, 1e-4),
  ("siglip", "text", {"activation": "quick_gelu"}, 1e-3),
]


@pytest.mark.parametrize(("family", "tower", "fields", "at_least"), WRONG_FIELDS)
def test_a_wrong_field_is_noticed(family, tower, fields, at_least, tmp_path):
  _, model, config, params = of_model(family, small_towers.model(family), tmp_path)
  wrong = (family, model, changed(config, tower, **fields), params)
  assert max(differences(wrong, pictures(23), texts(family)).values()) > at_least


def test_a_text_tower_that_is_not_causal_is_noticed(tmp_path, monkeypatch):
  towers = of_model("clip", small_towers.model("clip"), tmp_path)
  monkeypatch.setattr(TextTowerConfig, "causal", False)
  assert max(differences(towers, pictures(23), texts("clip")).values()) > 0.1


def test_pooling_at_the_last_token_is_noticed(tmp_path, monkeypatch):
  towers = of_model("clip", small_towers.model("clip"), tmp_path)
  monkeypatch.setattr(
    dual_encoder.TextTower, "_pooled_position", lambda self, ids: jnp.full(BATCH, ids.shape[1] - 1)
  )
  found = differences(towers, pictures(23), texts("clip"))
  assert found["text tokens"] <= TOLERANCE
  assert found["text pooled"] > 0.1


def test_a_missing_first_norm_is_noticed(tmp_path):
  towers = of_model("clip", small_towers.model("clip"), tmp_path)
  towers[1].vision_model.pre_layrnorm = torch.nn.Identity()
  assert max(differences(towers, pictures(23), texts("clip")).values()) > 0.1


def test_a_mean_in_the_place_of_the_attention_pooling_is_noticed(tmp_path):
  family, model, config, params = of_model("siglip", small_towers.model("siglip"), tmp_path)
  images = pictures(23)
  ours = DualEncoder(config).apply({"params": params}, images, method=DualEncoder.encode_images)
  with torch.no_grad():
    _, tokens, pooled, _ = torch_images(family, model, images)
  assert largest(ours.vectors, pooled) <= TOLERANCE
  assert largest(ours.vectors, tokens.mean(1)) > 0.1


def test_a_mask_over_the_padding_of_siglip_is_noticed(tmp_path):
  towers = of_model("siglip", small_towers.model("siglip"), tmp_path)
  ids = texts("siglip")
  mask = torch.from_numpy((ids != 1).astype(np.int64))
  found = differences(towers, pictures(23), ids, attention_mask=mask)
  assert found["text vectors"] > 0.01


def test_texts_of_siglip_that_are_not_padded_to_full_length_are_refused(tmp_path):
  _, _, config, params = of_model("siglip", small_towers.model("siglip"), tmp_path)
  with pytest.raises(ValueError, match="expected rows of 13 ids, got 8"):
    DualEncoder(config).apply(
      {"params": params}, texts("siglip")[:, :8], method=DualEncoder.encode_texts
    )


def test_another_order_in_the_fused_matrix_of_the_pooling_is_noticed(tmp_path):
  family, model, config, _ = of_model("siglip", small_towers.model("siglip"), tmp_path)
  given = tensors(model)
  for leaf in ("weight", "bias"):
    name = f"vision_model.head.attention.in_proj_{leaf}"
    q, k, v = np.split(given[name], 3)
    given[name] = np.concatenate([k, q, v])
  params = names.to_params(config, given, "the test's model")
  found = differences((family, model, config, params), pictures(23), texts(family))
  assert found["image pooled"] > 1e-3
  assert found["image tokens"] <= TOLERANCE


def test_what_a_text_tower_of_transformers_gives_is_an_object(tmp_path):
  """Its fields would be taken for the rows of an array, were it used as one."""
  _, model, _, _ = of_model("clip", small_towers.model("clip"), tmp_path)
  found = model.get_text_features(torch.from_numpy(texts("clip")).long())
  assert not isinstance(found, torch.Tensor)
  assert isinstance(found, transformers.utils.ModelOutput)
