"""One training update of both branches, per-device code.

The release updates in turn: local against the frozen global branch, then global against the frozen
*updated* local branch. It makes 12 backbone passes for that. Here each branch passes the batch once
and keeps its pull-back; only the updated local branch is run once more, as the global branch's
teacher: 6 passes (reference and target, three times) for the same numbers. The simultaneous update
leaves that third run out.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax

from crn_jax.input_pipeline import images
from crn_jax.methods import losses, optimizer
from crn_jax.models.crn import BRANCHES, CRN


@flax.struct.dataclass
class TrainState:
  """Everything that an update changes.

  Attributes:
    step: [] int32, updates done.
    params: branch -> parameters.
    batch_stats: branch -> running BatchNorm statistics.
    opt_state: branch -> optimizer state.
    average: branch -> moving average of the parameters; empty unless optimizer.ema_decay is set.
  """

  step: jax.Array
  params: dict
  batch_stats: dict
  opt_state: dict
  average: dict

  @classmethod
  def create(
    cls, variables: dict, tx: optax.GradientTransformation, *, averaged: bool = False
  ) -> "TrainState":
    """State before the first update.

    Args:
      variables: as from `CRN.init`.
      tx: optimizer of a branch.
      averaged: whether to keep a moving average of the parameters.
    """
    params = variables["params"]
    opt_state = {name: tx.init(params[name]) for name in BRANCHES}
    # Copies: the state's buffers are donated, and none can be given away twice.
    average = jax.tree.map(jnp.copy, params) if averaged else {}
    return cls(jnp.zeros((), jnp.int32), params, variables["batch_stats"], opt_state, average)

  def eval_variables(self) -> dict:
    """What is evaluated: {'params' (averaged ones, if there are), 'batch_stats'}."""
    return {"params": self.average or self.params, "batch_stats": self.batch_stats}


def make_train_step(
  crn: CRN,
  tx: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
  axis_name: str | None,
) -> Callable:
  """Builds `step(state, batch) -> (state, metrics)` on batches of uint8 pictures.

  See `make_update`; `batch` is as the loader gives it (`loader.train_batches`).
  """
  update = make_update(crn, tx, config, axis_name)

  def step(state: TrainState, batch: dict):
    pictures = {k: images.normalize(batch[k]) for k in ("reference", "target")}
    return update(state, batch | pictures)

  return step


def make_update(
  crn: CRN,
  tx: optax.GradientTransformation,
  config: ml_collections.ConfigDict,
  axis_name: str | None,
) -> Callable:
  """Builds `update(state, batch) -> (state, metrics)`.

  Args:
    crn: the model, built with the same `axis_name`.
    tx: optimizer of a branch.
    config: the whole configuration.
    axis_name: mapped axis over which the batch is split, or None.

  Returns:
    A function of the state and of a batch {reference, target: [batch, height, width, 3] normalised;
    tokens: [batch, words] int32; token_mask: [batch, words] bool}. Metrics are scalars over the
    global batch, named 'local/classification' and so on; gradient norms are before clipping.

  Raises:
    ValueError: on an unknown `config.update_mode`.
  """
  if config.update_mode not in ("alternating", "simultaneous"):
    raise ValueError(
      f"update_mode must be 'alternating' or 'simultaneous', not {config.update_mode!r}"
    )
  layout = losses.Batch(axis_name)
  relations = {
    "modification": config.loss.modification > 0,
    "auxiliary": config.loss.auxiliary > 0,
  }

  def psum(tree):
    return jax.lax.psum(tree, axis_name) if axis_name else tree

  def forward(name, params, batch_stats, batch, key, **ask):
    out, updated = crn.branches[name].apply(
      {'params': params, 'batch_stats': batch_stats},
      batch['reference'], batch['target'], batch['tokens'], batch['token_mask'],
      train=True, **ask, rngs={'drop_path': key}, mutable=['batch_stats'],
    )  # fmt: skip
    return out, updated.get("batch_stats", {})

  def loss_of_output(out, teacher):
    return losses.branch_losses(out, teacher, config.loss, layout)

  def update(state: TrainState, batch: dict):
    # A function of seed and step alone, so that a resumed run draws what it would have drawn.
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    keys = dict(zip((*BRANCHES, "teacher"), jax.random.split(key, 3), strict=True))
    out, pull_back, batch_stats = {}, {}, {}
    for name in BRANCHES:
      out[name], pull_back[name], batch_stats[name] = jax.vjp(
        lambda p, name=name: forward(
          name, p, state.batch_stats[name], batch, keys[name], **relations
        ),
        state.params[name],
        has_aux=True,
      )
    params, opt_state, metrics = dict(state.params), dict(state.opt_state), {}
    for name, partner in (("local", "global"), ("global", "local")):
      teacher = out[partner]
      if name == "global" and config.update_mode == "alternating":
        teacher, _ = forward(
          'local', params['local'], state.batch_stats['local'], batch, keys['teacher'],
          modification=False, auxiliary=False,
        )  # fmt: skip
      (total, terms), of_output = jax.value_and_grad(loss_of_output, has_aux=True)(
        out[name], teacher
      )
      (grads,) = psum(pull_back[name](of_output))
      updates, opt_state[name] = tx.update(grads, state.opt_state[name], state.params[name])
      params[name] = optax.apply_updates(state.params[name], updates)
      metrics |= {f"{name}/{term}": value for term, value in psum(terms | {"total": total}).items()}
      metrics[f"{name}/grad_norm"] = optax.tree.norm(grads)
      metrics[f"{name}/logit_scale"] = state.params[name]["logit_scale"][0]
    average = state.average
    if average:
      average = optimizer.average_parameters(
        average, params, state.step, config.optimizer.ema_decay
      )
    return TrainState(state.step + 1, params, batch_stats, opt_state, average), metrics

  return update
