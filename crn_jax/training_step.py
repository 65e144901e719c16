"""The training step of a method as one program over all devices, and what it takes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from crn_jax.methods.base import Method, TrainState
from crn_jax.methods.features import FeatureMethod
from crn_jax.parallel import REPLICATED, DataParallel


def compiled(method: Method, tx: optax.GradientTransformation, parallel: DataParallel) -> Callable:
  """(state, batch) -> (state, metrics); the state's buffers are given away.

  Args:
    method: built with the axis `parallel.AXIS`.
    tx: optimizer of a part.
    parallel: layout over devices, of the arguments too.
  """

  def step(state, batch):
    return method.train_step(tx, state, batch)

  return parallel.map(method.precise(step), (REPLICATED, REPLICATED), donate_first=True)


def compiled_ahead(
  method: Method, tx: optax.GradientTransformation, parallel: DataParallel, like: TrainState
) -> Callable:
  """As `compiled`, which begins in a thread now; the first call waits for it.

  Not where batches hold a table of features: its size is not known yet.

  Args:
    method, tx, parallel: see `compiled`.
    like: shapes and dtypes of the state.
  """
  step = compiled(method, tx, parallel)
  if isinstance(method, FeatureMethod):
    return step
  return parallel.compile_ahead(step, like, abstract_batch(method))


# Images, and texts, of a training on features whose data are not known: about as many as FashionIQ
# has.
_TABLE_ROWS = 50_000


def abstract_batch(method: Method) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a batch over all devices, as training gives it; of one update."""
  config = method.config
  n, data = config.batch_size, config.data
  if isinstance(method, FeatureMethod):
    return method.abstract_batch(n, _TABLE_ROWS)
  picture = jax.ShapeDtypeStruct((n, data.image_size, data.image_size, 3), jnp.uint8)
  return {
    "reference": picture,
    "target": picture,
    "tokens": jax.ShapeDtypeStruct((n, data.max_words), jnp.int32),
    "token_mask": jax.ShapeDtypeStruct((n, data.max_words), jnp.bool_),
  }
