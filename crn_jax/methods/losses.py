"""Losses of composed image retrieval, per-device code.

Each function returns this device's share: the sum of the shares over the devices is the loss of
the global batch, and the sum of their gradients is its gradient. In-batch negatives are gathered
over the devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import optax

from crn_jax.models.crn import BranchOutput

# Scale of the cosine logits in the mutual KL; a constant, unlike the classification's.
MUTUAL_KL_SCALE = 10.0


@dataclasses.dataclass(frozen=True)
class Batch:
  """How the global batch is laid out over devices.

  Attributes:
    axis_name: mapped axis, or None on a single device.
  """

  axis_name: str | None = None

  def size(self, local: jax.Array) -> int:
    """Number of rows over all devices."""
    return local.shape[0] * (jax.lax.axis_size(self.axis_name) if self.axis_name else 1)

  def gather(self, local: jax.Array) -> jax.Array:
    """Rows of all devices, in order."""
    if not self.axis_name:
      return local
    return jax.lax.all_gather(local, self.axis_name, tiled=True)

  def labels(self, local: jax.Array) -> jax.Array:
    """Position of each local row in the gathered rows."""
    first = jax.lax.axis_index(self.axis_name) * local.shape[0] if self.axis_name else 0
    return first + jnp.arange(local.shape[0])


def normalize(x: jax.Array) -> jax.Array:
  """L2-normalises rows; the divisor is max(norm, 1e-12).

  Written with the square so that the gradient at a zero row is zero, not NaN.
  """
  return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


def cosine_logits(queries: jax.Array, targets: jax.Array, batch: Batch) -> jax.Array:
  """Cosine of each local query with each target of the global batch: [local, global]."""
  return _scores(normalize(queries), batch.gather(normalize(targets)))


def classification(
  queries, targets, logit_scale, batch: Batch, *, cosine: bool = True
) -> jax.Array:
  """Batch-based classification: each query picks its target among all targets of the batch.

  Args:
    queries, targets: [local batch, dim].
    logit_scale: [1] inverse temperature.
    batch: layout over devices.
    cosine: whether to compare by cosine, or by the query's dot product with the target's unit
      vector.

  Returns:
    Share of the mean cross-entropy in nats.
  """
  queries = normalize(queries) if cosine else queries
  return cross_entropy(logit_scale * _scores(queries, batch.gather(normalize(targets))), batch)


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
  """Of logits [local batch, global batch] of queries with targets: share of the mean, in nats."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels(logits))
  return jnp.sum(losses) / batch.size(logits)


def triplet(queries, targets, margin: float, batch: Batch) -> jax.Array:
  """Bidirectional triplet ranking loss with semi-hard negatives (VAL).

  With d(a, b) = |a - b|^2 of unit vectors, in [0, 4], the hinge of an anchor a, its positive p and
  its negative n is max(d(a, p) - d(a, n) + margin, 0). Anchors are the queries, with targets as
  positives and negatives, and the targets, with queries; the two means are added up. The negative
  of an anchor is the nearest of the batch that is not nearer than its positive: *semi-hard*, after
  FaceNet (Schroff et al., CVPR 2015). An anchor that has none adds nothing.

  Args:
    queries, targets: [local batch, dim].
    margin: in units of d.
    batch: layout over devices.

  Returns:
    Share of the sum of the two means.
  """
  first, second = _hinges(queries, targets, margin, batch), _hinges(targets, queries, margin, batch)
  return jnp.sum(first + second) / batch.size(queries)


def _hinges(anchors, others, margin: float, batch: Batch) -> jax.Array:
  """Hinge of each local anchor, whose positive is the row of `others`: [local batch]."""
  distances = 2.0 - 2.0 * cosine_logits(anchors, others, batch)
  own = batch.labels(anchors)[:, None]
  positive = jnp.take_along_axis(distances, own, axis=1)
  allowed = (distances >= positive) & (jnp.arange(distances.shape[1]) != own)
  negative = jnp.min(jnp.where(allowed, distances, jnp.inf), axis=1)
  return jnp.maximum(positive[:, 0] - negative + margin, 0.0)


