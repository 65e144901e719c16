"""Methods of one branch: a composition of `models/composition/`, and a loss on its vectors.

TIRG, VAL and their kin differ in `model.composition`; backbone, text encoder, losses and optimizer
are fields of the configuration, so that methods can be compared on equal terms.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections

from crn_jax.errors import UserError
from crn_jax.methods import losses
from crn_jax.methods.base import Method, QueryVectors, TrainState, Variables
from crn_jax.models.composition.base import Composition, PairScoring
from crn_jax.models.composition.registry import COMPOSITIONS
from crn_jax.models.single import Single

_PART = "single"


@dataclasses.dataclass(frozen=True)
class SingleBranch(Method):
  """A backbone, a text encoder and the composition that `model.composition` names."""

  parts: ClassVar[tuple[str, ...]] = (_PART,)

  def __post_init__(self):
    name = self.config.model.composition
    if name not in COMPOSITIONS:
      raise UserError(f"model.composition: expected one of {', '.join(COMPOSITIONS)}, not {name!r}")
    wanted, backbone = self.composition.backbones, self.config.model.backbone.name
    if wanted and backbone not in wanted:
      raise UserError(
        f"model.composition = {name!r} works with the backbones {', '.join(wanted)}, not with "
        f"{backbone}: name one of them after the configuration's colon"
      )

  @property
  def model(self) -> Single:
    """The module."""
    config = ml_collections.FrozenConfigDict(self.config.model)
    return Single(config, self.vocab_size, self.axis_name)

  @property
  def composition(self) -> type[Composition]:
    """Its class."""
    return COMPOSITIONS[self.config.model.composition]

  @functools.cached_property  # The model is traced for it, and every evaluation asks.
  def vector_dim(self) -> int:
    variables = jax.eval_shape(self.init, jax.random.key(0))
    pictures = jax.ShapeDtypeStruct(self._picture.shape, jnp.float32)
    _, vectors = jax.eval_shape(self._one_device.encode_images, variables, pictures)
    return vectors.shape[-1]

  @property
  def _one_device(self) -> "SingleBranch":
    return dataclasses.replace(self, axis_name=None)

  @property
  def _picture(self) -> jax.Array:
    """The image that says nothing: zero after normalisation, i.e. the mean colour. Batch of 1."""
    side = self.config.data.image_size
    return jnp.zeros((1, side, side, 3))

  def init(self, key: jax.Array) -> Variables:
    tokens = jnp.zeros((1, self.config.data.max_words), jnp.int32)
    model = self.model.clone(axis_name=None)
    variables = model.init(key, self._picture, self._picture, tokens, tokens == 0, train=False)
    return {c: {_PART: variables.get(c, {})} for c in ("params", "batch_stats")}

  def unused_parameters(self) -> frozenset[str]:
    weights, composition = self.config.loss, self.composition
    used = {
      "text": composition.uses_text,
      # The length of vectors that are compared by cosine.
      "vector_scale": weights.classification and composition.normalised,
      **dict.fromkeys(
        composition.pair_modules, any(weights[name] for name in composition.pair_losses)
      ),
    }
    return frozenset(name for name, is_used in used.items() if not is_used)

  def update(self, tx, state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """See `Method.update`. Terms are sums over the levels; gradient norms are before clipping."""
    # A function of seed and step alone, so that a resumed run draws what it would have drawn.
    key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
    drop_path, dropout = jax.random.split(key)

    def loss(params):
      (queries, targets, pairs, length), moved = self.model.apply(
        {"params": params, "batch_stats": state.batch_stats[_PART]},
        batch["reference"], batch["target"], batch["tokens"], batch["token_mask"],
        train=True, rngs={"drop_path": drop_path, "dropout": dropout}, mutable=["batch_stats"],
      )  # fmt: skip
      terms = self._terms(queries, targets, pairs, length)
      total = sum(self.config.loss[name] * value for name, value in terms.items())
      return total, (terms, moved.get("batch_stats", {}))

    length = state.params[_PART]["vector_scale"][0]
    state, metrics = self.descend(tx, state, loss)
    return state, metrics | {f"{_PART}/vector_scale": length}

  def _terms(self, queries, targets, pairs, length) -> dict[str, jax.Array]:
    """This device's shares of the losses with a weight, by name; no term is computed for naught."""
    layout = losses.Batch(self.axis_name)
    # Queries that are not normalised have a length of their own.
    scale = jnp.square(length) if self.composition.normalised else 1.0
    known = {
      "classification": lambda q, t: losses.classification(
        q, t, scale, layout, cosine=self.composition.normalised
      ),
      "triplet": lambda q, t: losses.triplet(q, t, self.config.single.margin, layout),
    }
    levels = list(zip(queries, targets, strict=True))
    terms = {
      name: sum(term(q, t) for q, t in levels)
      for name, term in known.items()
      if self.config.loss[name]
    }
    return terms | {
      name: losses.cross_entropy(scores, layout)
      for name, scores in pairs.items()
      if self.config.loss[name]
    }

  def constants(self, variables: Variables) -> Any:
    """What `compose` needs of the zero image, with which texts are composed alone."""
    return self._apply(variables, Single.encode_images, self._picture, train=False)[0]

  def encode_images(self, variables: Variables, pictures: jax.Array) -> tuple[Any, jax.Array]:
    reference, vectors = self._apply(variables, Single.encode_images, pictures, train=False)
    return reference, join(vectors)

  def compose(
    self, variables: Variables, constants: Any, references: Any, tokens: jax.Array, mask: jax.Array
  ) -> QueryVectors:
    zero = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(tokens), *x.shape[1:])), constants)
    composed, text_only = (
      join(self._apply(variables, Single.compose, images, tokens, mask, train=False))
      for images in (references, zero)
    )
    return QueryVectors(composed, text_only, attention={})

  @property
  def scores_pairs(self) -> bool:
    """A network that was not trained to rank would rank at random."""
    made = self.composition
    return issubclass(made, PairScoring) and self.config.loss[made.ranking_loss] > 0

  def pair_query(self, variables, constants, references, tokens, mask):
    if references is None:
      reference = constants
    else:
      reference = self._apply(variables, Single.from_vectors, references)
    return self._apply(variables, Single.pair_query, reference, tokens, mask)

  def pair_scores(self, variables, query, images):
    return self._apply(variables, Single.pair_scores, query, images)

  def _apply(self, variables: Variables, method, *args, **kwargs):
    own = {collection: tree[_PART] for collection, tree in variables.items()}
    return self.model.apply(own, *args, **kwargs, method=method)


def join(vectors: tuple[jax.Array, ...]) -> jax.Array:
  """Vectors of all levels as one of unit length, in which every level weighs the same.

  Args:
    vectors: one [n, d_k] a level.

  Returns:
    [n, sum of d_k] float32.
  """
  return losses.normalize(jnp.concatenate([losses.normalize(v) for v in vectors], axis=-1))
