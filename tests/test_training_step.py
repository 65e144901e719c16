"""The step is compiled, in a thread, for the very arguments that training gives it, and once."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default, presets
from crn_jax import background, parallel, train, training_step
from crn_jax.errors import UserError
from crn_jax.methods import registry
from crn_jax.methods.crn import CRN
from crn_jax.parallel import DataParallel
from tests import tiny, tiny_towers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

TRAINED = [p for p in presets.PRESETS if registry.METHODS[default.get_config(p).method].trains]


class Reached(Exception):
  """A training has come to its first step."""


class Recorded:
  """In the place of a step: with what it is compiled, and called."""

  compiled_for = given = None

  def lower(self, *arguments):
    self.compiled_for = arguments
    return self

  def compile(self):
    pass

  def __call__(self, *arguments):
    self.given = arguments
    raise Reached


def first_step(config, workdir, monkeypatch) -> Recorded:
  """A training up to its first step."""
  step = Recorded()
  with monkeypatch.context() as patch, pytest.raises(Reached):
    patch.setattr(training_step, "compiled", lambda *_: step)
    train.train(config, workdir)
  return step


def facts(arguments):
  """What JAX tells arguments apart by."""
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tiny.draw(tmp_path_factory.mktemp("drawn"))


def configured(root, preset: str):
  kind = tiny_towers if preset in presets.TOWER_PRESETS else tiny
  return kind.config(root, preset)


@pytest.mark.parametrize("preset", TRAINED)
def test_it_is_compiled_for_what_a_training_begins_with(root, preset, tmp_path, monkeypatch):
  """Of a method on features that is the training before, of the towers."""
  config = configured(root, preset)
  config.optimizer.ema_decay = config.finetune.optimizer.ema_decay = 0.5
  step = first_step(config, tmp_path / "run", monkeypatch)
  assert facts(step.given) == facts(step.compiled_for)


@pytest.mark.parametrize(("preset", "mode"), [("clip4cir", "shard_map"), ("crn", "pmap")])
def test_what_cannot_be_compiled_for_shapes_is_compiled_when_called(
  root, preset, mode, tmp_path, monkeypatch
):
  """Batches with a table of features, and pmap."""
  monkeypatch.setattr(background, "start", lambda work: pytest.fail("something was begun"))
  if mode == "pmap":
    config = configured(root, preset)
    config.parallel.mode = mode
    first_step(config, tmp_path, monkeypatch)
  else:
    method = tiny_towers.method(preset, parallel.AXIS)
    tx = method.optimizer(steps_per_epoch=1, total_steps=1)
    step = training_step.compiled_ahead(method, tx, DataParallel.create(mode), like=None)
    assert step.lower


class Compiled:
  """Context: what is traced, lowered and compiled of functions from `DataParallel.map`, with the
  thread in which it is; programs that come from JAX's persistent cache count, too."""

  def __init__(self):
    self.events = []

  def __enter__(self):
    jax.monitoring.register_event_duration_secs_listener(self._note)
    return self.events

  def __exit__(self, *_):
    jax.monitoring.unregister_event_duration_listener(self._note)

  def _note(self, name, seconds, fun_name="", **_):
    del seconds
    if fun_name.endswith(("mapped", "(mapped)")):
      self.events.append((name.rpartition("/")[2], threading.current_thread()))


def test_it_is_traced_and_compiled_once_and_not_by_the_caller():
  dp = DataParallel.create("shard_map")
  mapped = dp.map(
    lambda state, x: (state + jax.lax.psum(jnp.sum(x), parallel.AXIS), x),
    outputs=(parallel.REPLICATED, parallel.SHARDED),
    donate_first=True,
  )
  state, rows = np.zeros((3,), np.float32), np.ones((16, 2), np.float32)
  with Compiled() as events:
    step = dp.compile_ahead(
      mapped, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (state, rows))
    )
    placed = dp.replicate(state)
    for _ in range(2):
      placed, _ = step(placed, dp.shard(rows))
  np.testing.assert_array_equal(dp.fetch(placed), state + 2 * rows.sum())
  names, threads = zip(*events, strict=True)
  assert sorted(names) == [
    "backend_compile_duration", "jaxpr_to_mlir_module_duration", "jaxpr_trace_duration",
  ]  # fmt: skip
  assert threading.current_thread() not in threads


def test_what_goes_wrong_is_raised_by_the_first_step(root, tmp_path, monkeypatch):
  config = tiny.config(root)
  placed = []

  def exhausted(self, tx, state, batch):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")

  def place(self, tree):
    placed.append(tree)
    return tree

  monkeypatch.setattr(CRN, "train_step", exhausted)
  monkeypatch.setattr(DataParallel, "replicate", place)
  with pytest.raises(UserError, match="out of memory on cpu: .*8 bytes.\nA lower batch_size"):
    train.train(config, tmp_path / "run")
  assert len(placed) == 1