def info_nce(
  queries: jax.Array,
  bank: jax.Array,
  counts: jax.Array,
  targets: jax.Array,
  temperature: float,
  batch: Batch,
) -> jax.Array:
  """Each query picks its target among all images of a bank.

  Args:
    queries: [local batch, dim].
    bank: [images, dim], the same on all devices.
    counts: [images] bool, False at rows that fill the bank up.
    targets: [local batch] int, row of each query's target in the bank.
    temperature: divisor of the cosines.
    batch: layout of the queries over devices.

  Returns:
    Share of the mean cross-entropy in nats.
  """
  logits = _scores(normalize(queries), normalize(bank)) / temperature
  logits = jnp.where(counts, logits, -jnp.inf)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(losses) / batch.size(queries)


def mutual_kl(queries, targets, teacher_queries, teacher_targets, batch: Batch) -> jax.Array:
  """KL(teacher || student) of the rankings over the batch, a mean over queries, in nats."""
  student = jax.nn.log_softmax(MUTUAL_KL_SCALE * cosine_logits(queries, targets, batch))
  teacher = jax.nn.log_softmax(
    MUTUAL_KL_SCALE * cosine_logits(teacher_queries, teacher_targets, batch)
  )
  return jnp.sum(jnp.exp(teacher) * (teacher - student)) / batch.size(queries)


def mean_square(a: jax.Array, b: jax.Array, batch: Batch) -> jax.Array:
  """Share of the mean squared difference over all elements of the global batch."""
  elements_per_row = a[0].size
  return jnp.sum(jnp.square(a - b)) / (elements_per_row * batch.size(a))


def needs_teacher(weights: ml_collections.ConfigDict) -> bool:
  """Whether any term with a weight compares a branch with its partner."""
  return bool(weights.cross_branch or weights.mutual_kl)


def branch_losses(
  out: BranchOutput, teacher: BranchOutput, weights: ml_collections.ConfigDict, batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """All losses of one branch against its frozen partner.

  Terms with a weight of zero are not computed: zero times an infinite value would not be zero.

  Args:
    out: the branch's outputs.
    teacher: the partner's outputs; only its two vectors are used, and no gradient enters them.
    weights: the `loss` part of the configuration.
    batch: layout over devices.

  Returns:
    Share of the weighted total, and the shares of the unweighted terms by name.
  """
  teacher_query = jax.lax.stop_gradient(teacher.query_vector)
  teacher_target = jax.lax.stop_gradient(teacher.target_vector)
  q, t, scale = out.query_vector, out.target_vector, out.logit_scale
  known = {
    "classification": lambda: classification(q, t, scale, batch),
    "cross_branch": lambda: (
      mean_square(t, teacher_target, batch) + mean_square(q, teacher_query, batch)
    ),
    "mutual_kl": lambda: mutual_kl(q, t, teacher_query, teacher_target, batch),
  }
  if out.composed_map is not None:
    known["perceptual"] = lambda: mean_square(out.composed_map, out.target_map, batch)
  if out.difference is not None:
    known["modification"] = lambda: classification(out.difference, out.text_vector, scale, batch)
  if out.auxiliary_vector is not None:
    known["auxiliary"] = lambda: classification(out.auxiliary_vector, t, scale, batch)
  terms = {name: term() for name, term in known.items() if weights[name]}
  return sum(weights[name] * value for name, value in terms.items()), terms


def _scores(queries: jax.Array, targets: jax.Array) -> jax.Array:
  """Dot products [n, m] of [n, d] and [m, d], whatever model.precision says: a temperature
  multiplies what rounding would leave in them."""
  return jnp.matmul(queries, targets.T, precision=jax.lax.Precision.HIGHEST)
