"""Training against the PyTorch release: three alternating iterations with Adam, both branches.

The goldens (tests/goldens/train_steps.npz) hold the release's float32 run and its float64 run.

In float64 the whole trajectory is held to 1e-7.

In float32 a trajectory is a poor yardstick. Adam's first step is the sign of the gradient, so that
the few gradients that are zero to within rounding move either way, and in the second iteration a
ReLU of the composition crosses its kink: that alone changes gradients by 2.5 % (the release's own
float32 run happens not to cross). So float32 arithmetic is checked on equal ground, one update at a
time from the states of the float64 trajectory, and the free-running float32 trajectory is only
held to what such a crossing leaves of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crn_jax import optimizer, train_step
from crn_jax.convert import release as names
from crn_jax.input_pipeline import vocabulary
from crn_jax.models import crn
from tests import release

FACTS = release.load_json("train_steps.json")
GOLDENS = np.load(release.GOLDENS / "train_steps.npz")
ITERATIONS = 3
# Our names of the release's loss terms.
TERMS = {'class': 'classification', 'img': 'cross_branch', 'mul_kl': 'mutual_kl',
         'perceptual': 'perceptual', 'total': 'total'}  # fmt: skip
LOSSES = [
  (kind, term) for kind in crn.BRANCHES for term in TERMS if f"{kind}.loss.{term}" in GOLDENS.files
]
DOUBLE_LOSSES = [(k, t) for k, t in LOSSES if f"f64.{k}.loss.{t}" in GOLDENS.files]
# Pooling of a 1 x 1 map does not depend on its exponent: these have no true gradient.
NO_TRUE_GRADIENT = {
  ("local", "img_model.img_pool.p"),
  ("local", "local_pool.p"),
  ("global", "img_model.img_pool.p"),
}

pytestmark = pytest.mark.slow


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


@dataclasses.dataclass
class Run:
  """What the tests look at. Trees are {(branch, release's name): value}.

  Attributes:
    metrics: of each iteration.
    gradient_norms: L2 norms at the first iteration.
    updates: last minus first parameters: (L2 norm, strided sample, whether any element changed).
    batch_stats: running statistics after the last iteration.
  """

  metrics: list[dict[str, float]]
  gradient_norms: dict[tuple[str, str], float]
  updates: dict[tuple[str, str], tuple[float, np.ndarray, bool]]
  batch_stats: dict[tuple[str, str], np.ndarray]


@dataclasses.dataclass
class Runs:
  """The float64 and the float32 trajectory, and float32 updates from float64's states.

  Attributes:
    forced_metrics: of the float32 update from each float64 state.
    forced_gradients: per iteration, L2 distance of float32's gradient to float64's, relative to
      the latter's norm.
  """

  double: Run
  single: Run
  forced_metrics: list[dict[str, float]]
  forced_gradients: list[dict[tuple[str, str], float]]


class Trainer:
  """One precision's compiled update and starting state; keeps each step's gradient."""

  def __init__(self, dtype: str):
    config = release.config(dtype)
    model = crn.build(config.model, release.VOCAB_SIZE)
    keep_gradient = optax.GradientTransformation(
      lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, *_: (grads, grads)
    )
    tx = optax.chain(
      keep_gradient, optimizer.create(config, steps_per_epoch=100, total_steps=1000)
    )
    loaded = {k: release.variables(k, model.branches[k], dtype) for k in crn.BRANCHES}
    self.dtype = dtype
    self.start = train_step.TrainState.create(
      {c: {k: loaded[k][c] for k in crn.BRANCHES} for c in ("params", "batch_stats")}, tx
    )
    # Donated: the float64 state alone has 6 GB.
    self.update = jax.jit(
      train_step.make_update(model, tx, config, axis_name=None), donate_argnums=0
    )

  def __call__(self, state, i: int):
    """Iteration i: new state, gradients, metrics."""
    state, metrics = self.update(state, batch(i, self.dtype))
    gradients = {k: state.opt_state[k][0] for k in crn.BRANCHES}
    return state, gradients, {k: float(v) for k, v in metrics.items()}


def by_name(tree: dict) -> dict[tuple[str, str], np.ndarray]:
  """{branch: tree like its variables} by the release's names, in its layouts."""
  return {
    (kind, name): value
    for kind in crn.BRANCHES
    for name, value in names.to_release(kind, tree[kind], release.SHAPES[kind]).items()
  }


def norm(x) -> float:
  return float(np.linalg.norm(np.asarray(x, np.float64).reshape(-1)))


def summarize(metrics, gradient_norms, first, state) -> Run:
  updates = {}
  last = by_name(state.params)
  for key, start in first.items():
    update = last[key].astype(np.float64) - start
    flat = update.reshape(-1)
    sample = flat[:: -(-flat.size // 24)]
    updates[key] = (norm(update), sample, bool((last[key] != start).any()))
  return Run(metrics, gradient_norms, updates, by_name(state.batch_stats))


@pytest.fixture(scope="module")
def runs() -> Runs:
  """Both trajectories, each computed once, side by side so that few states are alive at a time."""
  with release.double_precision():
    double = Trainer("float64")
  single = Trainer("float32")
  # The recipe's weights are float32 numbers: both start from the same.
  first = jax.tree.map(np.array, by_name(single.start.params))
  metrics = {"double": [], "single": [], "forced": []}
  norms, distances = {}, []
  double_state, single_state = double.start, single.start
  del double.start, single.start
  for i in range(ITERATIONS):
    forced_start = None
    if i > 0:
      forced_start = jax.tree.map(
        lambda x: np.asarray(x).astype(np.float32) if x.dtype == np.float64 else np.asarray(x),
        double_state,
      )
    with release.double_precision():
      double_state, double_gradients, m = double(double_state, i)
    metrics["double"].append(m)
    single_state, gradients, m = single(single_state, i)
    metrics["single"].append(m)
    if i == 0:
      norms["single"] = {k: norm(v) for k, v in by_name(gradients).items()}
      norms["double"] = {k: norm(v) for k, v in by_name(double_gradients).items()}
    else:
      _, gradients, m = single(forced_start, i)
    metrics["forced"].append(m)
    expected = by_name(double_gradients)
    distances.append({
      k: norm(expected[k] - v) / max(norm(expected[k]), 1e-30)
      for k, v in by_name(gradients).items()
    })  # fmt: skip
    del expected, double_gradients, gradients, forced_start
  return Runs(
    summarize(metrics["double"], norms["double"], first, double_state),
    summarize(metrics["single"], norms["single"], first, single_state),
    metrics["forced"],
    distances,
  )
