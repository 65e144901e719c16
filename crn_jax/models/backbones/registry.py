"""Backbones by name, all with one interface.

A backbone is a module `backbone(images, train=...) -> FeatureMaps` with the property `map_dim`, the
width of its last map. What follows it takes widths from there and knows no backbone. It says with
`uses_batch_statistics` whether, in training, an image's features depend on the batch; if they do
not, it takes `undropped`, the number of images at the end of the batch that pass without stochastic
depth. Its maps may be bfloat16: who takes them widens them, see `precision`. How pictures are
resized and normalised goes with it.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from crn_jax.errors import UserError
from crn_jax.models.backbones.resnet import VARIANTS as RESNETS
from crn_jax.models.backbones.resnet import ResNet
from crn_jax.models.backbones.swin import VARIANTS as SWINS
from crn_jax.models.backbones.swin import SwinTransformer
from crn_jax.models.preprocessing import IMAGENET, INTERPOLATIONS, Preprocessing


@dataclasses.dataclass(frozen=True)
class Backbone:
  """What a name stands for.

  Attributes:
    module: class of the backbone.
    sizes: its arguments.
    preprocessing: of its pictures.
  """

  module: type[nn.Module]
  sizes: dict
  preprocessing: Preprocessing = IMAGENET


BACKBONES = {name: Backbone(SwinTransformer, sizes) for name, sizes in SWINS.items()}
BACKBONES |= {name: Backbone(ResNet, sizes) for name, sizes in RESNETS.items()}

_PREPROCESSING = tuple(field.name for field in dataclasses.fields(Preprocessing))


def create(
  config: ml_collections.ConfigDict,
  dtype=jnp.float32,
  axis_name: str | None = None,
  remat: str = "none",
) -> nn.Module:
  """The backbone that the `model.backbone` part of a configuration describes.

  Args:
    config: `name`, a key of `BACKBONES`, and sizes; a size that is None is the named backbone's.
    dtype: of the computation, see `precision`.
    axis_name: mapped axis over which the batch is split, if any.
    remat: what its blocks keep for their gradient, see `remat`.

  Raises:
    UserError: on an unknown name, or a size that this kind of backbone does not have.
  """
  named = _named(config)
  changed = {k: v for k, v in _changed(config).items() if k not in _PREPROCESSING}
  known = {field.name for field in dataclasses.fields(named.module)}
  if foreign := sorted(changed.keys() - known):
    raise UserError(
      f"model.backbone.{foreign[0]} = {changed[foreign[0]]} is set, but {config.name} has no such "
      f"size: leave it None, or name the backbone after the configuration's colon"
    )
  return named.module(**(named.sizes | changed), dtype=dtype, axis_name=axis_name, remat=remat)


def check_prepared(folder: str, wanted: Preprocessing) -> None:
  """Raises UserError if prepared images are not resized as the model wants it.

  Args:
    folder: of prepared images, `data.prepared`; '' if there are none.
    wanted: by the model.
  """
  if not folder:
    return
  if wanted.squeeze:
    raise UserError(
      "data.prepared: prepared images are resized by their short side, this model wants them "
      "squeezed into squares: set data.prepared to ''"
    )
  if wanted.interpolation != IMAGENET.interpolation:
    raise UserError(
      f"data.prepared: prepared images are resized {IMAGENET.interpolation}, this model wants "
      f"{wanted.interpolation}: set data.prepared to ''"
    )


def preprocessing(config: ml_collections.ConfigDict) -> Preprocessing:
  """How pictures are resized and normalised for the backbone.

  Args:
    config: the `model.backbone` part of a configuration; what is None is the named backbone's.

  Raises:
    UserError: on an unknown name, or values that are none.
  """
  changed = {k: v for k, v in _changed(config).items() if k in _PREPROCESSING}
  found = dataclasses.replace(_named(config).preprocessing, **changed)
  for name in ("mean", "std"):
    value = getattr(found, name)
    if len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
      raise UserError(f"model.backbone.{name}: expected three numbers, got {value}")
  if min(found.std) <= 0:
    raise UserError(f"model.backbone.std: expected positive numbers, got {found.std}")
  if found.interpolation not in INTERPOLATIONS:
    raise UserError(
      f"model.backbone.interpolation: expected one of {INTERPOLATIONS}, got {found.interpolation!r}"
    )
  return found


def _named(config: ml_collections.ConfigDict) -> Backbone:
  if config.name not in BACKBONES:
    raise UserError(
      f"model.backbone.name: unknown backbone {config.name!r}; choose one of {', '.join(BACKBONES)}"
    )
  return BACKBONES[config.name]


def _changed(config: ml_collections.ConfigDict) -> dict:
  """Fields that are set, other than the name."""
  return {
    k: tuple(v) if isinstance(v, (list, tuple)) else v
    for k, v in config.items()
    if k != "name" and v is not None
  }
