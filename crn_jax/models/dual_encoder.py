"""An image tower and a text tower whose vectors can be compared: CLIP, SigLIP, SigLIP 2."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from crn_jax.errors import UserError
from crn_jax.models.backbones.vit import POOLINGS as IMAGE_POOLINGS
from crn_jax.models.backbones.vit import ImageTower, ImageTowerConfig
from crn_jax.models.precision import at_least_float32
from crn_jax.models.preprocessing import INTERPOLATIONS, Preprocessing
from crn_jax.models.text.transformer import POOLINGS as TEXT_POOLINGS
from crn_jax.models.text.transformer import TextTower, TextTowerConfig
from crn_jax.models.transformer import ACTIVATIONS, dense


@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
  """Description of a pair of towers; it stands in the folder of their weights.

  Attributes:
    family: 'clip' or 'siglip', for people.
    image, text: the towers.
    vector_dim: width d of the vectors.
    project_image, project_text: whether a linear layer brings the pooled token to d, and
      `project_bias` whether it has a bias.
    mean, std, interpolation, squeeze: of the pictures, see `Preprocessing`.
  """

  family: str
  image: ImageTowerConfig
  text: TextTowerConfig
  vector_dim: int
  project_image: bool
  project_text: bool
  project_bias: bool
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  interpolation: str
  squeeze: bool = False

  @property
  def preprocessing(self) -> Preprocessing:
    """How pictures are normalised and brought to squares of `image.image_size`."""
    return Preprocessing(self.mean, self.std, self.interpolation, self.squeeze)

  def to_dict(self) -> dict[str, Any]:
    """Plain values, for JSON; `squeeze` only where it is so.

    Older descriptions do not have it: so those of towers that do not squeeze, and all that is kept
    by them, stay the same.
    """
    found = dataclasses.asdict(self)
    return found if self.squeeze else {k: v for k, v in found.items() if k != "squeeze"}

  @classmethod
  def from_dict(cls, content: Mapping[str, Any]) -> "DualEncoderConfig":
    """Inverse of `to_dict`; takes a ConfigDict, too.

    Raises:
      UserError: if fields are missing or unknown, or values are none of theirs; names them.
    """
    content = _exact(cls, {"squeeze": False} | dict(content), "")
    content["image"] = ImageTowerConfig(**_exact(ImageTowerConfig, content["image"], "image."))
    content["text"] = TextTowerConfig(**_exact(TextTowerConfig, content["text"], "text."))
    content |= {name: tuple(content[name]) for name in ("mean", "std")}
    found = cls(**content)
    found.check()
    return found

  def check(self) -> None:
    """Raises UserError unless the values fit together; names the field."""
    _one_of("image.pooling", self.image.pooling, IMAGE_POOLINGS)
    _one_of("text.pooling", self.text.pooling, TEXT_POOLINGS)
    _one_of("interpolation", self.interpolation, INTERPOLATIONS)
    _one_of("squeeze", self.squeeze, (True, False))
    for name, tower in (("image", self.image), ("text", self.text)):
      _one_of(f"{name}.activation", tower.activation, ACTIVATIONS)
      if tower.width % tower.heads:
        raise UserError(f"{name}.width = {tower.width}: expected a multiple of {name}.heads = "
                        f"{tower.heads}")  # fmt: skip
      projects = getattr(self, f"project_{name}")
      if not projects and tower.width != self.vector_dim:
        raise UserError(f"{name}.width = {tower.width}: expected vector_dim = {self.vector_dim}, "
                        f"as there is no projection")  # fmt: skip
    if self.image.grid < 1:
      raise UserError(f"image.image_size = {self.image.image_size}: smaller than a patch of "
                      f"{self.image.patch_size} pixels")  # fmt: skip

  def with_image_size(self, side: int) -> "DualEncoderConfig":
    """The same towers for pictures of another size; their position table is to be resized.

    Raises:
      UserError: if a picture is smaller than a patch.
    """
    found = dataclasses.replace(self, image=dataclasses.replace(self.image, image_size=side))
    found.check()
    return found


@flax.struct.dataclass
class EncodedImages:
  """Images as the towers see them.

  Attributes:
    vectors: [batch, d] float32, projected, not normalised.
    map: [batch, h, w, image width] tokens of the patches, see `ImageTokens.map`.
  """

  vectors: jax.Array
  map: jax.Array


@flax.struct.dataclass
class EncodedTexts:
  """Texts as the towers see them.

  Attributes:
    vectors: [batch, d] float32, projected, not normalised.
    tokens: [batch, length, text width]; what stands at padding means nothing.
  """

  vectors: jax.Array
  tokens: jax.Array


class DualEncoder(nn.Module):
  """Both towers. A method's model names it `encoder`: there the weights are loaded to.

  Attributes:
    config: description, as from the folder of weights.
    remat: what blocks keep for their gradient, see `remat`.
    dtype: of the towers' blocks; all else is float32 (`precision`).
  """

  config: DualEncoderConfig
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    c, dtype = self.config, at_least_float32(self.dtype)
    self.image = ImageTower(c.image, self.remat, self.dtype)
    self.text = TextTower(c.text, self.remat, self.dtype)
    if c.project_image:
      self.image_projection = dense(c.vector_dim, dtype, None, c.project_bias)
    if c.project_text:
      self.text_projection = dense(c.vector_dim, dtype, None, c.project_bias)

  def encode_images(self, pictures: jax.Array) -> EncodedImages:
    """Encodes pictures [batch, image_size, image_size, 3], normalised (`config.preprocessing`)."""
    out = self.image(pictures)
    pooled = self.image_projection(out.pooled) if self.config.project_image else out.pooled
    return EncodedImages(pooled, out.map)

  def encode_texts(self, ids: jax.Array) -> EncodedTexts:
    """Encodes texts [batch, length] int32, as the tokenizer of the towers gives them.

    There is no mask: CLIP never looks behind the end of a text, SigLIP was trained to see padding.
    """
    out = self.text(ids)
    pooled = self.text_projection(out.pooled) if self.config.project_text else out.pooled
    return EncodedTexts(pooled, out.tokens)

  def __call__(self, pictures: jax.Array, ids: jax.Array) -> tuple[EncodedImages, EncodedTexts]:
    """Both; what the module is initialised by."""
    return self.encode_images(pictures), self.encode_texts(ids)


def _exact(cls, content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """The fields of a dataclass, of which none is missing and none is left over."""
  wanted, found = {field.name for field in dataclasses.fields(cls)}, dict(content)
  if wanted != set(found):
    missing, extra = sorted(wanted - set(found)), sorted(set(found) - wanted)
    raise UserError(
      f"not a description of towers: missing {[prefix + n for n in missing]}, unknown "
      f"{[prefix + n for n in extra]}; convert the weights again"
    )
  return found


def _one_of(name: str, value: Any, known) -> None:
  if value not in known:
    raise UserError(f"{name} = {value!r}: expected one of {', '.join(map(repr, known))}")
