"""CRN (Yang et al., IEEE TIP 2023): two branches that teach each other, their vectors joined.

The release updates in turn: local against the frozen global branch, then global against the frozen
*updated* local branch. It makes 12 backbone passes for that. Here each branch passes the batch once
and keeps its pull-back; only the updated local branch is run once more, as the global branch's
teacher: 6 passes (reference and target, three times) for the same numbers. The simultaneous update
leaves that third run out, and so do loss weights of zero where no term needs a teacher.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import optax

from crn_jax.errors import UserError
from crn_jax.methods import losses, optimizer
from crn_jax.methods.base import Method, QueryVectors, TrainState, Variables
from crn_jax.models.crn import BRANCHES, Branch

_UPDATE_MODES = ("alternating", "simultaneous")


@dataclasses.dataclass(frozen=True)
class CRN(Method):
  """CRN, its release and CLVC-Net, by the `model`, `loss` and `update_mode` of a configuration."""

  parts = BRANCHES
  attention_notes = {
    "local": ("words", "Which words each position of the image attends to."),
    "global": ("positions", "Which positions of the image each word attends to."),
  }

  def __post_init__(self):
    if self.config.update_mode not in _UPDATE_MODES:
      raise UserError(
        f"update_mode must be {' or '.join(map(repr, _UPDATE_MODES))}, not "
        f"{self.config.update_mode!r}"
      )

  @property
  def branches(self) -> dict[str, Branch]:
    """name -> module."""
    model = ml_collections.FrozenConfigDict(self.config.model)
    return {kind: Branch(kind, model, self.vocab_size, self.axis_name) for kind in BRANCHES}

  @property
  def vector_dim(self) -> int:
    return len(BRANCHES) * self.config.model.feature_dim

  def init(self, key: jax.Array) -> Variables:
    data = self.config.data
    image = jnp.zeros((1, data.image_size, data.image_size, 3))
    tokens = jnp.zeros((1, data.max_words), jnp.int32)
    variables = {}
    for name, branch in self.branches.items():
      key, branch_key = jax.random.split(key)
      branch = branch.clone(axis_name=None)
      variables[name] = branch.init(
        branch_key, image, image, tokens, tokens == 0, train=False, modification=True,
        auxiliary=True,
      )  # fmt: skip
    return {
      collection: {name: variables[name].get(collection, {}) for name in variables}
      for collection in ("params", "batch_stats")
    }

  def unused_parameters(self) -> frozenset[str]:
    unused = set()
    if self.config.model.aggregation == "discarded":
      unused.add("aggregation_fc")
    if not self.config.loss.modification:
      unused.add("relation")
    return frozenset(unused)

  def update(
    self, tx: optax.GradientTransformation, state: TrainState, batch: Mapping[str, jax.Array]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """See `Method.update`. Gradient norms are before clipping."""
    config, weights = self.config, self.config.loss
    # A function of seed and step alone, so that a resumed run draws what it would have drawn.
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    keys = dict(zip((*BRANCHES, "teacher"), jax.random.split(key, 3), strict=True))
    relations = {"modification": weights.modification > 0, "auxiliary": weights.auxiliary > 0}
    out, pull_back, batch_stats = {}, {}, {}
    for name in BRANCHES:
      out[name], pull_back[name], batch_stats[name] = jax.vjp(
        lambda p, name=name: self._forward(
          name, p, state.batch_stats[name], batch, keys[name], **relations
        ),
        state.params[name],
        has_aux=True,
      )
    params, opt_state, metrics = dict(state.params), dict(state.opt_state), {}
    for name, partner in (("local", "global"), ("global", "local")):
      teacher = out[partner]
      if name == "global" and config.update_mode == "alternating" and losses.needs_teacher(weights):
        teacher, _ = self._forward(
          'local', params['local'], state.batch_stats['local'], batch, keys['teacher'],
          modification=False, auxiliary=False,
        )  # fmt: skip
      (total, terms), of_output = jax.value_and_grad(self._losses, has_aux=True)(out[name], teacher)
      (grads,) = self._sum(pull_back[name](of_output))
      updates, opt_state[name] = tx.update(grads, state.opt_state[name], state.params[name])
      params[name] = optax.apply_updates(state.params[name], updates)
      terms = self._sum(terms | {"total": total})
      metrics |= {f"{name}/{term}": value for term, value in terms.items()}
      metrics[f"{name}/grad_norm"] = optimizer.norm(grads)
      metrics[f"{name}/logit_scale"] = state.params[name]["logit_scale"][0]
    average = self.averaged(state, params)
    return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics

  def constants(self, variables: Variables) -> dict[str, jax.Array]:
    """Maps of the zero image, with which texts are composed alone."""
    size = self.config.data.image_size
    return {
      n: self._apply(variables, n, Branch.encode_zero_image, size, size).map for n in BRANCHES
    }

  def encode_images(self, variables: Variables, pictures: jax.Array):
    out = {
      n: self._apply(variables, n, Branch.encode_image, pictures, train=False) for n in BRANCHES
    }
    vectors = join(out["local"].vector, out["global"].vector)
    return {n: o.map for n, o in out.items()}, vectors

  def compose(self, variables: Variables, constants, references, tokens, mask) -> QueryVectors:
    composed, text_only, attention = {}, {}, {}
    for n in BRANCHES:
      words = self._apply(variables, n, Branch.encode_text, tokens, mask)
      query = self._apply(variables, n, Branch.compose, references[n], *words, train=False)
      composed[n], attention[n] = query.vector, query.attention
      text_only[n] = self._apply(
        variables, n, Branch.compose_zero_image, constants[n], *words, train=False
      )
    return QueryVectors(
      join(composed["local"], composed["global"]),
      join(text_only["local"], text_only["global"]),
      attention,
    )

  def _forward(self, name, params, batch_stats, batch, key, **relations):
    out, updated = self.branches[name].apply(
      {'params': params, 'batch_stats': batch_stats},
      batch['reference'], batch['target'], batch['tokens'], batch['token_mask'],
      train=True, **relations, rngs={'drop_path': key}, mutable=['batch_stats'],
    )  # fmt: skip
    return out, updated.get("batch_stats", {})

  def _losses(self, out, teacher):
    return losses.branch_losses(out, teacher, self.config.loss, losses.Batch(self.axis_name))

  def _sum(self, tree):
    return jax.lax.psum(tree, self.axis_name) if self.axis_name else tree

  def _apply(self, variables: Variables, name: str, method, *args, **kwargs):
    own = {collection: tree[name] for collection, tree in variables.items()}
    return self.branches[name].apply(own, *args, **kwargs, method=method)


def join(local: jax.Array, global_: jax.Array) -> jax.Array:
  """Joins the vectors of the two branches into one retrieval vector of unit length.

  normalise([normalise(local), normalise(global_)]) with normalise(x) = x / max(|x|, 1e-12): each
  branch has half of the weight whatever its scale. An all-zero vector stays zero.

  Args:
    local: [n, d1] vectors of the local branch.
    global_: [n, d2] vectors of the global branch.

  Returns:
    [n, d1 + d2] float32.
  """

  def normalise(x):
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)), 1e-12)

  return normalise(jnp.concatenate([normalise(local), normalise(global_)], axis=-1))
