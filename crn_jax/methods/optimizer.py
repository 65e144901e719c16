"""Adam with coupled L2 or decoupled weight decay, SGD, and learning rates, with Optax."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from crn_jax.errors import UserError

ALGORITHMS = ("adam", "adamw", "sgd")

# Elements below which `norm` joins arrays.
_SMALL = 2**16


def learning_rate(config: ml_collections.ConfigDict, steps_per_epoch: int, total_steps: int):
  """Schedule: step -> learning rate.

  'step' is the release's: at the start of epoch e (from 0), if e > 0, e is a multiple of
  `decay_every_epochs` and e < `max_decay_epoch`, the rate is multiplied by `decay_factor`.
  'cosine' falls to zero at the last step. Both rise linearly over the first `warmup_steps`.

  Args:
    config: the `optimizer` part of the configuration.
    steps_per_epoch: updates an epoch.
    total_steps: updates of the whole training.

  Raises:
    UserError: on an unknown schedule.
  """
  if config.schedule == "step":
    end = min(config.max_decay_epoch, -(-total_steps // steps_per_epoch))
    epochs = range(config.decay_every_epochs, end, config.decay_every_epochs)
    decay = optax.piecewise_constant_schedule(
      config.learning_rate, {epoch * steps_per_epoch: config.decay_factor for epoch in epochs}
    )
  elif config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(config.learning_rate, total_steps)
  else:
    raise UserError(f"optimizer.schedule must be 'step' or 'cosine', not {config.schedule!r}")
  if not config.warmup_steps:
    return decay
  return lambda step: decay(step) * jnp.minimum(1.0, (step + 1) / config.warmup_steps)


def create(
  config: ml_collections.ConfigDict,
  steps_per_epoch: int,
  total_steps: int,
  *,
  unused: frozenset[str] = frozenset(),
) -> optax.GradientTransformation:
  """The optimizer of one part of a method.

  With the algorithm 'adam' weight decay is added to the gradient before Adam (PyTorch's Adam); with
  'adamw' to the update behind it (PyTorch's AdamW); with 'sgd' to the gradient before momentum
  (PyTorch's SGD).

  Args:
    config: the `optimizer` part of the configuration.
    steps_per_epoch: updates an epoch.
    total_steps: updates of the whole training.
    unused: names of modules that no loss reaches. They are left alone, weight decay included, as
      PyTorch leaves alone parameters without a gradient.

  Raises:
    UserError: on an unknown algorithm or schedule.
  """
  if config.algorithm not in ALGORITHMS:
    raise UserError(
      f"optimizer.algorithm must be {' or '.join(map(repr, ALGORITHMS))}, not {config.algorithm!r}"
    )
  clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
  decay = optax.add_decayed_weights(config.weight_decay)
  b1, b2 = config.betas
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=config.epsilon)
  direction = {
    "adam": (decay, adam),
    "adamw": (adam, decay),
    "sgd": (decay, optax.trace(config.momentum)),
  }[config.algorithm]
  descent = optax.chain(
    clip,
    *direction,
    _rate(config.logit_scale_rate, "logit_scale", "vector_scale"),
    _rate(config.backbone_rate, "backbone", "encoder"),
    optax.scale_by_learning_rate(learning_rate(config, steps_per_epoch, total_steps)),
  )

  def labels(params):
    flags = jax.tree_util.tree_map_with_path(
      lambda path, _: any(key.key in unused for key in path), params
    )
    return jax.tree.map(lambda flag: "unused" if flag else "trained", flags)

  return optax.partition({"trained": descent, "unused": optax.set_to_zero()}, labels)


def average_parameters(average, params, step: jax.Array, decay: float):
  """Exponential moving average after one more update.

  Args:
    average: tree, the average so far.
    params: tree, parameters after the update.
    step: [] updates done before this one.
    decay: of old values; capped by (1 + step) / (10 + step), so that the start is soon forgotten.
  """
  decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(params, average, 1.0 - decay)


def norm(tree) -> jax.Array:
  """Euclidean norm of all values of a tree, [].

  As `optax.tree.norm`, but for rounding: small arrays, two thirds of a model's, are joined first,
  since a sum of each would be a kernel, and lines of the program, of its own.
  """
  arrays = jax.tree.leaves(tree)
  small = [x.ravel() for x in arrays if x.size < _SMALL]
  large = [x for x in arrays if x.size >= _SMALL]
  return optax.tree.norm([*large, jnp.concatenate(small)] if small else large)


def _rate(factor: float, *names: str) -> optax.GradientTransformation:
  """Another rate for what has one of the names; a factor of 1 makes the program no longer.

  The state has the same structure whatever the factor, so that old checkpoints are read.
  """
  change = optax.identity() if factor == 1.0 else optax.scale(factor)
  return optax.masked(change, _inside(names))


def _inside(names: tuple[str, ...]):
  """Mask function for optax: True at a leaf, or below a module, that has one of the names."""
  return lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: any(key.key in names for key in path), params
  )
