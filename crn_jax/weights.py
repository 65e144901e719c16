"""Initial variables: random, or with a pretrained backbone in both branches."""

import os
import pathlib

import jax
import ml_collections
import numpy as np
import safetensors.numpy
from flax import traverse_util

from crn_jax import files
from crn_jax.models.crn import BRANCHES, CRN


def initial_variables(model: CRN, config: ml_collections.ConfigDict) -> dict:
  """Variables before training, from `config.seed`.

  Both backbones start from `config.model.pretrained`, if it is set.

  Raises:
    FileNotFoundError: if the file of pretrained weights is not there.
    ValueError: if the weights in it do not fit the backbone.
  """
  path = config.model.pretrained
  if path and not pathlib.Path(path).exists():
    raise FileNotFoundError(
      f"{path}: pretrained backbone weights (model.pretrained) not found. Make the file with\n"
      f"  python convert_torch_weights.py --input=MODEL.safetensors --output={path}\n"
      f"from timm's published weights, or start from random values: --config.model.pretrained=''"
    )
  init = jax.jit(model.init, static_argnums=(1, 2))
  variables = init(jax.random.key(config.seed), config.data.image_size, config.data.max_words)
  if path:
    for name in BRANCHES:
      own = {c: tree[name] for c, tree in variables.items() if "backbone" in tree[name]}
      loaded = load_backbone(path, {c: tree["backbone"] for c, tree in own.items()})
      for collection, tree in own.items():
        tree["backbone"] = loaded[collection]
  return variables


def save_backbone(variables: dict, path: str | os.PathLike) -> None:
  """Writes {'params'[, 'batch_stats']} of a backbone to a safetensors file, atomically."""
  flat = traverse_util.flatten_dict(variables, sep="/")
  arrays = {k: np.ascontiguousarray(v) for k, v in flat.items()}
  with files.replacing(path) as partial:
    safetensors.numpy.save_file(arrays, partial)


def load_backbone(path: str | os.PathLike, like: dict) -> dict:
  """Reads backbone variables written by `save_backbone`.

  Args:
    path: the file.
    like: {'params'[, 'batch_stats']} of the backbone, for structure and shapes.

  Raises:
    ValueError: if the file holds other variables; names the first differences.
  """
  loaded = safetensors.numpy.load_file(path)
  expected = {k: v.shape for k, v in traverse_util.flatten_dict(like, sep="/").items()}
  found = {k: v.shape for k, v in loaded.items()}
  if found != expected:
    differences = [
      f"{k}: {found.get(k, 'absent')} in the file, {expected.get(k, 'absent')} in the model"
      for k in sorted(found.keys() | expected.keys())
      if found.get(k) != expected.get(k)
    ]
    shown = "\n  ".join(differences[:10])
    raise ValueError(
      f"{path}: not the weights of this backbone, {len(differences)} differences:\n  {shown}\n"
      f"Check model.backbone and data.image_size, or convert the weights again."
    )
  return traverse_util.unflatten_dict(loaded, sep="/")
