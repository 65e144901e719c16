"""Backbones by name, all with one interface.

A backbone is a module `backbone(images, train=...) -> FeatureMaps` with the property `map_dim`, the
width of its last map. What follows it takes widths from there and knows no backbone.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from crn_jax.models.backbones.resnet import VARIANTS as RESNETS
from crn_jax.models.backbones.resnet import ResNet
from crn_jax.models.backbones.swin import VARIANTS as SWINS
from crn_jax.models.backbones.swin import SwinTransformer

# name -> module class and arguments.
BACKBONES = {name: (SwinTransformer, sizes) for name, sizes in SWINS.items()}
BACKBONES |= {name: (ResNet, sizes) for name, sizes in RESNETS.items()}


def create(
  config: ml_collections.ConfigDict, dtype=jnp.float32, axis_name: str | None = None
) -> nn.Module:
  """The backbone that the `model.backbone` part of a configuration describes.

  Args:
    config: `name`, a key of `BACKBONES`, and sizes; a size that is None is the named backbone's.
    dtype: of the computation.
    axis_name: mapped axis over which the batch is split, if any.

  Raises:
    ValueError: on an unknown name, or a size that this kind of backbone does not have.
  """
  if config.name not in BACKBONES:
    raise ValueError(
      f"model.backbone.name: unknown backbone {config.name!r}; choose one of {', '.join(BACKBONES)}"
    )
  module, sizes = BACKBONES[config.name]
  changed = {k: v for k, v in config.items() if k != "name" and v is not None}
  changed = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in changed.items()}
  known = {field.name for field in dataclasses.fields(module)}
  if foreign := sorted(changed.keys() - known):
    raise ValueError(
      f"model.backbone.{foreign[0]} = {changed[foreign[0]]} is set, but {config.name} has no such "
      f"size: leave it None, or name the backbone after the configuration's colon"
    )
  return module(**(sizes | changed), dtype=dtype, axis_name=axis_name)
