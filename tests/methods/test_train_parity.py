"""Training against the PyTorch release: three alternating iterations with Adam, both branches.

The goldens (tests/goldens/train_steps.npz) hold the release's float32 run and its float64 run.

In float64 the whole trajectory is held to 1e-7.

In float32 a trajectory is a poor yardstick. Adam's first step is the sign of the gradient, so that
the few gradients that are zero to within rounding move either way, and in the second iteration a
ReLU of the composition may cross its kink: that alone changes gradients by 2.5 % (the release's own
float32 run happens not to cross). So float32 arithmetic is checked on equal ground, one update at a
time from the states of the float64 trajectory, and the free-running float32 trajectory is only
held to what such a crossing leaves of it.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from crn_jax.convert import release as names
from crn_jax.input_pipeline.tokenizers import words
from crn_jax.methods.base import TrainState
from crn_jax.methods.crn import CRN
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
  longest = max(len(words.tokenize(text)) for (text,) in texts)
  vocabulary = words.Vocabulary.build(
    FACTS["texts_to_build_vocab"], markers="words", max_words=longest
  )
  tokens, mask = vocabulary.encode_all(texts)
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
      the latter's norm, of each parameter.
  """

  double: Run
  single: Run
  forced_metrics: list[dict[str, float]]
  forced_gradients: list[dict[tuple[str, str], float]]


class Trainer:
  """One precision's compiled update; hands out each step's gradient."""

  def __init__(self, dtype: str):
    config = release.config(dtype)
    self.dtype = dtype
    self.model = CRN(config, release.VOCAB_SIZE)
    self.adam = self.model.optimizer(steps_per_epoch=100, total_steps=1000)
    keep_gradient = optax.GradientTransformation(
      lambda params: (), lambda grads, state, params=None: (grads, grads)
    )
    tx = optax.chain(keep_gradient, self.adam)
    update = functools.partial(self.model.update, tx)
    # Donated: the float64 state alone has 4 GB. LLVM's optimisation costs more than it gains here:
    # most of the time is spent in matrix products, which are not compiled by it.
    self.update = jax.jit(
      update, donate_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
    )

  def start(self) -> TrainState:
    """The recipe's weights."""
    variables = {"params": {}, "batch_stats": {}}
    for kind in crn.BRANCHES:
      for collection, tree in release.variables(kind, self.model.branches[kind]).items():
        # A copy that JAX owns: arrays that NumPy owns cannot be donated.
        copy = jax.tree.map(lambda x: jnp.array(x, self.dtype, copy=True), tree)
        variables[collection][kind] = copy
    return TrainState.create(variables, self.adam)

  def __call__(self, state: TrainState, i: int):
    """Iteration i: new state, gradients, metrics."""
    opt_state = {k: ((), state.opt_state[k]) for k in crn.BRANCHES}
    state, metrics = self.update(state.replace(opt_state=opt_state), batch(i, self.dtype))
    gradients = {k: state.opt_state[k][0] for k in crn.BRANCHES}
    state = state.replace(opt_state={k: state.opt_state[k][1] for k in crn.BRANCHES})
    metrics = {k: float(v) for k, v in metrics.items()}
    release.release_memory()
    return state, gradients, metrics


