"""Training runs to be compared with a reference; all use of the method's interface is here."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import traverse_util

from crn_jax.convert import release as names
from crn_jax.methods.base import TrainState
from crn_jax.methods.crn import CRN
from crn_jax.models import crn
from tests import kinks, release
from tests.goldens import recipe

Scalars = dict[tuple[str, str], float]  # (branch, release's name) -> value.


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is trained.

  Attributes:
    prefix: of the names from which the recipe makes the weights.
    batches: of each iteration {reference, target: [batch, 3, height, width]; tokens, token_mask:
      [batch, words]}, NumPy; the images are of any precision.
  """

  prefix: str
  batches: list[dict[str, np.ndarray]]

  @property
  def image_size(self) -> int:
    return self.batches[0]["reference"].shape[-1]


def channels_last(batch: dict[str, np.ndarray], dtype) -> dict[str, jax.Array]:
  """A problem's batch as the method takes it."""
  images = {k: jnp.asarray(batch[k].transpose(0, 2, 3, 1), dtype) for k in ("reference", "target")}
  return images | {k: jnp.asarray(batch[k]) for k in ("tokens", "token_mask")}


@dataclasses.dataclass
class Run:
  """A trajectory.

  Attributes:
    metrics: of each iteration.
    updates: last minus first parameters, as what `Runs` was asked to keep of each.
    statistics: running statistics after the last iteration.
  """

  metrics: list[dict[str, float]]
  updates: dict[tuple[str, str], object]
  statistics: dict[tuple[str, str], np.ndarray]


@dataclasses.dataclass
class Runs:
  """The float64 and the float32 trajectory, and float32 updates from float64's states.

  Attributes:
    double, single: the trajectories.
    forced_metrics: of the float32 update from each float64 state.
    gradient_norms: L2 norms of the float64 trajectory's gradients, of each iteration.
    forced_norms: L2 norms of the gradients of the float32 updates.
    forced_distances: L2 distance of these to float64's, relative to the latter's norm.
  """

  double: Run
  single: Run
  forced_metrics: list[dict[str, float]]
  gradient_norms: list[Scalars]
  forced_norms: list[Scalars]
  forced_distances: list[Scalars]


class _Trainer:
  """One precision's compiled update, with a look at the gradients."""

  def __init__(self, config, dtype: str, look: Callable, with_sides: bool):
    """Traces nothing yet; see `compile`.

    Args:
      config: the whole configuration.
      dtype: of everything.
      look: function (gradients of a branch, what it is given) -> what a call returns of it.
      with_sides: whether updates keep to recorded sides of the kinks.
    """
    config = config.copy_and_resolve_references()
    config.model.dtype = dtype
    self.dtype = dtype
    self._compiled = {}
    self.model = CRN(config, release.VOCAB_SIZE)
    self._adam = self.model.optimizer(steps_per_epoch=100, total_steps=1000)
    watch = optax.GradientTransformation(
      lambda params: (), lambda grads, given, params=None: (grads, look(grads, given))
    )
    tx = optax.chain(watch, self._adam)

    # Copies, which JAX owns: arrays that NumPy owns cannot be donated.
    self._create = jax.jit(
      lambda variables: TrainState.create(jax.tree.map(jnp.copy, variables), self._adam)
    )

    def step(state, batch, given, above):
      state = state.replace(opt_state={k: (given[k], state.opt_state[k]) for k in crn.BRANCHES})
      with kinks.imposed(above) if with_sides else contextlib.nullcontext():
        state, metrics = self.model.update(tx, state, batch)
      seen, opt_state = ({k: v[i] for k, v in state.opt_state.items()} for i in range(2))
      return state.replace(opt_state=opt_state), seen, metrics

    # Donated: the float64 state of the goldens has 4 GB. LLVM's optimisation costs more than it
    # gains here: most of the time is spent in matrix products, which are not compiled by it.
    self._step = jax.jit(
      step, donate_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
    )

  def state_shapes(self, problem: Problem) -> TrainState:
    """Of a state, as `start` makes it."""
    variables = {"params": {}, "batch_stats": {}}
    for kind, branch in self.model.branches.items():
      for name, tree in release.variable_shapes(branch, problem.image_size).items():
        variables[name][kind] = _with_dtype(tree, self.dtype)
    return self._create.eval_shape(variables)

  def compile(self, state: TrainState, batch: dict, given: dict, above: dict) -> None:
    """For arguments of these shapes; once for every length of texts."""
    batch = channels_last(batch, self.dtype)
    self._compiled[_words(batch)] = self._step.lower(state, batch, given, above).compile()

  def start(self, problem: Problem) -> TrainState:
    """State at the recipe's weights."""
    variables = {"params": {}, "batch_stats": {}}
    for kind, branch in self.model.branches.items():
      for collection, tree in release.variables(
        kind, branch, self.dtype, problem.prefix, problem.image_size
      ).items():
        variables[collection][kind] = tree
    return self._create(variables)

  def __call__(self, state: TrainState, batch: dict, given: dict, above: dict):
    """One update; takes the state. Returns new state, what was seen of gradients, metrics."""
    step = self._compiled[_words(batch)]
    state, seen, metrics = step(state, channels_last(batch, self.dtype), given, above)
    metrics = {k: float(v) for k, v in metrics.items()}
    release.release_memory()
    return state, seen, metrics


