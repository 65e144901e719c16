"""Training against a bank of all training images (after SPN4CIR, Feng et al., MM 2024, last stage).

The image tower is frozen, so that every training image's feature is known beforehand and can stand
among the negatives of every query, not only those of its batch. The text tower is trained.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from crn_jax.methods import losses
from crn_jax.methods.base import QueryVectors, TrainState, Variables
from crn_jax.methods.features import FeatureMethod, half, rows_of
from crn_jax.models.dual_encoder import DualEncoder


@dataclasses.dataclass(frozen=True)
class Bank(FeatureMethod):
  """Query = normalise(image + text), of features not normalised."""

  parts: ClassVar[tuple[str, ...]] = ("text",)
  frozen: ClassVar[tuple[str, ...]] = ("image",)
  scans_epoch: ClassVar[bool] = False

  def init(self, key: jax.Array) -> Variables:
    params = {"encoder": half(self.init_encoder(key), "text")}
    return {"params": {"text": params}, "batch_stats": {"text": {}}}

  def abstract_batch(self, n: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    row = jax.ShapeDtypeStruct((n,), jnp.int32)
    return {
      "images": jax.ShapeDtypeStruct((rows, self.vector_dim), jnp.float32),
      "counts": jax.ShapeDtypeStruct((rows,), jnp.bool_),
      "reference": row,
      "target": row,
      "tokens": jax.ShapeDtypeStruct((n, self.config.data.max_words), jnp.int32),
    }

  def train_step(self, tx, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """As `update`, of this device's rows of the table 'images'."""
    return self.update(tx, state, batch | self.tables(batch))

  def update(self, tx, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      tx: optimizer of a part.
      state: before it.
      batch: 'images': [images, d] features of all training images, filled up; 'counts': [images]
        bool, False at what fills up; 'reference', 'target': [batch] int, rows of 'images';
        'tokens': [batch, words] int32.
    """

    def loss(params):
      queries = rows_of(batch["images"], batch["reference"]) + self._texts(params, batch["tokens"])
      layout = losses.Batch(self.axis_name)
      share = losses.info_nce(
        queries, batch["images"], batch["counts"], batch["target"], self.config.bank.temperature,
        layout,
      )  # fmt: skip
      return share, ({}, {})

    return self.descend(tx, state, loss)

  def compose_features(
    self, variables: Variables, references: jax.Array, texts: jax.Array
  ) -> QueryVectors:
    texts = self._texts(variables["params"]["text"], texts)
    return QueryVectors(losses.normalize(references + texts), losses.normalize(texts), attention={})

  def _texts(self, params: dict, tokens: jax.Array) -> jax.Array:
    own = {"params": params["encoder"]}
    return self.encoder.apply(own, tokens, method=DualEncoder.encode_texts).vectors
