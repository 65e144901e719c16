"""Decoding, resizing and cropping of images.

Pillow does the work on the host, so that pixels equal those of torchvision's transforms on Pillow
images (Resize, CenterCrop, RandomCrop, RandomHorizontalFlip) to the last grey level. Images stay
uint8 until they are normalised, which belongs on the device (`models/preprocessing.py`).
"""

import os
import struct

import numpy as np
from PIL import Image

# What Pillow raises on a file that is not an image or is damaged: a broken PNG shows as
# SyntaxError, a cut header as struct.error.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def decode(path: str | os.PathLike) -> np.ndarray:
  """Reads an image file as RGB; its EXIF orientation is ignored, as in the release.

  Returns:
    [h, w, 3] uint8.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is not an image, or a damaged one; the message names it.
  """
  try:
    with Image.open(path) as image:
      return np.asarray(image.convert("RGB"))
  except FileNotFoundError:
    raise
  except DECODE_ERRORS as error:
    raise ValueError(
      f"{path}: cannot be decoded as an image ({error}); fetch the file again or remove it"
    ) from error


def resize_short_side(image: np.ndarray, size: int) -> np.ndarray:
  """Scales an image so that its shorter side has `size` pixels (antialiased bilinear).

  The other side is size * long / short, truncated. An image that already fits is returned as is.

  Args:
    image: [h, w, 3] uint8.
    size: length of the shorter side in pixels.

  Returns:
    [h', w', 3] uint8 with min(h', w') = size.
  """
  height, width = image.shape[:2]
  short, long = min(height, width), max(height, width)
  if short == size:
    return image
  other = int(size * long / short)
  new_width, new_height = (size, other) if width <= height else (other, size)
  resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
  return np.asarray(resized)


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


def check_sizes(resize: int, image_size: int) -> None:
  """Refuses a crop that is larger than the resized image's shorter side.

  Args:
    resize: shorter side after resizing, in pixels.
    image_size: side of the crop, in pixels.

  Raises:
    ValueError: resize < image_size, or image_size < 1.
  """
  if not 1 <= image_size <= resize:
    raise ValueError(
      f"resize: expected at least image_size = {image_size} pixels (and both "
      f"positive), got {resize}"
    )
