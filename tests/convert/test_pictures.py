"""Pictures of converted towers are those of transformers' image processors."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from crn_jax.convert import dual_encoder
from crn_jax.errors import UserError
from crn_jax.input_pipeline import images, loader
from crn_jax.models.preprocessing import Preprocessing
from tests import small_towers
from tests.torch_models import transformers

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
# Photographs of 3:4 and 3:2, and one that is smaller than the square.
PHOTOGRAPHS = sorted(map(str, (GOLDENS / "transforms").glob("*.jpg")))


def described(tmp_path, model_type, content, side):
  """What is read of a file with this content."""
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
  return Preprocessing(**dual_encoder.read_preprocessing(tmp_path, model_type, side))


def ours(preprocessing, paths, side):
  """[n, side, side, 3] uint8."""
  sizing = images.Sizing(
    side, side, preprocessing.interpolation, squeeze=preprocessing.squeeze
  )  # fmt: skip
  (batch,) = loader.eval_image_batches(paths, batch_size=len(paths), sizing=sizing)
  return batch


def theirs(name, content, paths):
  """[n, side, side, 3] float32, normalised."""
  processor = getattr(transformers, name)(**content)
  opened = [Image.open(p).convert("RGB") for p in paths]  # SigLIP 2's leaves grey ones grey.
  found = processor(opened, return_tensors="np")["pixel_values"]
  return np.asarray(found).transpose(0, 2, 3, 1)


PUBLISHED = {
  "siglip-base-patch16-224": ("siglip", 224, {}),
  "siglip-so400m-patch14-384": ("siglip", 384, {}),
  "siglip2-base-patch16-256": ("siglip", 256, {"resample": 2, "do_convert_rgb": None}),
  "clip-vit-base-patch32": ("clip", 224, {}),
  "a CLIP that squeezes": ("clip", 224, {"size": {"height": 224, "width": 224}}),
  "SigLIP that crops": (
    "siglip", 224, {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224},
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_pictures_are_those_of_transformers(name, tmp_path):
  model_type, side, changed = PUBLISHED[name]
  content = small_towers.preprocessing(model_type, side) | changed
  preprocessing = described(tmp_path, model_type, content, side)
  found = ours(preprocessing, PHOTOGRAPHS, side)
  processor = {"siglip": "SiglipImageProcessor", "clip": "CLIPImageProcessor"}[model_type]
  # With Pillow, as here: the same operations in the same order.
  expected = theirs(f"{processor}Pil", content, PHOTOGRAPHS)
  np.testing.assert_array_equal(preprocessing.normalize(found), expected)
  other = images.fit(
    images.decode(PHOTOGRAPHS[0]),
    images.Sizing(side, side, preprocessing.interpolation, squeeze=not preprocessing.squeeze),
  )
  assert (images.center_crop(other, side) != found[0]).mean() > 0.5
  # With torchvision, whose two passes round to a level each, with weights of fewer bits.
  levels = theirs(processor, content, PHOTOGRAPHS) * preprocessing.std + preprocessing.mean
  off = np.abs(np.rint(levels * 255) - found)
  assert off.max() <= 2 and (off > 0).mean() < 0.01


def test_square_pictures_of_siglip_2_of_any_resolution_are_those_of_transformers(tmp_path):
  content, side = small_towers.preprocessing("siglip2", 225), 225
  preprocessing = described(tmp_path, "siglip2", content, side)
  assert not preprocessing.squeeze
  pixels = images.decode(PHOTOGRAPHS[0])
  Image.fromarray(images.center_crop(pixels, 250)).save(tmp_path / "square.png")
  found = ours(preprocessing, [str(tmp_path / "square.png")], side)
  processor = transformers.Siglip2ImageProcessorPil(**content)
  patches = processor(Image.open(tmp_path / "square.png"), return_tensors="np")
  assert patches["spatial_shapes"].tolist() == [[45, 45]]
  expected = patches["pixel_values"].reshape(45, 45, 5, 5, 3).transpose(0, 2, 1, 3, 4)
  np.testing.assert_array_equal(
    preprocessing.normalize(found)[0], expected.reshape(side, side, 3)
  )  # fmt: skip


SQUARE = {"height": 23, "width": 23}
# What the file says of sizes -> whether pictures are squeezed.
SIZES = {
  "clip, nothing": ("clip", {}, False),
  "clip, the first files": ("clip", {"size": 23, "crop_size": 23, "do_center_crop": True}, False),
  "clip, a crop without sizes": ("clip", {"do_center_crop": True}, False),
  "clip, a square and its crop": ("clip", {"size": SQUARE, "crop_size": SQUARE}, True),
  "siglip, nothing": ("siglip", {}, True),
  "siglip, a square": ("siglip", {"size": SQUARE}, True),
  "siglip, of transformers 5": (
    "siglip", {"size": SQUARE | {"shortest_edge": None}, "crop_size": None, "do_center_crop": None},
    True,
  ),
  "siglip, a crop": (
    "siglip", {"size": {"shortest_edge": 23}, "crop_size": SQUARE, "do_center_crop": True}, False
  ),
  "siglip2": ("siglip2", {"max_num_patches": 16}, False),
}  # fmt: skip
COMMON = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_say_whether_pictures_are_squeezed(name, tmp_path):
  model_type, fields, squeeze = SIZES[name]
  assert described(tmp_path, model_type, COMMON | fields, 23).squeeze is squeeze


REFUSED = {
  "no square": ("siglip", {"size": {"height": 23, "width": 46}}, 'size is {"height": 23, "width"'),
  "another square": ("siglip", {"size": {"height": 46, "width": 46}}, "the image tower takes 23"),
  "larger than the crop": ("clip", {"size": {"shortest_edge": 46}}, "and set data.resize in a run"),
  "the long side": ("siglip", {"size": {"longest_edge": 23}}, 'size is {"longest_edge": 23}'),
  "both": ("siglip", {"size": SQUARE | {"shortest_edge": 23}}, "expected"),
  "words": ("siglip", {"size": "small"}, 'size is "small"'),
  "a short side alone": (
    "clip", {"size": {"shortest_edge": 23}, "do_center_crop": False}, "would be no squares",
  ),
  "a number alone": ("siglip", {"size": 23}, "would be no squares"),
  "another crop": ("clip", {"crop_size": {"height": 20, "width": 20}}, "crop_size is"),
  "no resizing": ("siglip", {"do_resize": False}, "do_resize is false"),
  "no normalising": ("clip", {"do_normalize": False}, "do_normalize is false"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_cannot_be_made_are_refused(name, tmp_path):
  model_type, fields, message = REFUSED[name]
  with pytest.raises(UserError) as error:
    described(tmp_path, model_type, COMMON | fields, 23)
  assert message in str(error.value)
  assert str(tmp_path / "preprocessor_config.json") in str(error.value)
