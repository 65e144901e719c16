"""Training against the PyTorch release: three alternating iterations with Adam, both branches.

The goldens hold the release's float32 run, its float64 run and the distance between the two, which
is what float32 can be held to.
"""

import jax
import jax.numpy as jnp
import numpy as np

from crn_jax import optimizer, train_step
from crn_jax.input_pipeline import vocabulary
from crn_jax.models import crn
from tests import release

FACTS = release.load_json("train_steps.json")
GOLDENS = np.load(release.GOLDENS / "train_steps.npz")
# Our names of the release's loss terms.
TERMS = {'class': 'classification', 'img': 'cross_branch', 'mul_kl': 'mutual_kl',
         'perceptual': 'perceptual', 'total': 'total'}  # fmt: skip


def batch(i: int, dtype) -> dict:
  """Iteration i's batch; the text is padded to the longest of the batch, as the release does."""
  texts = [(text,) for text in FACTS["texts"][i]]
  longest = max(len(vocabulary.tokenize(text)) for (text,) in texts)
  words = vocabulary.Vocabulary.build(
    FACTS["texts_to_build_vocab"], markers="words", max_words=longest
  )
  tokens, mask = words.encode_all(texts)
  return {
    "reference": release.nhwc(f"train.src.{i}", (4, 3, 64, 64), dtype),
    "target": release.nhwc(f"train.tgt.{i}", (4, 3, 64, 64), dtype),
    "tokens": jnp.asarray(tokens),
    "token_mask": jnp.asarray(mask),
  }


def train(dtype: str, iterations: int = 3):
  """Runs the release's iterations; returns the first state, the last, and metrics of each."""
  config = release.config(dtype)
  model = crn.build(config.model, release.VOCAB_SIZE)
  tx = optimizer.create(config, steps_per_epoch=100, total_steps=1000)
  loaded = {k: release.variables(k, model.branches[k], dtype) for k in crn.BRANCHES}
  start = train_step.TrainState.create(
    {c: {k: loaded[k][c] for k in crn.BRANCHES} for c in ("params", "batch_stats")}, tx
  )
  update = jax.jit(train_step.make_update(model, tx, config, axis_name=None))
  state, metrics = start, []
  for i in range(iterations):
    state, m = update(state, batch(i, dtype))
    metrics.append({k: float(v) for k, v in m.items()})
  return start, state, metrics
