"""Images: decoding, resizing, cropping and normalising equal the release's transforms."""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from crn_jax.input_pipeline import images
from crn_jax.models.preprocessing import IMAGENET

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
JPEGS = ("portrait_300x400", "landscape_401x267", "small_180x233")
CROP = 224


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDENS / "transforms.npz") as data:
    return dict(data)


def decode(name):
  return images.decode(GOLDENS / "transforms" / f"{name}.jpg")


def crc(image):
  return zlib.crc32(np.ascontiguousarray(image).tobytes())


@pytest.mark.parametrize("name", JPEGS)
def test_decoded_pixels_are_those_of_the_release(golden, name):
  image = decode(name)
  assert image.dtype == np.uint8
  assert image.shape == tuple(golden[f"{name}.decoded_shape"])
  assert crc(image) == golden[f"{name}.decoded_crc32"]


def test_small_jpegs_decode_as_in_the_release():
  with open(GOLDENS / "datasets.json", encoding="utf-8") as f:
    decoded = json.load(f)["decoded_images"]
  decoded = {k: v for k, v in decoded.items() if k.startswith("fashioniq/")}
  assert len(decoded) == 32
  for path, expected in decoded.items():
    image = images.decode(GOLDENS / "mini_data" / path)
    assert image.shape == (expected["size_wh"][1], expected["size_wh"][0], 3)
    assert image.sum() == expected["sum"]
    assert crc(image) == expected["crc32"]


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("size", [256, 224])
def test_resize_and_centre_crop_equal_the_release(golden, name, size):
  key = f"{name}.r{size}"
  resized = images.resize_short_side(decode(name), size)
  assert resized.shape == tuple(golden[f"{key}.resized_shape"])
  assert crc(resized) == golden[f"{key}.resized_crc32"]
  top, left = golden[f"{key}.crop_top_left"]
  cropped = images.center_crop(resized, CROP)
  np.testing.assert_array_equal(cropped, resized[top : top + CROP, left : left + CROP])
  assert crc(cropped) == golden[f"{key}.crop_crc32"]


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("size", [256, 224])
@pytest.mark.parametrize("on_device", [False, True])
def test_normalised_values_equal_the_release(golden, name, size, on_device):
  key = f"{name}.r{size}"
  normalize = jax.jit(IMAGENET.normalize) if on_device else IMAGENET.normalize
  cropped = images.center_crop(images.resize_short_side(decode(name), size), CROP)
  tensor = np.asarray(normalize(cropped[None]))[0].transpose(2, 0, 1)
  assert tensor.dtype == np.float32
  sample = tensor.ravel()[:: golden[f"{key}#step"]]
  np.testing.assert_allclose(sample, golden[f"{key}#sample"], rtol=0, atol=1e-6)
  np.testing.assert_allclose(tensor[:, 100:108, 60:68], golden[f"{key}.block"], rtol=0, atol=1e-6)
  sums = tensor.sum(axis=(1, 2), dtype=np.float64)
  np.testing.assert_allclose(sums, golden[f"{key}.channel_sums"], rtol=0, atol=1e-6 * CROP**2)


@pytest.mark.parametrize("name", JPEGS)
def test_training_crop_and_flip_equal_the_release(golden, name):
  key = f"{name}.train_crop_top3_left5_flip"
  resized = images.resize_short_side(decode(name), 256)
  image = images.crop_and_flip(resized, top=3, left=5, flip=True, size=CROP)
  tensor = IMAGENET.normalize(image).transpose(2, 0, 1)
  np.testing.assert_allclose(tensor[:, 100:108, 60:68], golden[f"{key}.block"], rtol=0, atol=1e-6)
  total = tensor.sum(dtype=np.float64)
  np.testing.assert_allclose(total, golden[f"{key}.sum"], rtol=0, atol=1e-6 * tensor.size)


def test_flip_mirrors_the_crop():
  image = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
  cropped = images.crop_and_flip(image, 1, 2, False, 3)
  np.testing.assert_array_equal(cropped, image[1:4, 2:5])
  np.testing.assert_array_equal(images.crop_and_flip(image, 1, 2, True, 3), cropped[:, ::-1])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 13), (13, 8)])
def test_image_of_the_right_size_is_not_resampled(height, width):
  image = np.zeros((height, width, 3), np.uint8)
  assert images.resize_short_side(image, 8) is image


@pytest.mark.parametrize(("side", "offset"), [(10, 2), (11, 2), (13, 4), (15, 4)])
def test_centre_offset_rounds_half_to_even(side, offset):
  image = np.arange(side, dtype=np.uint8)[:, None, None].repeat(side, 1).repeat(3, 2)
  assert images.center_crop(image, 6)[0, 0, 0] == offset


@pytest.mark.parametrize(("top", "left"), [(-1, 0), (0, -1), (3, 0), (0, 4)])
def test_crop_outside_the_image_is_refused(top, left):
  with pytest.raises(ValueError, match="does not lie inside an image of 4 rows x 5 columns"):
    images.crop(np.zeros((4, 5, 3), np.uint8), top, left, 2)


def test_crop_larger_than_the_resized_image_is_refused():
  images.check_sizes(resize=224, image_size=224)
  with pytest.raises(ValueError, match="at least image_size = 256"):
    images.check_sizes(resize=224, image_size=256)


def test_normalise_computes_in_float32_whatever_the_result():
  image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  expected = jnp.asarray(IMAGENET.normalize(image)).astype(jnp.bfloat16)
  actual = IMAGENET.normalize(jnp.asarray(image), jnp.bfloat16)
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_array_equal(actual, expected)
  assert IMAGENET.normalize(image, np.float64).dtype == np.float64


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
  path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
  Image.new("RGB", (3, 2), (204, 204, 204)).convert(mode).save(path)
  image = images.decode(path)
  assert image.shape == (2, 3, 3)
  assert abs(image.astype(int) - 204).max() <= 2


def test_sixteen_bits_become_what_pillow_makes_of_them(tmp_path):
  # Pillow clips: values above 255 are white.
  values = np.array([[0, 7, 255], [256, 4000, 65535]], np.uint16)
  Image.fromarray(values).save(tmp_path / "image.png")
  expected = np.minimum(values, 255).astype(np.uint8)[..., None].repeat(3, axis=2)
  np.testing.assert_array_equal(images.decode(tmp_path / "image.png"), expected)


def test_exif_orientation_is_ignored_as_in_the_release(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation: rotate by 90 degrees to view.
  Image.new("RGB", (3, 2)).save(tmp_path / "image.jpg", exif=exif)
  assert images.decode(tmp_path / "image.jpg").shape == (2, 3, 3)


@pytest.mark.parametrize("extension", ["jpg", "png"])
@pytest.mark.parametrize("keep", [0, 0.05, 0.6])
def test_damaged_file_is_named(tmp_path, extension, keep):
  path = tmp_path / f"image.{extension}"
  noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
  Image.fromarray(noise).save(path)
  content = path.read_bytes()
  path.write_bytes(content[: int(keep * len(content))])
  with pytest.raises(ValueError, match="cannot be decoded as an image") as error:
    images.decode(path)
  assert str(path) in str(error.value)


def test_absent_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="absent.jpg"):
    images.decode(tmp_path / "absent.jpg")
