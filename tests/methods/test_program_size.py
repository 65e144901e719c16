"""The program of a full-size update stays small, whatever the depth of its backbone.

Its lines are what is compiled before the first step: 97,000 of them took a GPU's compiler more than
four minutes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from crn_jax import state
from crn_jax.methods.crn import CRN

BATCH = 16


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "most"), [("none", 31_000), ("dots", 32_900)])
def test_an_update_of_swin_large_has_few_lines(remat, most):
  """StableHLO of the default preset in bfloat16, alternating; nothing is computed."""
  config = default.get_config()
  config.model.remat = remat
  config.model.dtype = "bfloat16"
  method = CRN(config, vocab_size=5000)
  tx = method.optimizer(steps_per_epoch=100, total_steps=1000)
  side, words = config.data.image_size, config.data.max_words
  batch = {
    "reference": jax.ShapeDtypeStruct((BATCH, side, side, 3), np.uint8),
    "target": jax.ShapeDtypeStruct((BATCH, side, side, 3), np.uint8),
    "tokens": jax.ShapeDtypeStruct((BATCH, words), jnp.int32),
    "token_mask": jax.ShapeDtypeStruct((BATCH, words), bool),
  }
  step = jax.jit(functools.partial(method.train_step, tx))
  lines = step.lower(state.abstract(method), batch).as_text().count("\n")
  assert lines <= most
