"""Images: decoding, resizing, cropping and normalising equal the release's transforms."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageFile, features

from crn_jax.errors import UserError
from crn_jax.input_pipeline import images
from crn_jax.input_pipeline.checks import verify
from crn_jax.models.preprocessing import IMAGENET
from tests import torch_cpu  # noqa: F401 (before torchvision)

from torchvision.transforms import functional as transforms  # isort: skip

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
  images.check_sizing(images.Sizing(224, 224, "bilinear"))
  with pytest.raises(UserError, match="at least image_size = 256"):
    images.check_sizing(images.Sizing(256, 224, "bilinear"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
  path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
  Image.new("RGB", (3, 2), (204, 204, 204)).convert(mode).save(path)
  image = images.decode(path)
  assert image.shape == (2, 3, 3)
  assert abs(image.astype(int) - 204).max() <= 2


@pytest.mark.parametrize("extension", ["png", "tif", "ppm"])
def test_sixteen_bit_grey_keeps_its_upper_bits(tmp_path, extension):
  values = np.array([[0, 7, 255], [256, 4000, 65535]], np.uint16)
  Image.fromarray(values).save(tmp_path / f"image.{extension}")
  expected = (values >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)
  np.testing.assert_array_equal(images.decode(tmp_path / f"image.{extension}"), expected)


def test_sixteen_bit_grey_and_colour_become_the_same(tmp_path):
  """Pillow keeps the upper bits of colours."""
  values = np.arange(0, 65536, 257 * 5, np.uint16)[None]
  Image.fromarray(values).save(tmp_path / "grey.png")
  # Pillow writes no 16-bit colours: a PNG by hand.
  row = b"\0" + values.astype(">u2").repeat(3, axis=1).tobytes()
  header = struct.pack(">IIBBBBB", values.shape[1], 1, 16, 2, 0, 0, 0)
  chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
  (tmp_path / "colour.png").write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + b"".join(
      struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
      for name, data in chunks
    )
  )
  grey, colour = (images.decode(tmp_path / f"{name}.png") for name in ("grey", "colour"))
  np.testing.assert_array_equal(grey, colour)


def with_alpha(mode: str) -> Image.Image:
  """Red of alpha 255 (grey of 100 in grey modes), and black of alpha 0."""
  image = Image.new("RGBA", (4, 1), (255, 0, 0, 255))
  image.paste((0, 0, 0, 0), (2, 0, 4, 1))
  if mode == "LA":
    return Image.merge("LA", (Image.new("L", (4, 1), 100), image.getchannel("A")))
  return image.quantize() if mode == "P" else image


@pytest.mark.parametrize(
  ("mode", "extension"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp")]
)
def test_transparent_parts_become_white(tmp_path, mode, extension):
  path = tmp_path / f"image.{extension}"
  with_alpha(mode).save(path, lossless=True)
  decoded = images.decode(path)
  opaque = (100, 100, 100) if mode == "LA" else (255, 0, 0)
  assert decoded[0].tolist() == [list(opaque)] * 2 + [[255, 255, 255]] * 2


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_a_colour_that_stands_for_transparency_becomes_white(tmp_path, mode):
  image = Image.fromarray(np.array([[300, 40_000]], np.uint16)) if mode == "I;16" else (
    Image.new(mode, (2, 1))
  )  # fmt: skip
  if mode != "I;16":
    image.putpixel((1, 0), 156 if mode == "L" else (156, 156, 156))
  key = {"RGB": (0, 0, 0), "L": 0, "I;16": 300}[mode]
  image.save(tmp_path / "image.png", transparency=key)
  assert images.decode(tmp_path / "image.png")[0].tolist() == [[255] * 3, [156] * 3]


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
  pixels[..., 3] = 255
  Image.fromarray(pixels).save(tmp_path / "image.png")
  np.testing.assert_array_equal(images.decode(tmp_path / "image.png"), pixels[..., :3])


def test_values_of_unknown_range_are_refused(tmp_path):
  for dtype in (np.float32, np.int32):
    Image.fromarray(np.zeros((2, 2), dtype)).save(tmp_path / "image.tif")
    with pytest.raises(UserError, match=r"image\.tif: .*unknown range: .* convert these images"):
      images.decode(tmp_path / "image.tif")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
  ("size", "reason"),
  [
    ((1, 1_000_000), "too elongated: 1 x 1,000,000 pixels"),
    ((20_000, 1), "too elongated: 20,000 x 1 pixels"),
    ((101, 1), "too elongated"),
    ((9_460, 9_460), "too large: 9,460 x 9,460 pixels"),  # Pillow warns.
    ((20_000, 20_000), "too large: Image size .400000000 pixels. exceeds limit"),  # It refuses.
  ],
)
def test_images_that_would_take_too_much_memory_are_refused_by_name(
  tmp_path, monkeypatch, size, reason
):
  path = tmp_path / "image.png"
  Image.new("1", size).save(path)
  monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("was decoded"))
  with pytest.raises(UserError, match=rf"image\.png: .*{reason}"):
    images.decode(path)
  assert verify.inspect(path)[0].startswith(reason.partition(":")[0])


def test_the_size_that_counts_is_the_decoded_one(tmp_path, monkeypatch):
  """Icons announce a size and hold a PNG of any other."""
  path = tmp_path / "image.jpg"
  Image.new("RGB", (16, 16)).save(path)
  monkeypatch.setattr(
    ImageFile.ImageFile, "load", lambda image: setattr(image, "_size", (1, 20_000))
  )
  with pytest.raises(UserError, match="too elongated: 1 x 20,000 pixels"):
    images.decode(path)
  assert verify.inspect(path)[0] == "too elongated: 1 x 20,000 pixels"


def test_the_limits_themselves_are_allowed(tmp_path):
  Image.new("RGB", (100, 1)).save(tmp_path / "image.png")
  image = images.resize_short_side(images.decode(tmp_path / "image.png"), 64)
  assert image.shape == (64, 6400, 3)


@pytest.mark.parametrize(
  "error", [RuntimeError, IndexError, AssertionError, ZeroDivisionError, TypeError, struct.error]
)
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
  path = tmp_path / "image.jpg"
  Image.new("RGB", (4, 4)).save(path)

  def fail(image):
    raise error

  monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
  with pytest.raises(UserError, match=r"image\.jpg: cannot be decoded") as caught:
    images.decode(path)
  reason, _ = verify.inspect(path)
  assert reason and reason in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_no_fault_of_the_file_is_passed_on(tmp_path, monkeypatch, error):
  path = tmp_path / "image.jpg"
  Image.new("RGB", (4, 4)).save(path)

  def fail(image):
    raise error

  monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
  for use in (images.decode, verify.inspect):
    with pytest.raises(error):
      use(path)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_named(tmp_path):
  """Its decoder raises RuntimeError on some damage, SyntaxError on other."""
  whole = io.BytesIO()
  Image.linear_gradient("L").convert("RGB").save(whole, "AVIF")
  content, path, raised = whole.getvalue(), tmp_path / "image.jpg", set()
  path.write_bytes(content)
  assert images.decode(path).shape == (256, 256, 3)
  for start in range(0, len(content), 9):
    for damaged in (
      content[:start] + b"\xff" * 40 + content[start + 40 :],
      content[:start],
    ):
      path.write_bytes(damaged)
      try:
        with Image.open(path) as image:
          image.load()
      except Exception as error:
        raised.add(type(error))
        with pytest.raises(UserError, match=r"image\.jpg: cannot be decoded .*Fetch the file"):
          images.decode(path)
        assert verify.inspect(path)[0]
  assert {RuntimeError, SyntaxError} <= raised


@pytest.mark.parametrize(
  ("brand", "advice"),
  [(b"heic", "pip install pillow-heif"), (b"avis", "update Pillow"), (b"mp42", "Fetch the file")],
)
def test_formats_without_a_decoder_have_advice_of_their_own(tmp_path, monkeypatch, brand, advice):
  path = tmp_path / "image.jpg"
  path.write_bytes(b"\0\0\0\x18ftyp" + brand)
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(UserError, match=advice):
    images.decode(path)
  # Where there is a decoder, the file must be damaged.
  monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
  with pytest.raises(UserError, match="Fetch the file again"):
    images.decode(path)


def test_heic_is_read_where_its_decoder_is_installed(tmp_path):
  (tmp_path / "pillow_heif.py").write_text("def register_heif_opener(): print('registered')")
  done = subprocess.run(
    [sys.executable, "-c", "import crn_jax.input_pipeline.images"],
    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "registered\n"


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
  with pytest.raises(UserError, match="cannot be decoded as an image") as error:
    images.decode(path)
  assert str(path) in str(error.value)


def test_absent_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="absent.jpg"):
    images.decode(tmp_path / "absent.jpg")


def test_bicubic_is_pillows():
  image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
  expected = Image.fromarray(image).resize((15, 20), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(images.resize_short_side(image, 15, "bicubic"), expected)
  assert (images.resize_short_side(image, 15) != np.asarray(expected)).any()


def torchvision_padded(image: np.ndarray, ratio: float, size: int) -> np.ndarray:
  """Padding, bicubic resize and centre crop by torchvision, on a Pillow image."""
  picture = Image.fromarray(image)
  wanted = max(picture.size) / ratio
  horizontal, vertical = (max(int((wanted - side) / 2), 0) for side in picture.size)
  padded = transforms.pad(picture, [horizontal, vertical], fill=0)
  resized = transforms.resize(padded, size, transforms.InterpolationMode.BICUBIC)
  return np.asarray(transforms.center_crop(resized, [size, size]))


@pytest.mark.parametrize(
  ("height", "width"),
  [(300, 100), (101, 357), (200, 160), (201, 160), (64, 64), (64, 79), (64, 81)],
)
@pytest.mark.parametrize("ratio", [1.25, 1.0])
def test_padded_images_are_those_of_torchvision(tmp_path, height, width, ratio):
  image = np.random.default_rng(height).integers(1, 256, (height, width, 3), np.uint8)
  path = tmp_path / "image.png"
  Image.fromarray(image).save(path)
  found = images.center_crop(images.read(path, images.Sizing(48, 48, "bicubic", ratio)), 48)
  np.testing.assert_array_equal(found, torchvision_padded(image, ratio, 48))


@pytest.mark.parametrize(("height", "width"), [(300, 100), (100, 300), (101, 357)])
def test_padding_brings_the_ratio_to_its_limit_and_keeps_the_image(height, width):
  image = np.random.default_rng(0).integers(1, 256, (height, width, 3), np.uint8)
  padded = images.pad_to_ratio(image, 1.25)
  short, long = sorted(padded.shape[:2])
  assert long == max(height, width)
  assert 1.25 <= long / short < 1.25 * long / (long - 2)  # Margins are truncated.
  np.testing.assert_array_equal(padded[padded.any(axis=2)].reshape(image.shape), image)


def test_an_image_within_the_ratio_is_not_padded():
  image = np.zeros((100, 80, 3), np.uint8)
  assert images.pad_to_ratio(image, 1.25) is image
