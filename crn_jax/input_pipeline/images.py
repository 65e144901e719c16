"""Decoding, resizing and cropping of images.

Pillow does the work on the host, so that pixels equal those of torchvision's transforms on Pillow
images (Resize, CenterCrop, RandomCrop, RandomHorizontalFlip) to the last grey level. Images stay
uint8 until they are normalised, which belongs on the device (`models/preprocessing.py`).
"""

import dataclasses
import importlib.util
import os
import struct

import numpy as np
from PIL import Image, UnidentifiedImageError

from crn_jax.errors import UserError

try:  # Optional: Pillow itself reads no HEIC.
  import pillow_heif

  pillow_heif.register_heif_opener()
except ImportError:
  pass

# Larger images are refused, so that decoding one takes at most 1.3 GB. It is Pillow's own limit
# against decompression bombs, beyond which it warns.
MAX_PIXELS = 89_478_485
# More elongated images are refused: resized to a short side, one of 1 x 1,000,000 pixels has
# gigabytes.
MAX_ASPECT = 100

# What is wrong with an intact image file -> how to mend it.
MEND = {
  "HEIC": "HEIC: run `pip install pillow-heif`, or convert these files to JPEG.",
  "AVIF": "AVIF: update Pillow to 11.3 or later, or convert these files to JPEG.",
  "too large": f"Too large: scale these images down to at most {MAX_PIXELS:,} pixels.",
  "too elongated": f"Too elongated: crop these images to sides of at most 1 : {MAX_ASPECT}.",
  "unknown range": "Unknown range: convert these images to 8 or 16 bits a channel.",
}

