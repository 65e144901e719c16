"""Composed retrieval without training: a query is a mixture of its image's and its text's vector.

Towers that put images and texts into one space (CLIP, SigLIP, BGE-VL) answer "this picture, but
..." with the direction between the two.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from crn_jax.errors import UserError
from crn_jax.methods.base import QueryVectors, TrainState, Variables
from crn_jax.methods.encoder import EncoderMethod
from crn_jax.methods.losses import normalize
from crn_jax.models.dual_encoder import DualEncoder

_PART = "zero_shot"


def slerp(image: jax.Array, text: jax.Array, weight: float) -> jax.Array:
  """Spherical linear interpolation: the point at `weight` of the arc from image to text.

  Args:
    image, text: [batch, d] of unit length.
    weight: share of the text, from 0 to 1.

  Returns:
    [batch, d] of unit length; of opposite vectors, between which there is no one arc, anything.
  """
  cosine = jnp.clip(jnp.sum(image * text, axis=-1, keepdims=True), -1.0, 1.0)
  angle = jnp.arccos(cosine)
  # Of equal vectors every point of the arc is their sum's direction.
  apart = angle > 1e-4
  safe = jnp.where(apart, angle, 1.0)
  along = jnp.sin((1.0 - weight) * safe) * image + jnp.sin(weight * safe) * text
  return normalize(jnp.where(apart, along, (1.0 - weight) * image + weight * text))


# zero_shot.query -> function of the unnormalised [batch, d] vectors of image and text, and of
# zero_shot.slerp_weight. BGE-VL was trained for the plain sum of what the towers give.
QUERIES: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
  "sum": lambda image, text, weight: normalize(image + text),
  "slerp": lambda image, text, weight: slerp(normalize(image), normalize(text), weight),
  "image": lambda image, text, weight: normalize(image),
  "text": lambda image, text, weight: normalize(text),
}


@dataclasses.dataclass(frozen=True)
class ZeroShot(EncoderMethod):
  """The towers as they are."""

  parts: ClassVar[tuple[str, ...]] = (_PART,)
  trains: ClassVar[bool] = False

  def init(self, key: jax.Array) -> Variables:
    return {"params": {_PART: {"encoder": self.init_encoder(key)}}, "batch_stats": {_PART: {}}}

  def update(self, tx, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    raise UserError("method zero_shot: there is nothing to train; evaluate it with --mode=eval")

  def encode_images(self, variables: Variables, pictures: jax.Array) -> tuple[Any, jax.Array]:
    vectors = self._apply(variables, DualEncoder.encode_images, pictures).vectors
    return vectors, normalize(vectors)

  def compose(
    self, variables: Variables, constants: Any, references: Any, tokens: jax.Array, mask: jax.Array
  ) -> QueryVectors:
    texts = self._apply(variables, DualEncoder.encode_texts, tokens).vectors
    how = self.config.zero_shot
    composed = QUERIES[how.query](references, texts, how.slerp_weight)
    return QueryVectors(composed, normalize(texts), attention={})

  def _apply(self, variables: Variables, method: Callable, *args):
    return self.encoder.apply({"params": variables["params"][_PART]["encoder"]}, *args,
                              method=method)  # fmt: skip
