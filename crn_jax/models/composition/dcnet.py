"""DCNet: dual composition network (Kim, Yu, Kim and Kim, AAAI 2021), section 3; `equations` its.

An image is E = 7 vectors x_e of as many experts, a text is as many t_e (1-4):
  x_e = FC_e(mean of the map of the stage before the last), FC_e(mean of the last map),
        FC_e(last map at a position) for its centre and four positions around it
  t_e = FC_e(sum_l a_el w_l),  a_e = softmax_l(FC(FC(m_e * w))) over the words w, m_e learned
The composition network makes the query (5-8), the correction network a text of two images (10-12):
  c_e = w_g sigmoid(FC(z)) * x_e + w_r FC(FC(z)),  z = [x_e; t_e; x_e * t_e]
  d_e = FC([x_e; y_e; FC([y_e * x_e; y_e]) - FC([x_e * y_e; x_e])],  y of the target
Scores of a query with an image (9, 13, 17), each for a cross-entropy over the batch (14-16, 18):
  s_r = sum_e c_e . y_e,  s_c = sum_e d_e . t_e,  s_j = sum_e c_e . COMP(x_e, (d_e + t_e) / 2)

Where a run is evaluated, images are ranked by s_r + s_c. s_r is a product of vectors, s_c a pass of
the correction network for each pair of images: what has vectors alone, an index or a catalogue,
ranks by s_r, "Joint (Comp)" in table 3 of the paper. Query vectors are normalised there, so that
both scores are divided by the length of sqrt(E) [c_1; ...; c_E], which changes no ranking.

"ReLU for every FC layer with dropout of rate 0.2" is read as: but where a sigmoid or a softmax
stands. x_e and t_e are normalised. FC_e is an expert's own, FC all experts'.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.models import linear
from crn_jax.models.composition.base import PairScoring
from crn_jax.models.layers import dropout

# Of the spatial experts, (x, y) on a map of 7 x 7.
POSITIONS = ((3, 1), (1, 3), (3, 3), (5, 3), (3, 5))
EXPERTS = 2 + len(POSITIONS)
_DROPOUT = 0.2
_PERTURBATION = 0.5  # gamma of eq. (17).


class DCNet(PairScoring):
  """Experts, composition network and correction network."""

  normalised = False
  pair_losses = ("correction", "joint")
  pair_modules = ("correcting",)
  ranking_loss = "correction"

  def setup(self):
    sizes = (self.config.feature_dim, self.axis_name, self.dtype)
    self.image_experts = _ImageExperts(*sizes)
    self.text_experts = _TextExperts(*sizes)
    self.composing = _CompositionNetwork(*sizes)
    self.correcting = _CorrectionNetwork(*sizes)

  def image(self, features, *, train):
    x = self.image_experts(features, train=train)
    return x, (_joined(x),)

  def compose(self, reference, words, mask, *, train):
    text = self.text_experts(words, mask, train=train)
    return self._queries(self.composing(reference, text, train=train))

  def compose_against(self, reference, words, mask, targets, *, train):
    text = self.text_experts(words, mask, train=train)
    composed = self.composing(reference, text, train=train)
    if self.axis_name:
      targets = jax.tree.map(lambda y: jax.lax.all_gather(y, self.axis_name, tiled=True), targets)
    # [queries, targets, experts, d]
    x, t, y = reference[:, None], text[:, None], targets[0].reshape(-1, *reference.shape[1:])[None]
    difference = self.correcting(x, y, train=train)
    mixed = _PERTURBATION * difference + (1 - _PERTURBATION) * t
    again = self.composing(x, mixed, train=train)
    scores = {
      "correction": jnp.sum(difference * t, (-2, -1)),
      "joint": jnp.sum(composed[:, None] * again, (-2, -1)),
    }
    return self._queries(composed), scores

  def from_vectors(self, vectors):
    return _unit(vectors.reshape(len(vectors), EXPERTS, -1)).astype(self.dtype)

  def pair_query(self, reference, words, mask):
    """Experts of the reference; those of the text in units of the query's length, float32."""
    text = self.text_experts(words, mask, train=False)
    (query,) = self._queries(self.composing(reference, text, train=False))
    return reference, text / _length(query)[:, None]

  def pair_scores(self, query, images):
    (reference, text), y = query, images
    difference = self.correcting(reference[:, None], y[None], train=False)
    return jnp.sum(difference * text[:, None], (-2, -1))

  def _queries(self, composed: jax.Array) -> tuple[jax.Array]:
    """Such that the product with an image's vector of unit length is s_r."""
    return (EXPERTS**0.5 * _joined(composed),)


