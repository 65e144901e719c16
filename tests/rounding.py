"""How far float32 may be from float64: `SAFETY` times what the tests' own PyTorch model needs.

A bound that was measured once holds for the numbers it was measured with: how much of rounding is
left in a result depends on weights and inputs (a BatchNorm over four values divides by their
deviation, which may be small). So it is computed for each quantity and each problem. From each
state of the reference's float64 trajectory, float32 updates are made `DRAWS` times, each with
images that are changed by up to half a unit in the last place, which draws all later rounding anew.
The root mean square of their distances to float64 is the scale of rounding.

What is tested does the same operations in another order, and so has a distance of the same
distribution. Most of it comes from the few worst channels of BatchNorm, so that distances of many
parameters are large or small together: a single one is up to three scales. `SAFETY` = 10 leaves as
much again for the order of summation, in which libraries and processors differ; a bound is then
still one decimal digit from what float32 can do.

All of it is away from kinks, which is what `tests/kinks.py` and `torch_crn.Sides` are for.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import ml_collections
import numpy as np
import torch

from tests import release, torch_crn
from tests.goldens import recipe
from tests.training import Problem, Scalars

DRAWS = 8
SAFETY = 10.0


@dataclasses.dataclass
class Reference:
  """The reference's float64 trajectory, and the scale of float32's rounding along it.

  Attributes:
    metrics: losses of each iteration.
    gradient_norms: L2 norms of the gradients of each iteration.
    sides: of the kinks in each iteration, for `free_runs`.
    first, last: parameters and running statistics; see `keep` of `follow`.
    loss_scales: of each iteration's losses, relative to them.
    gradient_scales: of each iteration's gradients: L2 distance relative to the norm.
  """

  metrics: list[dict[str, float]]
  gradient_norms: list[Scalars]
  sides: list[dict[str, list[torch.Tensor]]]
  first: dict[tuple[str, str], np.ndarray]
  last: dict[tuple[str, str], np.ndarray]
  loss_scales: list[dict[str, float]]
  gradient_scales: list[Scalars]


@contextlib.contextmanager
def one_thread():
  """PyTorch on one core, as the tests have two processes: else threads wait for each other."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


def root_mean_square(rows: list[dict]) -> dict:
  """Of the values of each key."""
  return {k: float(np.sqrt(np.mean([row[k] ** 2 for row in rows]))) for k in rows[0]}


@one_thread()
def follow(
  config: ml_collections.ConfigDict, problem: Problem, keep: Callable[[str], bool]
) -> Reference:
  """Trains the reference in float64 and measures float32 on the way.

  Args:
    config: the whole configuration, preset 'crn_released'.
    problem: what is trained.
    keep: which parameters and statistics, by the release's name, are kept of first and last state.
  """
  double = torch_crn.Trainer(branches(config, problem, torch.float64))
  single = torch_crn.Trainer(branches(config, problem, torch.float32), only_tries=True)
  first = _state(double, keep)
  found = Reference([], [], [], first, {}, [], [])
  for i in range(len(problem.batches)):
    release.release_memory()  # What building the models and the last iteration left.
    single.follow(double)
    sides = {k: torch_crn.Sides() for k in double.branches}
    found.metrics.append(double(batch(problem, i, torch.float64), sides))
    found.sides.append({k: s.above for k, s in sides.items()})
    expected = _gradients(double)
    norms = {k: float(g.norm()) for k, g in expected.items()}
    losses, distances = [], []
    for draw in range(DRAWS):
      metrics = single(batch(problem, i, torch.float32, draw), imposed(found.sides[i]))
      losses.append({k: v / found.metrics[i][k] - 1 for k, v in metrics.items()})
      distances.append(
        {k: float((g - expected[k]).norm()) / (norms[k] + 1e-30)
         for k, g in _gradients(single).items()}
      )  # fmt: skip
    found.gradient_norms.append(norms)
    found.loss_scales.append(root_mean_square(losses))
    found.gradient_scales.append(root_mean_square(distances))
  found.last = _state(double, keep)
  return found


@one_thread()
def free_runs(config, problem: Problem, sides) -> tuple[list[list[dict]], list[dict]]:
  """Float32 trajectories of their own: [draw][iteration] losses, and [draw] last states."""
  metrics, last = [], []
  for draw in range(DRAWS):
    trainer = torch_crn.Trainer(branches(config, problem, torch.float32))
    metrics.append(
      [
        trainer(batch(problem, i, torch.float32, draw), imposed(sides[i]))
        for i in range(len(problem.batches))
      ]
    )
    last.append(_state(trainer, lambda name: True))
  return metrics, last


def branches(config, problem: Problem, dtype: torch.dtype) -> dict[str, torch_crn.Branch]:
  """The reference's branches at the recipe's weights."""
  c = config.model
  sizes = ("patch_size", "embed_dim", "depths", "num_heads", "window_size")
  made = {}
  for kind in ("local", "global"):
    made[kind] = torch_crn.Branch(
      kind, release.VOCAB_SIZE, c.word_dim, c.feature_dim, c.map_dim, problem.image_size,
      **{k: c.backbone[k] for k in sizes},
    ).to(dtype)  # fmt: skip
    made[kind].load(lambda n, s, kind=kind: recipe.param(f"{problem.prefix}{kind}.{n}", s))
  return made


def batch(problem: Problem, i: int, dtype: torch.dtype, draw: int | None = None) -> dict:
  """Iteration i's batch; a `draw` changes the images by up to half a unit in the last place."""
  given = problem.batches[i]
  images = {k: given[k] for k in ("reference", "target")}
  if draw is not None:
    rng = np.random.default_rng(draw)
    images = {k: v * (1 + 2.0**-24 * rng.uniform(-1, 1, v.shape)) for k, v in images.items()}
  tensors = {k: torch.as_tensor(v, dtype=dtype) for k, v in images.items()}
  return tensors | {"tokens": torch.as_tensor(given["tokens"])}


def imposed(sides: dict[str, list[torch.Tensor]]) -> dict[str, torch_crn.Sides]:
  return {k: torch_crn.Sides(above) for k, above in sides.items()}


def _gradients(trainer: torch_crn.Trainer) -> dict[tuple[str, str], torch.Tensor]:
  return {
    (kind, name): p.grad
    for kind, branch in trainer.branches.items()
    for name, p in branch.release_state().items()
    if p.grad is not None
  }


def _state(trainer: torch_crn.Trainer, keep) -> dict[tuple[str, str], np.ndarray]:
  return {
    (kind, name): value.detach().numpy().astype(np.float64)
    for kind, branch in trainer.branches.items()
    for name, value in branch.release_state().items()
    if keep(name)
  }
