"""A real process is killed at random moments, again and again."""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from crn_jax.convert import whole
from crn_jax.errors import UserError
from crn_jax.workdir import history
from crn_jax.workdir.checkpoint import CheckpointReader
from tests import tiny

pytestmark = pytest.mark.slow

REPOSITORY = pathlib.Path(__file__).parents[2]
KILLS = 10
STEPS = 60

CONFIG = """
from tests import tiny

def get_config():
  config = tiny.config({root!r})
  config.num_epochs = {epochs}
  config.eval.every_epochs = 10
  config.checkpoint_every_steps = 1
  config.log_every_steps = 1
  return config
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Function workdir -> process of `main.py` that trains the tiny model there."""
  folder = tmp_path_factory.mktemp("faults")
  config = folder / "config.py"
  config.write_text(CONFIG.format(root=str(tiny.draw(folder)), epochs=STEPS // 2))
  environment = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "XLA_FLAGS": "",  # One device.
    # Each process would compile the same functions.
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }

  def run(workdir):
    with open(folder / "log.txt", "ab") as log:
      return subprocess.Popen(
        [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}"],
        cwd=REPOSITORY, env=environment, stdout=log, stderr=log,
      )  # fmt: skip

  return run


def n_records(workdir) -> int:
  return len(history.read_records(workdir / "metrics.jsonl"))


def wait_for_steps(process, workdir) -> None:
  """Until the process has recorded a step of its own."""
  before = time.time()
  while process.poll() is None:
    path = workdir / "metrics.jsonl"
    if path.exists() and path.stat().st_mtime > before and n_records(workdir):
      return
    time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  assert start(workdir).wait() == 0
  return workdir


def assert_same_run(a, b) -> None:
  """Same final state, losses and recalls."""
  states = [
    ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(STEPS) / "default")
    for folder in (a, b)
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)
  numbers = [
    [
      {k: v for k, v in r.items() if "per_second" not in k and "memory" not in k}
      for r in history.read_records(folder / "metrics.jsonl")
    ]
    for folder in (a, b)
  ]
  assert numbers[0] == numbers[1]
  assert (a / "eval.json").read_text() == (b / "eval.json").read_text()


def test_ten_kills_change_nothing(start, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  rng = random.Random(0)
  for i in range(KILLS):
    process = start(workdir)
    if i % 5 == 4:
      time.sleep(rng.uniform(0, 10))  # While it starts.
    else:
      wait_for_steps(process, workdir)
      time.sleep(rng.uniform(0, 0.6))  # In a step, a record, a checkpoint, an evaluation.
    assert process.poll() is None, "the run ended before it could be killed ten times"
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert start(workdir).wait() == 0
  assert_same_run(undisturbed, workdir)


def test_a_polite_stop_says_how_to_continue_and_changes_nothing(start, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir)
  wait_for_steps(process, workdir)
  process.send_signal(signal.SIGINT)
  assert process.wait() == 128 + signal.SIGINT
  assert start(workdir).wait() == 0
  assert_same_run(undisturbed, workdir)


def test_readers_beside_a_training_change_nothing(start, undisturbed, tmp_path):
  """Evaluations and exports while checkpoints are written, one a step."""
  workdir = tmp_path / "run"
  process = start(workdir)
  wait_for_steps(process, workdir)
  read = 0
  while process.poll() is None:
    with contextlib.suppress(UserError):  # A checkpoint may be replaced while it is looked at.
      whole.export(workdir, tmp_path / f"export{read}")
      read += 1
    with contextlib.suppress(UserError), CheckpointReader(workdir / "checkpoints") as checkpoints:
      if there := checkpoints.steps():  # The first may still be being written.
        checkpoints.results(there[-1])
  assert process.returncode == 0
  assert read > 2
  assert_same_run(undisturbed, workdir)


def test_a_second_training_in_the_folder_is_refused(start, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  first = start(workdir)
  wait_for_steps(first, workdir)
  assert start(workdir).wait() == 1
  assert first.wait() == 0
  assert_same_run(undisturbed, workdir)