class _Linear(nn.Module):
  """Linear layer on the concatenation of its inputs, whose other axes are broadcast.

  What does not depend on both of a pair is multiplied once, not once for each pair.
  """

  features: int
  dtype: jnp.dtype
  use_bias: bool = True

  @nn.compact
  def __call__(self, *parts: jax.Array) -> jax.Array:
    width = sum(x.shape[-1] for x in parts)
    uniform = linear.torch_uniform(width)
    kernel = self.param("kernel", uniform, (width, self.features)).astype(self.dtype)
    result, first = 0.0, 0
    for x in parts:
      result = result + x @ kernel[first : first + x.shape[-1]]
      first += x.shape[-1]
    if self.use_bias:
      result = result + self.param("bias", uniform, (self.features,)).astype(self.dtype)
    return result


class _FC(nn.Module):
  """FC of the paper, on the concatenation of its inputs: linear, ReLU, dropout."""

  features: int
  axis_name: str | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, *parts: jax.Array, train: bool) -> jax.Array:
    x = nn.relu(_Linear(self.features, self.dtype, name="linear")(*parts))
    return dropout(self, x, _DROPOUT) if train else x


class _ImageExperts(nn.Module):
  """Maps -> [batch, experts, d], of unit length: eq. (1) and (2)."""

  features: int
  axis_name: str | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, features, *, train: bool) -> jax.Array:
    last = features.map
    height, width = last.shape[1:3]
    seen = [jnp.mean(features.stages[-2], (1, 2)), jnp.mean(last, (1, 2))]
    # On maps of another size, the position that holds the centre of the one on 7 x 7.
    seen += [last[:, (2 * y + 1) * height // 14, (2 * x + 1) * width // 14] for x, y in POSITIONS]
    experts = [
      _FC(self.features, self.axis_name, self.dtype, name=f"expert{i}")(v, train=train)
      for i, v in enumerate(seen)
    ]
    return _unit(jnp.stack(experts, axis=1))


class _TextExperts(nn.Module):
  """Words [batch, words, d] -> [batch, experts, d], of unit length: eq. (4)."""

  features: int
  axis_name: str | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, words: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
    d, sizes = self.features, (self.features, self.axis_name, self.dtype)
    if train:
      words = dropout(self, words, _DROPOUT)
    queries = self.param("queries", nn.initializers.normal(1.0), (EXPERTS, d)).astype(self.dtype)
    hidden = _FC(*sizes, name="hidden")(words[:, :, None] * queries, train=train)
    # [batch, words, experts, 1]; a bias would not change the softmax.
    scores = _Linear(1, self.dtype, use_bias=False, name="score")(hidden)
    weights = jax.nn.softmax(scores, axis=1, where=mask[:, :, None, None])
    attended = jnp.sum(weights * words[:, :, None], axis=1)
    experts = [_FC(*sizes, name=f"expert{i}")(attended[:, i], train=train) for i in range(EXPERTS)]
    return _unit(jnp.stack(experts, axis=1))


class _CompositionNetwork(nn.Module):
  """x and t [..., experts, d] -> c: eq. (5) to (8). w_g, w_r start as TIRG's, at 1 and 10."""

  features: int
  axis_name: str | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, t: jax.Array, *, train: bool) -> jax.Array:
    sizes = (self.features, self.axis_name, self.dtype)
    both = (x, t, x * t)
    gate = nn.sigmoid(_Linear(self.features, self.dtype, name="gate")(*both))
    residual = _FC(*sizes, name="hidden")(*both, train=train)
    residual = _FC(*sizes, name="residual")(residual, train=train)
    w = self.param("weights", lambda key: jnp.array([1.0, 10.0])).astype(x.dtype)
    return w[0] * gate * x + w[1] * residual


class _CorrectionNetwork(nn.Module):
  """x of the reference, y of the target [..., experts, d] -> d: eq. (10) to (12)."""

  features: int
  axis_name: str | None
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array, *, train: bool) -> jax.Array:
    sizes = (self.features, self.axis_name, self.dtype)
    of_target = _FC(*sizes, name="target")(x * y, y, train=train)
    of_reference = _FC(*sizes, name="reference")(x * y, x, train=train)
    return _FC(*sizes, name="difference")(x, y, of_target - of_reference, train=train)


def _unit(x: jax.Array) -> jax.Array:
  """x / |x| on the last axis; zero where x is, with a gradient that is."""
  return x / _length(x)


def _length(x: jax.Array) -> jax.Array:
  """|x| on the last axis, which stays; 1e-12 where it is less."""
  return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-24))


def _joined(x: jax.Array) -> jax.Array:
  """[batch, experts, d] -> [batch, experts * d]."""
  return x.reshape(len(x), -1)
