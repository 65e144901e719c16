"""Keeps float32 on float64's side of every kink, so that the two differ by rounding alone.

The released model has kinks at the ReLUs behind every BatchNorm and at the clamps of generalised
means. Where an input is zero to within rounding, two precisions may stand on different sides, which
changes gradients by whole parts; everywhere else the model is smooth. So the sides are taken from
the float64 pass and imposed on the float32 pass: an input on the wrong side is moved to the nearest
value on the right one, which is as far as rounding had carried it, and has slope one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from crn_jax.methods.crn import CRN
from crn_jax.models.layers import BatchNorm, GeM

GEM_CLAMP = 1e-6


def side_recorder(model: CRN):
  """A compiled function (params, batch_stats, batch) -> {branch: {module: whether it is above}}."""

  def record(params, batch_stats, batch):
    above = {}
    for kind, branch in model.branches.items():
      above[kind] = {}
      with nn.intercept_methods(_recorder(above[kind])):
        branch.apply(
          {'params': params[kind], 'batch_stats': batch_stats[kind]}, batch['reference'],
          batch['target'], batch['tokens'], batch['token_mask'], train=True, modification=False,
          auxiliary=False, mutable=['batch_stats'],
        )  # fmt: skip
    return above

  return jax.jit(record, compiler_options={"xla_backend_optimization_level": 0})


def _recorder(above: dict):
  def record(next_method, args, kwargs, context):
    out = next_method(*args, **kwargs)
    if _is_kink(context):
      assert _name(context) not in above
      # A ReLU follows a BatchNorm; a clamp is the first thing in a generalised mean.
      is_norm = isinstance(context.module, BatchNorm)
      above[_name(context)] = out > 0 if is_norm else args[0] > GEM_CLAMP
    return out

  return record


def imposed(above: dict):
  """Context in which the first pass of each branch keeps to the recorded sides.

  That is the pass with gradients; what follows only teaches.
  """
  passes = dict.fromkeys(above, 0)
  current = [None]

  def move(next_method, args, kwargs, context):
    module = context.module
    if not module.path and context.method_name == "__call__":
      current[0] = module.kind
      passes[module.kind] += 1
    kind = current[0]
    if not _is_kink(context) or passes[kind] > 1:
      return next_method(*args, **kwargs)
    side = above[kind][_name(context)]
    if isinstance(module, BatchNorm):
      return _moved(next_method(*args, **kwargs), side, 0.0)
    return next_method(_moved(args[0], side, GEM_CLAMP), *args[1:], **kwargs)

  return nn.intercept_methods(move)


def _moved(x: jax.Array, above: jax.Array, kink: float) -> jax.Array:
  beside = jnp.where(above, kink + 1e-12, kink - 1e-12)
  return jnp.where((x > kink) == above, x, beside + (x - jax.lax.stop_gradient(x)))


def _is_kink(context) -> bool:
  return isinstance(context.module, BatchNorm | GeM) and context.method_name == "__call__"


def _name(context) -> str:
  return "/".join(context.module.path)
