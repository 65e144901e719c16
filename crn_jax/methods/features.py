"""What methods share that are trained on features of frozen towers, computed once and kept.

Where other methods are trained on pictures these take features of images, and where the text tower
is frozen, features of texts instead of ids. The tables of all training features stay on the
devices; a batch names rows of them. Evaluation uses kept features, too; about any other picture a
trained one is asked as every method is, once it has its towers (`FeatureMethod.with_towers`).
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from crn_jax.methods import losses
from crn_jax.methods.base import QueryVectors, Variables
from crn_jax.methods.encoder import EncoderMethod
from crn_jax.models.dual_encoder import DualEncoder

# Of the towers' parameters, those that make features of images, and of texts.
HALVES = {"image": ("image", "image_projection"), "text": ("text", "text_projection")}

# Parts of a batch that stay the same: [images, d] features of all training images, filled up;
# [images] bool, False at what fills up; [texts, d] features of all training texts, filled up.
TABLES = ("images", "counts", "texts")

# Where the frozen towers stand among the parameters, beside the parts that are trained.
_FROZEN = "frozen"


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

  @abc.abstractmethod
  def compose_features(
    self, variables: Variables, references: jax.Array, texts: jax.Array
  ) -> QueryVectors:
    """Answers queries.

    Args:
      variables: {'params', 'batch_stats'} of the parts.
      references: [batch, d] features of images.
      texts: [batch, d] features if the text tower is frozen, else ids [batch, words].
    """

  def features(self, kind: str, params: dict, rows: jax.Array) -> jax.Array:
    """Features of a frozen tower.

    Args:
      kind: 'image' or 'text'.
      params: of that tower, see `half`.
      rows: pictures [batch, height, width, 3], normalised, or ids [batch, words].

    Returns:
      [batch, d] float32, not normalised.
    """
    encode = {"image": DualEncoder.encode_images, "text": DualEncoder.encode_texts}[kind]
    return self.encoder.apply({"params": params}, rows, method=encode).vectors

  def with_towers(self, variables: Variables, towers: dict) -> Variables:
    """Variables with what `encode_images` and `compose` need beside the parts.

    Args:
      variables: {'params', 'batch_stats'} of the parts, as a checkpoint holds them.
      towers: parameters of both towers; those that are trained are left out.
    """
    frozen = {name: tree for kind in self.frozen for name, tree in half(towers, kind).items()}
    return {**variables, "params": {**variables["params"], _FROZEN: frozen}}

  def encode_images(self, variables: Variables, pictures: jax.Array) -> tuple[Any, jax.Array]:
    """See `Method.encode_images`; of variables `with_towers`."""
    features = self.features("image", variables["params"][_FROZEN], pictures)
    return features, losses.normalize(features)

  def compose(
    self, variables: Variables, constants: Any, references: Any, tokens: jax.Array, mask: jax.Array
  ) -> QueryVectors:
    """See `Method.compose`; of variables `with_towers`."""
    texts = tokens
    if "text" in self.frozen:
      texts = self.features("text", variables["params"][_FROZEN], tokens)
    return self.compose_features(variables, references, texts)

  def tables(self, batch: dict) -> dict[str, jax.Array]:
    """The whole tables of a batch: gathered from the devices, over whose memory they are spread."""
    layout = losses.Batch(self.axis_name)
    return {name: layout.gather(batch[name]) for name in TABLES if name in batch}


def rows_of(table: jax.Array, rows: jax.Array) -> jax.Array:
  """[n, d], [batch] int -> [batch, d]."""
  return jnp.take(table, rows, axis=0)
