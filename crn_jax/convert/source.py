"""Reads weights that somebody else's program wrote: a file, or a folder with one."""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from crn_jax.convert import pickles
from crn_jax.models.preprocessing import IMAGENET

_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
_WRAPPERS = ("state_dict", "model")
# Pillow's number of a resampling filter, as preprocessor_config.json has it.
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights as found.

  Attributes:
    path: the file.
    sha256: of the file.
    tensors: names as in the file -> arrays.
    left_out: what in the file is no weight -> why it is left out.
    module: the pickled module, if the file holds one.
  """

  path: pathlib.Path
  sha256: str
  tensors: dict[str, np.ndarray]
  left_out: dict[str, str]
  module: pickles.Stub | None = None


def read(path: str | os.PathLike) -> Source:
  """Reads .safetensors, or what `torch.save` wrote; never runs code from the file.

  Args:
    path: the file, or a folder with model.safetensors or pytorch_model.bin.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is damaged, or holds something other than weights.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    files = [path / name for name in _IN_FOLDERS if (path / name).exists()]
    if not files:
      raise FileNotFoundError(f"{path}: neither {' nor '.join(_IN_FOLDERS)} in this folder")
    path = files[0]
  if not path.exists():
    raise FileNotFoundError(f"{path}: not found")
  if not path.stat().st_size:
    raise ValueError(f"{path}: empty file; fetch it again")
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  if path.suffix == ".safetensors":
    try:
      return Source(path, digest, safetensors.numpy.load_file(path), {})
    except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
      raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
  tensors, left_out, module = _tensors(pickles.read(path), path)
  return Source(path, digest, tensors, left_out, module)


def preprocessing(path: pathlib.Path) -> dict[str, Any]:
  """What the weights were trained with: mean and std of a channel in [0, 1]; interpolation.

  Taken from timm's config.json or transformers' preprocessor_config.json beside the file, else
  ImageNet's usual values, which all published Swin and ResNet weights have.

  Raises:
    ValueError: if such a file is not readable.
  """
  found = {
    "mean": list(IMAGENET.mean),
    "std": list(IMAGENET.std),
    "interpolation": "bicubic",
  }
  timm = _json(path.parent / "config.json").get("pretrained_cfg", {})
  found |= {key: timm[key] for key in found if key in timm}
  huggingface = _json(path.parent / "preprocessor_config.json")
  if "image_mean" in huggingface:
    found |= {
      "mean": huggingface["image_mean"],
      "std": huggingface["image_std"],
      "interpolation": _RESAMPLING.get(huggingface.get("resample", 3), "bicubic"),
    }
  return found


def _json(path: pathlib.Path) -> dict:
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path}: not valid JSON ({error})") from error
  return content if isinstance(content, dict) else {}


def _tensors(content, path: pathlib.Path) -> tuple[dict, dict, pickles.Stub | None]:
  left_out: dict[str, str] = {}
  if isinstance(content, dict):
    for wrapper in _WRAPPERS:
      if isinstance(content.get(wrapper), (dict, pickles.Stub)):
        left_out |= dict.fromkeys(map(str, content.keys() - {wrapper}), "not the model")
        content = content[wrapper]
        break
  if isinstance(content, pickles.Stub):
    return pickles.state_dict(content), left_out, content
  if not isinstance(content, dict):
    raise ValueError(f"{path}: holds a {type(content).__name__}, not weights")
  tensors = {n: t for n, t in content.items() if isinstance(t, np.ndarray) and isinstance(n, str)}
  left_out |= {str(n): "not a tensor" for n in content if n not in tensors}
  return tensors, left_out, None
