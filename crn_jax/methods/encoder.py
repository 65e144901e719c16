"""What methods on a pair of pretrained towers share: the towers' description and their weights."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from crn_jax.errors import UserError
from crn_jax.methods.base import Method
from crn_jax.models.dual_encoder import DualEncoder, DualEncoderConfig
from crn_jax.models.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True)
class EncoderMethod(Method):
  """A method whose vectors come from the towers that `config.model.encoder` describes.

  The description is put there from the folder `config.model.pretrained` (`crn_jax/pretrained.py`).
  A part with towers has their parameters under the name 'encoder', where the folder's are put.
  """

  pretrained: ClassVar[str] = "encoder"

  def __post_init__(self):
    towers, data = self.encoder_config, self.config.data
    length, fits = towers.text.length, data.max_words <= towers.text.length
    if not fits or (not towers.text.causal and data.max_words != length):
      expected = f"{length} or less" if towers.text.causal else f"{length}, as texts are padded to"
      raise UserError(f"data.max_words = {data.max_words}: expected {expected}: these towers have "
                      f"{length} positions")  # fmt: skip

  @functools.cached_property
  def encoder_config(self) -> DualEncoderConfig:
    """The towers, for pictures of `data.image_size`.

    Raises:
      UserError: if there is no description in the configuration, or it is none.
    """
    description = self.config.model.encoder
    if not description:
      raise UserError(
        f"model.encoder: the method {self.config.method!r} works on pretrained towers, and none "
        f"are described; name their folder with model.pretrained"
      )
    found = DualEncoderConfig.from_dict(description.to_dict())
    return found.with_image_size(self.config.data.image_size)

  @property
  def encoder(self) -> DualEncoder:
    """The towers' module."""
    model = self.config.model
    return DualEncoder(self.encoder_config, model.remat, jnp.dtype(model.dtype))

  @property
  def vector_dim(self) -> int:
    return self.encoder_config.vector_dim

  @property
  def preprocessing(self) -> Preprocessing:
    return self.encoder_config.preprocessing

  def init_encoder(self, key: jax.Array) -> dict:
    """Random parameters of the towers, float32."""
    towers = self.encoder_config
    side, length = towers.image.image_size, towers.text.length
    picture, ids = jnp.zeros((1, side, side, 3)), jnp.zeros((1, length), jnp.int32)
    return self.encoder.init(key, picture, ids)["params"]
