"""What images weights were trained with, from the settings beside them."""

import pathlib
from typing import Any

from crn_jax.convert import source
from crn_jax.models.preprocessing import IMAGENET

# Pillow's number of a resampling filter, as preprocessor_config.json has it.
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def read(path: pathlib.Path) -> dict[str, Any]:
  """Mean and standard deviation of a channel in [0, 1], and the interpolation.

  Taken from timm's config.json or transformers' preprocessor_config.json beside the file, else
  ImageNet's usual values, which all published Swin and ResNet weights have.

  Args:
    path: file of weights.

  Raises:
    UserError: if such a file is not readable.
  """
  found = {
    "mean": list(IMAGENET.mean),
    "std": list(IMAGENET.std),
    "interpolation": "bicubic",
  }
  timm = source.read_json(path.parent / "config.json").get("pretrained_cfg") or {}
  found |= {key: timm[key] for key in found if key in timm}
  huggingface = source.read_json(path.parent / "preprocessor_config.json")
  if "image_mean" in huggingface:
    found |= {
      "mean": huggingface["image_mean"],
      "std": huggingface["image_std"],
      "interpolation": _RESAMPLING.get(huggingface.get("resample", 3), "bicubic"),
    }
  return found