# Formats that need a decoder of their own: their brands in the file's head, and the decoder.
_DECODERS = {
  "HEIC": ((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "pillow_heif"),
  "AVIF": ((b"avif", b"avis"), "PIL._avif"),
}


@dataclasses.dataclass(frozen=True)
class Sizing:
  """How pictures are brought to the square that a model takes.

  Attributes:
    image_size: side S of that square, in pixels; it is cut out of the resized picture.
    resize: length in pixels of the shorter side after resizing, or of both sides; S or more.
    interpolation: 'bilinear' or 'bicubic'.
    max_ratio: of a picture's sides; more elongated ones are padded first, see `pad_to_ratio`.
    squeeze: whether both sides are resized to `resize`, whatever the picture's shape.
  """

  image_size: int
  resize: int
  interpolation: str
  max_ratio: float | None = None
  squeeze: bool = False


class Refused(ValueError):
  """An intact image that is not read. The text begins with a key of `MEND`."""


def decode(path: str | os.PathLike) -> np.ndarray:
  """Reads an image file as RGB; its EXIF orientation is ignored, as in the release.

  Returns:
    [h, w, 3] uint8, with h * w <= MAX_PIXELS and sides of at most 1 : MAX_ASPECT.

  Raises:
    FileNotFoundError: no such file.
    UserError: the file is not an image, a damaged one, or one that is refused; the message names
      it and says how to mend it.
  """
  try:
    with Image.open(path) as image:
      check_supported(image)
      image.load()
      check_supported(image)  # Some formats hold an image of another size than they announce.
      return np.asarray(to_rgb(image))
  except (FileNotFoundError, MemoryError):
    raise
  except Exception as error:  # What decoders raise is no closed list.
    reason = describe_damage(path, error)
    advice = mend(reason) or "Fetch the file again, or remove it."
    raise UserError(f"{path}: cannot be decoded as an image ({reason}). {advice}") from error


def check_supported(image: Image.Image) -> None:
  """Looks at the size and the colour mode of an image, which its header says.

  Raises:
    Refused: it has too many pixels, too unequal sides or values of unknown range.
  """
  short, long = sorted(image.size)
  size = f"{image.width:,} x {image.height:,} pixels"
  if short * long > MAX_PIXELS:
    raise Refused(f"too large: {size}")
  if long > MAX_ASPECT * short:
    raise Refused(f"too elongated: {size}")
  # What a float or a 32-bit integer means as a grey level, only the writer of the file knows.
  sixteen_bits = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
  if image.mode == "F" or (image.mode.startswith("I") and not sixteen_bits):
    raise Refused(f"unknown range: values of mode {image.mode}")


def to_rgb(image: Image.Image) -> Image.Image:
  """A decoded image as 8-bit RGB.

  Of 16-bit grey levels the upper 8 bits are kept, as Pillow does with 16-bit colours; transparent
  parts show white. All others are what Pillow's `convert` makes of them, as in the release.
  """
  if image.mode.startswith("I"):
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
  return image.convert("RGB")


def describe_mode(image: Image.Image) -> str:
  """Colour mode of an image as `to_rgb` distinguishes it, e.g. "RGB" or "P with transparency"."""
  if image.mode.startswith("I"):
    return f"{image.mode} (16 bits)"
  return f"{image.mode} with transparency" if image.has_transparency_data else image.mode


def describe_damage(file: str | os.PathLike | bytes, error: Exception) -> str:
  """Why a file could not be decoded, in a few words.

  They begin with a key of `MEND`, or with "empty", "truncated", "not an image" or "damaged".

  Args:
    file: its path, or its content.
    error: what decoding it raised.
  """
  if isinstance(error, Refused):
    return str(error)
  if isinstance(error, Image.DecompressionBombError):
    return f"too large: {error}"
  if isinstance(error, UnidentifiedImageError):
    head = file[:12] if isinstance(file, bytes) else _head(file)
    for name, (brands, decoder) in _DECODERS.items():
      if head[4:8] == b"ftyp" and head[8:] in brands:
        known = importlib.util.find_spec(decoder) is not None
        return f"damaged: {name} that cannot be identified" if known else name
    return "not an image" if head else "empty"
  if isinstance(error, struct.error) or "truncated" in str(error).lower():
    return "truncated"
  # An error of the system repeats the path in its text; some errors have none.
  return f"damaged: {getattr(error, 'strerror', None) or error or type(error).__name__}"


def _head(path: str | os.PathLike) -> bytes:
  with open(path, "rb") as file:
    return file.read(12)


def mend(reason: str) -> str | None:
  """How to mend a file, given `describe_damage`; None where only fetching it again helps."""
  return MEND.get(reason.partition(":")[0])


def resize_short_side(image: np.ndarray, size: int, interpolation: str = "bilinear") -> np.ndarray:
  """Scales an image so that its shorter side has `size` pixels, antialiased.

  The other side is size * long / short, truncated. An image that already fits is returned as is.

  Args:
    image: [h, w, 3] uint8.
    size: length of the shorter side in pixels.
    interpolation: 'bilinear', as the PyTorch release does it, or 'bicubic'.

  Returns:
    [h', w', 3] uint8 with min(h', w') = size.
  """
  height, width = image.shape[:2]
  short, long = min(height, width), max(height, width)
  if short == size:
    return image
  other = int(size * long / short)
  new_width, new_height = (size, other) if width <= height else (other, size)
  return _resized(image, new_width, new_height, interpolation)


def squeeze_to_square(image: np.ndarray, size: int, interpolation: str) -> np.ndarray:
  """Scales both sides of an image to `size` pixels, antialiased, as SigLIP's pictures are.

  Args:
    image: [h, w, 3] uint8.
    size: side of the square in pixels.
    interpolation: 'bilinear' or 'bicubic'.

  Returns:
    [size, size, 3] uint8.
  """
  return _resized(image, size, size, interpolation)


def _resized(image: np.ndarray, width: int, height: int, interpolation: str) -> np.ndarray:
  filter_ = Image.Resampling[interpolation.upper()]
  return np.asarray(Image.fromarray(image).resize((width, height), filter_))


def pad_to_ratio(image: np.ndarray, max_ratio: float) -> np.ndarray:
  """Pads the short sides of an image with zeros until the long side is `max_ratio` times as long.

  Each of the two margins is (long / max_ratio - short) / 2, truncated, as CLIP4Cir pads. An image
  that is not more elongated is returned as is.

  Args:
    image: [h, w, 3] uint8.
    max_ratio: of long to short side, 1 or more.

  Returns:
    [h', w', 3] uint8.
  """
  wanted = max(image.shape[:2]) / max_ratio
  margins = [max(int((wanted - side) / 2), 0) for side in image.shape[:2]]
  if not any(margins):
    return image
  return np.pad(image, (*((m, m) for m in margins), (0, 0)))


def read(path: str | os.PathLike, sizing: Sizing) -> np.ndarray:
  """`decode` and `fit`."""
  return fit(decode(path), sizing)


def fit(image: np.ndarray, sizing: Sizing) -> np.ndarray:
  """An image [h, w, 3] uint8 as `sizing` pads and resizes it; the square is not cut out yet.

  Returns:
    [h', w', 3] uint8 with min(h', w') = sizing.resize.
  """
  if sizing.max_ratio is not None:
    image = pad_to_ratio(image, sizing.max_ratio)
  resized = squeeze_to_square if sizing.squeeze else resize_short_side
  return resized(image, sizing.resize, sizing.interpolation)


def crop(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
  """Cuts out the square [top, top + size) x [left, left + size).

  Args:
    image: [h, w, 3] uint8.
    top: first row.
    left: first column.
    size: side of the square in pixels.

  Returns:
    [size, size, 3] uint8, a view.

  Raises:
    ValueError: the square does not lie inside the image.
  """
  height, width = image.shape[:2]
  if not (0 <= top <= height - size and 0 <= left <= width - size):
    raise ValueError(
      f"crop of {size} x {size} pixels at row {top}, column {left} does not lie "
      f"inside an image of {height} rows x {width} columns"
    )
  return image[top : top + size, left : left + size]


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
  """Cuts out the central square; offsets are rounded half to even, as in torchvision.

  Args:
    image: [h, w, 3] uint8.
    size: side of the square in pixels.

  Returns:
    [size, size, 3] uint8, a view.

  Raises:
    ValueError: the image is smaller than the square.
  """
  height, width = image.shape[:2]
  return crop(image, round((height - size) / 2), round((width - size) / 2), size)


def crop_and_flip(image: np.ndarray, top: int, left: int, flip: bool, size: int) -> np.ndarray:
  """The training augmentation with its random numbers given: `crop`, then mirror left-right.

  Args:
    image: [h, w, 3] uint8.
    top: first row.
    left: first column, in the image before mirroring.
    flip: whether to mirror.
    size: side of the square in pixels.

  Returns:
    [size, size, 3] uint8, a view.

  Raises:
    ValueError: the square does not lie inside the image.
  """
  cropped = crop(image, top, left, size)
  return cropped[:, ::-1] if flip else cropped


def check_sizing(sizing: Sizing) -> None:
  """Refuses a square that does not fit into the resized image.

  Raises:
    UserError: resize < image_size, or image_size < 1.
  """
  if not 1 <= sizing.image_size <= sizing.resize:
    raise UserError(
      f"resize: expected at least image_size = {sizing.image_size} pixels (and both "
      f"positive), got {sizing.resize}"
    )
