"""What every method offers: how a model is trained, and how it answers queries.

A method has one or more *parts* (CRN: its two branches) with an optimizer each. Trees of variables
are {collection: {part: ...}}, metrics are named 'part/term'. What surrounds a method (loop,
evaluation, checkpoints, curves) knows the parts by their names only.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from crn_jax.methods import optimizer
from crn_jax.models import precision
from crn_jax.models.backbones import registry
from crn_jax.models.preprocessing import Preprocessing

Variables = Mapping[str, Mapping[str, Any]]


@flax.struct.dataclass
class TrainState:
  """Everything that an update changes.

  Attributes:
    step: [] int32, updates done.
    params: part -> parameters.
    batch_stats: part -> running BatchNorm statistics.
    opt_state: part -> optimizer state.
    average: part -> moving average of the parameters; empty unless optimizer.ema_decay is set.
  """

  step: jax.Array
  params: dict
  batch_stats: dict
  opt_state: dict
  average: dict

  @classmethod
  def create(
    cls, variables: Variables, tx: optax.GradientTransformation, *, averaged: bool = False
  ) -> "TrainState":
    """State before the first update.

    Args:
      variables: {'params', 'batch_stats'}, as from `Method.init`.
      tx: optimizer of a part.
      averaged: whether to keep a moving average of the parameters.
    """
    params = variables["params"]
    opt_state = {part: tx.init(params[part]) for part in params}
    # Copies: the state's buffers are donated, and none can be given away twice.
    average = jax.tree.map(jnp.copy, params) if averaged else {}
    return cls(jnp.zeros((), jnp.int32), params, variables["batch_stats"], opt_state, average)

  @property
  def evaluated_field(self) -> str:
    """Name of the field whose parameters are evaluated: the average, if there is one."""
    return "average" if self.average else "params"

  def eval_variables(self) -> dict:
    """What is evaluated: {'params' (see `evaluated_field`), 'batch_stats'}."""
    return {"params": getattr(self, self.evaluated_field), "batch_stats": self.batch_stats}


@flax.struct.dataclass
class QueryVectors:
  """Answers to queries; vectors are [batch, vector_dim], of unit length.

  Attributes:
    composed: of reference image and text.
    text_only: of the text alone.
    attention: part -> [batch, words, h, w]: how words and positions of the reference belong
      together. Empty for a method that has none.
  """

  composed: jax.Array
  text_only: jax.Array
  attention: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
  """A model, how it is trained and how it is asked.

  Everything but `init` is code of one device, over a batch that may be split over `axis_name`.

  Attributes:
    config: the whole configuration.
    vocab_size: number of word ids.
    axis_name: mapped axis over which the batch is split, or None.
    parts: names of the parts.
    trains: whether there is something to train; if not, `update` is never called.
    pretrained: name of the module, in the parameters of a part, that `model.pretrained` is put
      into: 'backbone', or 'encoder', a pair of towers with a tokenizer of its own.
    attention_notes: part with attention -> what its weights sum to one over, "words" or
      "positions", and what it says, in a sentence.
  """

  config: ml_collections.ConfigDict
  vocab_size: int
  axis_name: str | None = None
  parts: ClassVar[tuple[str, ...]]
  trains: ClassVar[bool] = True
  pretrained: ClassVar[str] = "backbone"
  attention_notes: ClassVar[Mapping[str, tuple[str, str]]] = {}

  @property
  @abc.abstractmethod
  def vector_dim(self) -> int:
    """Width of the vectors by which images are retrieved."""

  @property
  def preprocessing(self) -> Preprocessing:
    """What the method's pictures are normalised and resized with."""
    return registry.preprocessing(self.config.model.backbone)

  @property
  def numerics(self) -> str:
    """How it computes, for what is kept of its vectors: another name once they come out others."""
    return precision.numerics(self.config.model.dtype)

  @abc.abstractmethod
  def init(self, key: jax.Array) -> Variables:
    """Fresh variables {'params': {part: ...}, 'batch_stats': {part: ...}}, float32."""

  def optimizer(self, steps_per_epoch: int, total_steps: int) -> optax.GradientTransformation:
    """Optimizer of a part."""
    return optimizer.create(
      self.config.optimizer, steps_per_epoch, total_steps, unused=self.unused_parameters()
    )

  def unused_parameters(self) -> frozenset[str]:
    """Names of the modules that exist in the parameters but reach no loss."""
    return frozenset()

  @abc.abstractmethod
  def update(
    self, tx: optax.GradientTransformation, state: TrainState, batch: Mapping[str, jax.Array]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of all parts.

    Args:
      tx: optimizer of a part.
      state: before the update.
      batch: reference, target: [batch, height, width, 3] normalised pictures; tokens:
        [batch, words] int32; token_mask: [batch, words] bool.

    Returns:
      The state after it, and metrics over the global batch: scalars named 'part/term', among them
      'part/total' for every part.
    """

  def descend(
    self,
    tx: optax.GradientTransformation,
    state: TrainState,
    loss: Callable[[Any], tuple[jax.Array, tuple[dict, Mapping]]],
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of a method's only part down the gradient of a loss; for use in `update`.

    Args:
      tx: optimizer of the part.
      state: before the update.
      loss: parameters of the part -> this device's share of the loss, see `losses`; its terms, name
        -> share, where there are several; moved running statistics of the part, {} if it has none.

    Returns:
      As `update`: 'part/total', the terms, and 'part/grad_norm' before clipping.
    """
    (part,) = self.parts
    (total, (terms, moved)), grads = jax.value_and_grad(loss, has_aux=True)(state.params[part])
    terms = terms | {"total": total}
    if self.axis_name:
      terms, grads = jax.lax.psum((terms, grads), self.axis_name)
    updates, opt_state = tx.update(grads, state.opt_state[part], state.params[part])
    params = {part: optax.apply_updates(state.params[part], updates)}
    average = self.averaged(state, params)
    metrics = {f"{part}/{name}": value for name, value in terms.items()}
    metrics[f"{part}/grad_norm"] = optimizer.norm(grads)
    state = TrainState(state.step + 1, params, {part: moved}, {part: opt_state}, average)
    return state, metrics

  def averaged(self, state: TrainState, params: dict) -> dict:
    """The moving average of all parts after an update from `state` to `params`; {} if not kept."""
    if not state.average:
      return {}
    decay = self.config.optimizer.ema_decay
    return optimizer.average_parameters(state.average, params, state.step, decay)

  def constants(self, variables: Variables) -> Any:
    """What all queries of an evaluation share, computed once; handed to `compose`."""
    del variables
    return ()

  @abc.abstractmethod
  def encode_images(self, variables: Variables, pictures: jax.Array) -> tuple[Any, jax.Array]:
    """Encodes pictures [batch, height, width, 3], normalised.

    Returns:
      What `compose` needs of a reference image, a tree of arrays [batch, ...]; vectors
      [batch, vector_dim] of unit length.
    """

  @abc.abstractmethod
  def compose(
    self, variables: Variables, constants: Any, references: Any, tokens: jax.Array, mask: jax.Array
  ) -> QueryVectors:
    """Answers queries.

    Args:
      variables: {'params', 'batch_stats'}.
      constants: as from `constants`.
      references: as from `encode_images`, a row a query.
      tokens: [batch, words] int32.
      mask: [batch, words] bool, False at padding.
    """

  @property
  def scores_pairs(self) -> bool:
    """Whether images are ranked by `pair_scores`, too, where a run is evaluated."""
    return False

  def pair_query(
    self,
    variables: Variables,
    constants: Any,
    references: jax.Array | None,
    tokens: jax.Array,
    mask: jax.Array,
  ) -> Any:
    """What `pair_scores` needs of queries: a tree of arrays, of the batch's length or of length 1.

    Args:
      variables, constants, tokens, mask: as for `compose`.
      references: [batch, vector_dim] vectors of the reference images; None for the text alone.
    """
    raise NotImplementedError

  def pair_scores(self, variables: Variables, query: Any, images: jax.Array) -> jax.Array:
    """What is added to the products of vectors before images are ranked.

    Args:
      variables: {'params', 'batch_stats'}.
      query: as from `pair_query`.
      images: [m, vector_dim] vectors.

    Returns:
      [batch, m] float32.
    """
    raise NotImplementedError

  def precise(self, function: Callable) -> Callable:
    """A function whose matrix products and convolutions have `model.precision`, if they do not
    say more themselves."""

    @functools.wraps(function)
    def traced(*args):
      with jax.default_matmul_precision(self.config.model.precision):
        return function(*args)

    return traced

  def train_step(
    self, tx: optax.GradientTransformation, state: TrainState, batch: Mapping[str, jax.Array]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """As `update`, of a batch of uint8 pictures as the loader gives it."""
    normalize = self.preprocessing.normalize
    pictures = {k: normalize(batch[k]) for k in ("reference", "target")}
    return self.update(tx, state, {**batch, **pictures})
