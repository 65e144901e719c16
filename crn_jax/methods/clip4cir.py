"""CLIP4Cir (Baldrati et al., CVPRW 2022), written from its published description.

First both towers are fine-tuned so that the sum of the features of image and text is near the
target's (`FineTuning`); then a combiner takes the place of the sum, on features of the towers as
they are then (`Clip4Cir`). Both learn by batch classification.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from crn_jax.methods import losses
from crn_jax.methods.base import QueryVectors, TrainState, Variables
from crn_jax.methods.encoder import EncoderMethod
from crn_jax.methods.features import FeatureMethod, rows_of
from crn_jax.models.composition.combiner import Combiner
from crn_jax.models.dual_encoder import DualEncoder
from crn_jax.models.precision import at_least_float32

# Inverse temperature of the cosines, a constant.
LOGIT_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class FineTuning(EncoderMethod):
  """Both towers are trained; query = normalise(image + text), of features not normalised."""

  parts: ClassVar[tuple[str, ...]] = ("towers",)

  def init(self, key: jax.Array) -> Variables:
    return {
      "params": {"towers": {"encoder": self.init_encoder(key)}},
      "batch_stats": {"towers": {}},
    }

  def update(self, tx, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    def loss(params):
      # Reference and target in one batch: one pass through the tower, and one gradient.
      pictures = jnp.concatenate([batch["reference"], batch["target"]])
      images = self._apply(params, DualEncoder.encode_images, pictures).vectors
      reference, target = jnp.split(images, 2)
      text = self._apply(params, DualEncoder.encode_texts, batch["tokens"]).vectors
      layout = losses.Batch(self.axis_name)
      return losses.classification(reference + text, target, LOGIT_SCALE, layout), ({}, {})

    return self.descend(tx, state, loss)

  def encode_images(self, variables: Variables, pictures: jax.Array) -> tuple[Any, jax.Array]:
    features = self._apply(
      variables["params"]["towers"], DualEncoder.encode_images, pictures
    ).vectors
    return features, losses.normalize(features)

  def compose(
    self, variables: Variables, constants: Any, references: Any, tokens: jax.Array, mask: jax.Array
  ) -> QueryVectors:
    text = self._apply(variables["params"]["towers"], DualEncoder.encode_texts, tokens).vectors
    return QueryVectors(losses.normalize(references + text), losses.normalize(text), attention={})

  def _apply(self, params: dict, method: Callable, *args):
    return self.encoder.apply({"params": params["encoder"]}, *args, method=method)


@dataclasses.dataclass(frozen=True)
class Clip4Cir(FeatureMethod):
  """The combiner is trained, on features of both towers."""

  parts: ClassVar[tuple[str, ...]] = ("combiner",)
  frozen: ClassVar[tuple[str, ...]] = ("image", "text")
  scans_epoch: ClassVar[bool] = True

  @property
  def combiner(self) -> Combiner:
    """The module."""
    config = self.config
    return Combiner(config.clip4cir.dropout, self.axis_name, at_least_float32(config.model.dtype))

  def init(self, key: jax.Array) -> Variables:
    features = jnp.zeros((1, self.vector_dim))
    params = self.combiner.clone(axis_name=None).init(key, features, features, train=False)[
      "params"
    ]
    return {"params": {"combiner": params}, "batch_stats": {"combiner": {}}}

  def update(self, tx, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """As `Method.update`, of features: reference, target, text [batch, d]."""
    key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

    def loss(params):
      queries = self.combiner.apply(
        {"params": params}, batch["reference"], batch["text"], train=True, rngs={"dropout": key}
      )
      layout = losses.Batch(self.axis_name)
      return losses.classification(queries, batch["target"], LOGIT_SCALE, layout), ({}, {})

    return self.descend(tx, state, loss)

  def abstract_batch(self, n: int, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    table = jax.ShapeDtypeStruct((rows, self.vector_dim), jnp.float32)
    chosen = jax.ShapeDtypeStruct((n, 1, 3), jnp.int32)
    return {"images": table, "texts": table, "rows": chosen}

  def train_step(self, tx, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """All updates of an epoch.

    Args:
      tx: optimizer of a part.
      state: before them.
      batch: 'images', 'texts': this device's rows of the tables; 'rows': [batch, updates, 3] int,
        reference and target in the images, text in the texts.

    Returns:
      The state after them, and the means of their metrics.
    """
    tables = self.tables(batch)

    def one(state, rows):
      reference, target, text = (rows[:, i] for i in range(3))
      features = {
        "reference": rows_of(tables["images"], reference),
        "target": rows_of(tables["images"], target),
        "text": rows_of(tables["texts"], text),
      }
      return self.update(tx, state, features)

    state, metrics = jax.lax.scan(one, state, batch["rows"].swapaxes(0, 1))
    return state, jax.tree.map(jnp.mean, metrics)

  def compose_features(
    self, variables: Variables, references: jax.Array, texts: jax.Array
  ) -> QueryVectors:
    own = {"params": variables["params"]["combiner"]}
    composed = self.combiner.apply(own, references, texts, train=False)
    return QueryVectors(losses.normalize(composed), losses.normalize(texts), attention={})