class Programs:
  """The compiled updates of both precisions, for any weights and batches of the same shapes."""

  def __init__(self, config: ml_collections.ConfigDict, problem: Problem):
    """Compiles all before there is any state: that takes some GB, which are given back."""
    self.single = _Trainer(config, "float32", lambda grads, _: grads, with_sides=True)
    self.double = _Trainer(config, "float64", _norm_and_distance, with_sides=False)
    self._recorders = {}
    with release.double_precision():
      state64 = self.double.state_shapes(problem)
      recorder = kinks.side_recorder(self.double.model)
    state32 = self.single.state_shapes(problem)
    for batch in {_words(batch): batch for batch in problem.batches}.values():
      with release.double_precision():
        lowered = recorder.lower(
          state64.params, state64.batch_stats, channels_last(batch, self.double.dtype)
        )
        self._recorders[_words(batch)] = lowered.compile()
        self.double.compile(state64, batch, _with_dtype(state64.params, "float32"), {})
      self.single.compile(state32, batch, dict.fromkeys(crn.BRANCHES, ()), lowered.out_info)
    release.release_memory()

  def record_sides(self, state: TrainState, batch: dict) -> dict:
    """On which sides of its kinks the float64 update stands."""
    inputs = channels_last(batch, self.double.dtype)
    return self._recorders[_words(batch)](state.params, state.batch_stats, inputs)


def _words(batch: dict) -> int:
  return batch["tokens"].shape[1]


def _with_dtype(tree: dict, dtype) -> dict:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)


@jax.jit
def _in_float32(state: TrainState) -> TrainState:
  return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, state)


def _norm_and_distance(gradients: dict, other: dict) -> dict:
  """leaf -> (its L2 norm, that of the other, L2 distance of the two relative to the first)."""

  def compare(a, b):
    norm, distance = (jnp.sqrt(jnp.sum(jnp.square(x))) for x in (a, a - b.astype(a.dtype)))
    return norm, jnp.sqrt(jnp.sum(jnp.square(b.astype(a.dtype)))), distance / (norm + 1e-300)

  return jax.tree.map(compare, gradients, other)


def by_name(tree: dict) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
  """((branch, release's name), value in its layout), one at a time: a copy of all takes GBs."""
  for kind in crn.BRANCHES:
    for path, value in traverse_util.flatten_dict(tree[kind]).items():
      leaf = traverse_util.unflatten_dict({path: value})
      for name, array in names.to_release(kind, leaf, names.torch_shapes(kind, leaf)).items():
        yield (kind, name), array


def _scalars(tree: dict, i: int) -> Scalars:
  """Entry i of each leaf of a tree of tuples."""
  return {
    (kind, names.release_name(kind, path)): float(value[i])
    for kind in crn.BRANCHES
    for path, value in traverse_util.flatten_dict(tree[kind]).items()
  }


def train(programs: Programs, problem: Problem, summarize: Callable) -> Runs:
  """All trajectories, in an order that keeps few states alive at a time.

  Args:
    programs: of the model.
    problem: what is trained, one iteration a batch.
    summarize: function of a parameter's update (float64, PyTorch's layout), what is kept of it.
  """
  nothing = dict.fromkeys(crn.BRANCHES, ())
  single, double = programs.single, programs.double
  with release.double_precision():
    state = double.start(problem)
  metrics, forced_metrics, sides, seen = [], [], [], []
  for batch in problem.batches:
    with release.double_precision():
      above = programs.record_sides(state, batch)
      forced = _in_float32(state)
    forced, gradients, m = single(forced, batch, nothing, above)
    del forced
    forced_metrics.append(m)
    with release.double_precision():
      state, compared, m = double(state, batch, gradients, {})
    del gradients
    metrics.append(m)
    sides.append(above)
    seen.append(tuple(_scalars(compared, column) for column in range(3)))
  double_run = _run(problem, metrics, state, summarize)
  del state
  state, metrics = single.start(problem), []
  for batch, above in zip(problem.batches, sides, strict=True):
    state, _, m = single(state, batch, nothing, above)
    metrics.append(m)
  single_run = _run(problem, metrics, state, summarize)
  return Runs(double_run, single_run, forced_metrics, *map(list, zip(*seen, strict=True)))


def _run(problem: Problem, metrics, state: TrainState, summarize) -> Run:
  updates = {}
  for (kind, name), last in by_name(state.params):
    # The recipe's weights are float32 numbers: all trajectories start from the same.
    first = recipe.param(f"{problem.prefix}{kind}.{name}", last.shape)
    updates[kind, name] = summarize(last.astype(np.float64) - first)
  return Run(metrics, updates, {k: np.array(v) for k, v in by_name(state.batch_stats)})