@jax.jit
def in_float32(state: TrainState) -> TrainState:
  """A float32 copy of a float64 state."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, state)


@jax.jit
def norms(gradients: dict) -> dict:
  """L2 norm of every leaf."""
  return jax.tree.map(lambda g: jnp.linalg.norm(g.reshape(-1)), gradients)


@jax.jit
def distances(expected: dict, gradients: dict) -> dict:
  """L2 distance of every leaf, relative to the norm of what is expected."""
  difference = norms(jax.tree.map(lambda e, g: e - g, expected, gradients))
  return jax.tree.map(lambda d, e: d / jnp.maximum(e, 1e-30), difference, norms(expected))


def by_name(tree: dict) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
  """((branch, release's name), value in its layout), one at a time: a copy of all takes GBs."""
  for kind in crn.BRANCHES:
    for path, value in traverse_util.flatten_dict(tree[kind]).items():
      leaf = traverse_util.unflatten_dict({path: value})
      for name, array in names.to_release(kind, leaf, release.SHAPES[kind]).items():
        yield (kind, name), array


def scalars_by_name(tree: dict) -> dict[tuple[str, str], float]:
  """A tree of scalars by the release's names."""
  return {
    (kind, names.release_name(kind, path)): float(value)
    for kind in crn.BRANCHES
    for path, value in traverse_util.flatten_dict(tree[kind]).items()
  }


def facts(kind: str, *keys: str):
  """Names of the goldens' parameters and, in the same order, values: 'f64.x' is f64.<kind>.x."""
  columns = [
    GOLDENS[f"f64.{kind}.{k.removeprefix('f64.')}" if k.startswith("f64.") else f"{kind}.{k}"]
    for k in keys
  ]
  return [str(n) for n in GOLDENS[f"{kind}.names"]], *columns


def summarize(metrics, gradient_norms, first, state) -> Run:
  updates = {}
  for key, last in by_name(state.params):
    start = first[key]
    update = last.reshape(-1).astype(np.float64) - start.reshape(-1)
    sample = update[:: -(-update.size // 24)].copy()
    updates[key] = (float(np.linalg.norm(update)), sample, bool((last != start).any()))
  statistics = {k: v.copy() for k, v in by_name(state.batch_stats)}
  return Run(metrics, scalars_by_name(gradient_norms), updates, statistics)


@pytest.fixture(scope="module")
def runs() -> Runs:
  """All is computed once, in an order that keeps few states alive at a time."""
  release.release_memory()
  single = Trainer("float32")
  # The recipe's weights are float32 numbers: all start from the same.
  first = {k: v.copy() for k, v in by_name(single.start().params)}
  with release.double_precision():
    double = Trainer("float64")
    state = double.start()
  metrics, forced_metrics, apart = [], [], []
  for i in range(ITERATIONS):
    with release.double_precision():
      forced = in_float32(state)
    gradients, m = single(forced, i)[1:]
    forced_metrics.append(m)
    del forced
    with release.double_precision():
      state, expected, m = double(state, i)
      apart.append(scalars_by_name(distances(expected, gradients)))
      if i == 0:
        double_norms, single_norms = norms(expected), norms(gradients)
    metrics.append(m)
    del expected, gradients
  double_run = summarize(metrics, double_norms, first, state)
  del state
  state, metrics = single.start(), []
  for i in range(ITERATIONS):
    state, _, m = single(state, i)
    metrics.append(m)
  return Runs(double_run, summarize(metrics, single_norms, first, state), forced_metrics, apart)


@pytest.mark.parametrize(("kind", "term"), DOUBLE_LOSSES)
def test_float64_losses_equal_the_release(runs, kind, term):
  """All three iterations; 1e-7 relative (measured: 2e-12)."""
  got = [m[f"{kind}/{TERMS[term]}"] for m in runs.double.metrics]
  np.testing.assert_allclose(got, GOLDENS[f"f64.{kind}.loss.{term}"], rtol=1e-7)


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float64_updates_of_all_parameters_equal_the_release(runs, kind):
  """After three iterations, norm and samples; 1e-7 relative (measured: 2e-12 and 4e-8).

  The samples are stored in float32. Parameters without a gradient stay as they are, bit for bit.
  """
  for name, has, length in zip(*facts(kind, "has_grad", "f64.delta_l2"), strict=True):
    got_length, got_sample, changed = runs.double.updates[kind, name]
    if not has:
      assert not changed, name
      continue
    assert got_length == pytest.approx(length, rel=1e-7), name
    sample = GOLDENS[f"f64.{kind}.delta_sample.{name}"]
    assert np.linalg.norm(got_sample - sample) < 1e-7 * np.linalg.norm(sample), name


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float64_gradient_norms_equal_the_release(runs, kind):
  """First iteration; 1e-7 relative (measured: 4e-14)."""
  for name, has, length in zip(*facts(kind, "has_grad", "f64.grad_l2"), strict=True):
    got = runs.double.gradient_norms[kind, name]
    if not has:
      assert got == 0.0, name
    elif (kind, name) in NO_TRUE_GRADIENT:
      assert got < 1e-12, name
    else:
      assert got == pytest.approx(length, rel=1e-7), name


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float64_running_statistics_are_those_of_the_passes_with_gradients(runs, kind):
  """After three iterations, 1e-4 of the largest value (measured: 4e-5).

  The release feeds its frozen and its unused passes to them, too; `grad_only` is its float32 run
  without that. It is the float32 trajectory that is 4e-5 away from the float64 one.
  """
  check_running_statistics(runs.double, kind, 1e-4)


def check_running_statistics(run: Run, kind: str, tolerance: float):
  prefix = f"grad_only.{kind}.bn."
  found = [k for k in GOLDENS.files if k.startswith(prefix) and "num_batches" not in k]
  assert len(found) == 28
  for key in found:
    name = key.removeprefix(prefix)
    assert release.distance(GOLDENS, key, run.batch_stats[kind, name]) < tolerance, name


def loss_tolerance(kind: str, term: str) -> float:
  """Of float32 at the goldens' own parameters: 1e-5 relative (measured: 2e-6).

  The global branch's teacher is the local branch after its step, and Adam's first step is the sign
  of the gradient: where that is zero to within rounding the weight goes one way or the other. It
  shows in the mutual KL, which is 0.03 nats of rankings 14 nats deep (measured: 1.5e-5).
  """
  return 5e-5 if (kind, term) == ("global", "mul_kl") else 1e-5


@pytest.mark.parametrize(("kind", "term"), LOSSES)
def test_float32_losses_of_the_first_iteration_equal_the_release(runs, kind, term):
  got = runs.single.metrics[0][f"{kind}/{TERMS[term]}"]
  expected = GOLDENS[f"{kind}.loss.{term}"][0]
  assert got == pytest.approx(expected, rel=loss_tolerance(kind, term))


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_gradient_norms_equal_the_release(runs, kind):
  """First iteration; 5e-5 relative to the release's float64 (measured: 2.2e-5).

  Of that the release's own float32 run has 0.9e-5: the gradients of a BatchNorm over four values
  lose digits. Without a true gradient only rounding noise is left.
  """
  for name, has, length in zip(*facts(kind, "has_grad", "f64.grad_l2"), strict=True):
    got = runs.single.gradient_norms[kind, name]
    if not has:
      assert got == 0.0, name
    elif (kind, name) in NO_TRUE_GRADIENT:
      assert got < 1e-6, name
    else:
      assert got == pytest.approx(length, rel=5e-5), name


@pytest.mark.parametrize(("kind", "term"), DOUBLE_LOSSES)
def test_float32_losses_along_the_float64_trajectory(runs, kind, term):
  """Each iteration from the float64 state before it."""
  got = [m[f"{kind}/{TERMS[term]}"] for m in runs.forced_metrics]
  np.testing.assert_allclose(
    got, GOLDENS[f"f64.{kind}.loss.{term}"], rtol=loss_tolerance(kind, term)
  )


@pytest.mark.parametrize("iteration", range(ITERATIONS))
@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_gradients_along_the_float64_trajectory(runs, kind, iteration):
  """Every parameter's gradient, as a vector: 1e-4 at the goldens' weights (measured: 4.6e-5).

  Later states are not so lucky on every processor: where a ReLU's input is zero to within rounding,
  float32 and float64 stand on different sides of its kink, and the order in which a processor's
  instructions sum decides. Iterations two and three are held to what one such value leaves: 2e-2
  (measured: 3.5e-3 with AVX-512; 7e-5 where none is crossed). The losses, which have no kinks, are
  held to 1e-5 throughout.
  """
  checked = 0
  for (branch, name), apart in runs.forced_gradients[iteration].items():
    if branch == kind and (kind, name) not in NO_TRUE_GRADIENT:
      assert apart < (1e-4 if iteration == 0 else 2e-2), name
      checked += 1
  assert checked > 150


@pytest.mark.parametrize(("kind", "term"), LOSSES)
def test_float32_losses_of_the_third_iteration_stay_near_the_release(runs, kind, term):
  """2e-4 relative (measured: 6e-5 local, 1.3e-4 global), but for the mutual KL and its sum.

  See the module's docstring for what sets the trajectories apart. Whether a kink is crossed depends
  on the compiler's choices; where none is, all terms are within 8e-5. Measured is the worse case.
  """
  tolerance = {
    # The KL is a small difference of rankings, second order in the distance of the two branches,
    # and so sees the crossed kink most: measured 1.8e-3 and 1.5e-2.
    ("local", "mul_kl"): 5e-3,
    ("global", "mul_kl"): 3e-2,
    # Contains the global KL: measured 5.6e-4.
    ("global", "total"): 2e-3,
  }.get((kind, term), 2e-4)
  got = runs.single.metrics[2][f"{kind}/{TERMS[term]}"]
  assert got == pytest.approx(GOLDENS[f"{kind}.loss.{term}"][2], rel=tolerance)


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_updates_stay_near_the_release(runs, kind):
  """After three iterations, against the release's float32 run; see the module's docstring.

  Norms within 1 % (measured: 0.4 %) or, where rounding decides, three times the release's own
  distance to float64; samples of all parameters together within 5 % (measured: 1.8 %).
  """
  own = dict(zip(*facts(kind, "f64.delta_rel_diff"), strict=True))
  got, expected = [], []
  for name, has, length in zip(*facts(kind, "has_grad", "delta_l2"), strict=True):
    got_length, got_sample, changed = runs.single.updates[kind, name]
    if not has:
      assert not changed, name
      continue
    assert got_length == pytest.approx(length, rel=max(0.01, 3 * own[name])), name
    got.append(got_sample)
    expected.append(GOLDENS[f"{kind}.delta_sample.{name}"])
  got, expected = np.concatenate(got), np.concatenate(expected)
  assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_float32_running_statistics_stay_near_the_release(runs, kind):
  """5e-3 of the largest value (measured: 1.4e-3): what the trajectories' distance leaves."""
  check_running_statistics(runs.single, kind, 5e-3)


def test_float64_does_not_leak(runs):
  del runs
  assert jnp.zeros(1).dtype == jnp.float32
