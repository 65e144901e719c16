"""A model's compiled programs: vectors of pictures, and answers to queries."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from crn_jax.catalogue.model import Model
from crn_jax.errors import UserError
from crn_jax.input_pipeline import images
from crn_jax.methods.base import QueryVectors
from crn_jax.retrieval.encode import picture_sizing

# Longer texts are refused: what a model cannot read in any case need not be tokenized.
MAX_TEXT = 1_000


@dataclasses.dataclass(frozen=True)
class Answers:
  """What the model makes of queries; all NumPy, a row a query.

  Attributes:
    image: [n, vector_dim] of the picture alone.
    composed: [n, vector_dim] of picture and text.
    text: [n, vector_dim] of the text alone.
    attention: part -> [n, words, h, w]; see `methods.base.QueryVectors`.
  """

  image: np.ndarray
  composed: np.ndarray
  text: np.ndarray
  attention: dict[str, np.ndarray]


class Encoders:
  """Programs of fixed shapes, each compiled when it is first used.

  Attributes:
    model: the model.
  """

  def __init__(self, model: Model):
    self.model = model
    method, normalize = model.method, model.method.preprocessing.normalize

    def image_vectors(variables, pictures):
      return method.encode_images(variables, normalize(pictures))[1]

    def answer(variables, constants, pictures, tokens, mask):
      references, vectors = method.encode_images(variables, normalize(pictures))
      return vectors, method.compose(variables, constants, references, tokens, mask)

    self._image_vectors = jax.jit(method.precise(image_vectors))
    self._answer = jax.jit(method.precise(answer))
    self._constants = jax.jit(method.precise(method.constants))(model.variables)

  @property
  def empty_picture(self) -> np.ndarray:
    """[S, S, 3] uint8: what stands for the picture of a query that has none."""
    side = self.model.method.config.data.image_size
    return np.zeros((side, side, 3), np.uint8)

  def fit(self, picture: np.ndarray) -> np.ndarray:
    """A picture [h, w, 3] uint8 as the model takes it: [S, S, 3] uint8."""
    sizing = picture_sizing(self.model.method)
    return images.center_crop(images.fit(picture, sizing), sizing.image_size)

  def image_vectors(self, pictures: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    """Vectors of up to `batch_size` pictures.

    Args:
      pictures: n pictures [S, S, 3] uint8, as `fit` gives them.
      batch_size: pictures of the program; the batch is filled up.

    Returns:
      [n, vector_dim] float32.
    """
    vectors = self._image_vectors(self.model.variables, self._padded(pictures, batch_size))
    return np.asarray(vectors, np.float32)[: len(pictures)]

  def answer(
    self, pictures: Sequence[np.ndarray], texts: Sequence[str], batch_size: int
  ) -> Answers:
    """Answers up to `batch_size` queries, by one program.

    Args:
      pictures: n pictures as above; `empty_picture` where a query has none.
      texts: n texts, "" where a query has none.
      batch_size: queries of the program; the batch is filled up.
    """
    padded = [*texts, *[""] * (batch_size - len(texts))]
    encoded = [self.model.tokenizer.encode((text,)) for text in padded]
    tokens, mask = (np.stack(part) for part in zip(*encoded, strict=True))
    found = self._answer(
      self.model.variables, self._constants, self._padded(pictures, batch_size), tokens, mask
    )
    found: tuple[np.ndarray, QueryVectors] = jax.device_get(found)
    n, (image, vectors) = len(pictures), found
    return Answers(
      *(np.asarray(x[:n], np.float32) for x in (image, vectors.composed, vectors.text_only)),
      {part: x[:n] for part, x in vectors.attention.items()},
    )

  def _padded(self, pictures: Sequence[np.ndarray], batch_size: int) -> np.ndarray:
    empty = self.empty_picture
    return np.stack([*pictures, *[empty] * (batch_size - len(pictures))])


def check_text(text: str) -> str:
  """The text without white space around it.

  Raises:
    UserError: it is too long.
  """
  if len(text) > MAX_TEXT:
    raise UserError(f"the text has {len(text):,} characters; at most {MAX_TEXT:,} are read")
  return text.strip()
