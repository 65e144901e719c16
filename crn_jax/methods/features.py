"""What methods share that are trained on features of frozen towers, computed once and kept.

Where other methods take pictures these take features of images, and where the text tower is frozen,
features of texts instead of ids. The tables of all training features stay on the devices; a batch
names rows of them.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from crn_jax.methods import losses
from crn_jax.methods.base import Variables
from crn_jax.methods.encoder import EncoderMethod
from crn_jax.models.dual_encoder import DualEncoder

# Of the towers' parameters, those that make features of images, and of texts.
HALVES = {"image": ("image", "image_projection"), "text": ("text", "text_projection")}

# Parts of a batch that stay the same: [images, d] features of all training images, filled up;
# [images] bool, False at what fills up; [texts, d] features of all training texts, filled up.
TABLES = ("images", "counts", "texts")


def half(towers: dict, kind: str) -> dict:
  """The parameters of the towers that make features of one kind, 'image' or 'text'."""
  return {name: tree for name, tree in towers.items() if name in HALVES[kind]}


@dataclasses.dataclass(frozen=True)
class FeatureMethod(EncoderMethod):
  """A method that is trained on features.

  Attributes:
    frozen: towers whose features are kept: 'image', and maybe 'text'.
    scans_epoch: whether a call of `train_step` makes all updates of an epoch, not one.
  """

  frozen: ClassVar[tuple[str, ...]]
  scans_epoch: ClassVar[bool]

  @abc.abstractmethod
  def abstract_batch(self, n: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch of one update, over all devices.

    Args:
      n: its size.
      rows: of a table of features.
    """

  def features(self, kind: str, params: dict, rows: jax.Array) -> jax.Array:
    """Features of a frozen tower.

    Args:
      kind: 'image' or 'text'.
      params: of that tower, see `half`.
      rows: uint8 pictures [batch, height, width, 3], or ids [batch, words].

    Returns:
      [batch, d] float32, not normalised.
    """
    if kind == "text":
      return self.encoder.apply({"params": params}, rows, method=DualEncoder.encode_texts).vectors
    pictures = self.preprocessing.normalize(rows)
    found = self.encoder.apply({"params": params}, pictures, method=DualEncoder.encode_images)
    return found.vectors

  def encode_images(self, variables: Variables, pictures: jax.Array) -> tuple[Any, jax.Array]:
    """As `Method.encode_images`, of features [batch, d]."""
    del variables
    return pictures, losses.normalize(pictures)

  def tables(self, batch: dict) -> dict[str, jax.Array]:
    """The whole tables of a batch: gathered from the devices, over whose memory they are spread."""
    layout = losses.Batch(self.axis_name)
    return {name: layout.gather(batch[name]) for name in TABLES if name in batch}


def rows_of(table: jax.Array, rows: jax.Array) -> jax.Array:
  """[n, d], [batch] int -> [batch, d]."""
  return jnp.take(table, rows, axis=0)
