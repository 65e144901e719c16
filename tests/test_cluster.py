"""Two processes on this machine's loopback interface, two virtual devices each, train as one does.

One process of four devices is the reference. All that differs is the order of sums: the bound of
1e-5 is that of `test_parallel`. Adam's epsilon is large here, as its first steps would else be the
sign of the gradient, and turn the rounding of gradients next to zero into whole steps.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from crn_jax import cluster, train
from crn_jax.errors import UserError
from crn_jax.parallel import DataParallel
from crn_jax.workdir import files, history
from tests import tiny
from tests.retrieval import test_pairs

REPOSITORY = pathlib.Path(__file__).parents[1]
TOLERANCE = 1e-5
# Two steps an epoch.
BEGUN, EPOCHS = 1, 5
LAST = 2 * EPOCHS
# Seconds that a pair of processes may take on a busy machine; much less on a quiet one.
LIMIT = 900

CONFIG = """
from tests import test_cluster

def get_config():
  return test_cluster.config({root!r})
"""


def config(root):
  c = tiny.config(root)
  c.num_epochs = EPOCHS
  c.log_every_steps = c.checkpoint_every_steps = 1
  c.eval.every_epochs = 100  # At the end.
  c.optimizer.epsilon = 1e-3
  # As little to compile as can be.
  c.update_mode = "simultaneous"
  c.loss.modification = c.loss.auxiliary = 0.0
  return c


def start(*command, processes: int = 2, devices: int = 2, **environment) -> list[subprocess.Popen]:
  """Processes of a cluster: a Python command each, with the flags of its place."""
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  environment = os.environ | {
    "PYTHONPATH": str(REPOSITORY),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  } | environment  # fmt: skip
  place = (f"--coordinator=127.0.0.1:{port}", f"--processes={processes}")
  return [
    subprocess.Popen(
      [sys.executable, *map(str, command), *place, f"--process={i}"],
      env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for i in range(processes)
  ]  # fmt: skip


def finished(processes, limit: float = LIMIT) -> list[tuple[int, str, str]]:
  """Exit status, standard output and error of each; none outlives the limit."""
  end = time.monotonic() + limit
  try:
    return [
      (p.returncode, out, error)
      for p in processes
      for out, error in [p.communicate(timeout=max(end - time.monotonic(), 1))]
    ]
  finally:
    for process in processes:
      with contextlib.suppress(ProcessLookupError):
        process.kill()


# What its threads print, one into the other's line.
GLOO = "[Gloo] Rank is connected to peer ranks. Expected number of connected peer ranks is :"


def words(text: str) -> set[str]:
  return set(re.findall("[A-Za-z]+", text))


def train_alone(c, workdir):
  """In this process, on four of its devices."""
  original = DataParallel.create
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(DataParallel, "create", lambda mode: original(mode, jax.devices()[:4]))
    train.train(c, workdir)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tiny.draw(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def config_file(root, tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "config.py"
  path.write_text(CONFIG.format(root=str(root)))
  return path


@pytest.fixture(scope="module")
def alone(quick_compile, root, tmp_path_factory):
  """A run of one process: its folder after the first epoch, and at its end."""
  del quick_compile
  folder = tmp_path_factory.mktemp("alone")
  c = config(root)
  c.num_epochs = BEGUN
  train_alone(c, folder / "begun")
  shutil.copytree(folder / "begun", folder / "ended")
  train_alone(config(root), folder / "ended")
  return folder / "begun", folder / "ended"


def check_equal_runs(workdir, expected):
  """Parameters within the tolerance, the very same results, and every step recorded once."""
  found, wanted = (
    ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(LAST) / "default")["params"]
    for folder in (workdir, expected)
  )
  worst = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), found, wanted)
  assert max(jax.tree.leaves(worst)) < TOLERANCE
  results = [json.loads((folder / "eval.json").read_text()) for folder in (workdir, expected)]
  assert results[0]["protocols"] == results[1]["protocols"]
  assert results[0]["by_query"] == results[1]["by_query"]
  steps = [r["step"] for r in history.read_records(workdir / "metrics.jsonl") if len(r) > 10]
  assert steps == list(range(1, LAST + 1))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
class TestTraining:
  def test_a_run_of_one_process_is_ended_and_evaluated_by_two(self, alone, config_file, tmp_path):
    """Under pmap, what one has begun under shard_map; and evaluated under both."""
    begun, ended = alone
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    events = len(list(workdir.glob("events.out.tfevents.*")))
    (first, second) = finished(
      start(REPOSITORY / "main.py", f"--config={config_file}", f"--workdir={workdir}",
            "--config.parallel.mode=pmap")
    )  # fmt: skip
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert f"continuing from the checkpoint at step {2 * BEGUN}" in first[1]
    assert "pmap on 4 x cpu" in first[1]
    assert "retrieval_dress.png" in first[1]
    # One speaks and writes; Gloo greets on its own.
    assert words(second[1]) <= words(GLOO)
    assert "step" not in second[2]
    # Of the training, and of its pictures.
    assert len(list(workdir.glob("events.out.tfevents.*"))) == events + 2
    check_equal_runs(workdir, ended)

    before = (workdir / "eval.json").read_text()
    (workdir / "eval.json").unlink()
    (first, second) = finished(
      start(REPOSITORY / "main.py", f"--workdir={workdir}", "--mode=eval", "--checkpoint=last",
            "--config.parallel.mode=shard_map")
    )  # fmt: skip
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert (workdir / "eval.json").read_text() == before

  def test_a_signal_to_one_process_saves_in_both_at_the_same_step(
    self, alone, root, config_file, tmp_path
  ):
    """From random values; one process of four devices ends the run."""
    workdir = tmp_path / "run"
    done = finished(
      start(REPOSITORY / "tests" / "in_cluster.py", REPOSITORY / "main.py",
            f"--config={config_file}", f"--workdir={workdir}",
            SIGNALLED=f"1:{signal.SIGTERM:d}:2")
    )  # fmt: skip
    assert [status for status, _, _ in done] == [128 + signal.SIGTERM] * 2, done
    stopped = [re.findall(r"stopped at step (\d+) by SIGTERM", error) for _, _, error in done]
    assert stopped[0] == stopped[1]
    step = int(stopped[0][0])
    assert 2 <= step < LAST
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == step
    for i, (_, _, error) in enumerate(done):
      assert error.splitlines()[-1].endswith(f"--processes=2 --process={i}")
    train_alone(config(root), workdir)
    check_equal_runs(workdir, alone[1])

  def test_the_loss_of_one_process_ends_the_other_and_not_the_run(
    self, alone, root, config_file, tmp_path
  ):
    begun, ended = alone
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    processes = start(
      REPOSITORY / "tests" / "in_cluster.py", REPOSITORY / "main.py",
      f"--config={config_file}", f"--workdir={workdir}", SIGNALLED=f"1:{signal.SIGKILL:d}:5",
    )  # fmt: skip
    try:
      processes[1].wait(LIMIT)
      ((status, _, error),) = finished(processes[:1], limit=60)
    finally:
      finished(processes)
    assert status == 1
    assert "process 0 of 2: another process has ended" in error
    assert error.splitlines()[-1].endswith("--processes=2 --process=0")
    train_alone(config(root), workdir)
    check_equal_runs(workdir, ended)


# What processes say to each other, without a model. `main` is the body of a process.
SMALL = """
import pathlib, sys, os, time
from crn_jax import cluster, processes
from crn_jax.errors import UserError

coordinator, n, process = (arg.partition("=")[2] for arg in sys.argv[-3:])
cluster._HEARTBEAT = 10
processes._SEEN_WITHIN = 1
place = cluster.Place(coordinator, int(n), int(process))

def main(i):
  {body}

with cluster.leaving_together():
  try:
    cluster.join(place, "AGAIN", wait={wait})
    main(place.process)
  except UserError as error:
    raise SystemExit(f"error: {{error}}")
"""


def small(tmp_path, body: str, wait: int = 60) -> list[tuple[int, str, str]]:
  path = tmp_path / "small.py"
  path.write_text(SMALL.format(body=body.strip().replace("\n", "\n  "), wait=wait))
  return finished(start(path, devices=1), limit=120)


class TestProcesses:
  def test_they_tell_each_other_what_they_found(self, tmp_path):
    done = small(
      tmp_path,
      """
print(processes.gather(i), processes.on_primary(lambda: ["told by", i]), flush=True)
print(processes.primary_first(lambda told: (i, told), lambda made: 7), flush=True)
processes.check_equal({"a": 1}, "")
processes.check_shared(pathlib.Path("new", "folder"))
processes.say("said")
""",
    )
    assert [status for status, _, _ in done] == [0, 0], done
    lines = [out.splitlines() for _, out, _ in done]
    assert lines[0] == ["[0, 1] ['told by', 0]", "(0, None)", "said"]
    assert lines[1] == ["[0, 1] ['told by', 0]", "(1, 7)"]

  def test_one_writes_weights_and_all_read_them_without_waiting_for_one_another(self, tmp_path):
    done = small(
      tmp_path,
      f"""
import numpy as np
from crn_jax.workdir import weights
tree, path = {{"params": {{"a": np.arange(3.0)}}}}, "{tmp_path}/weights"
processes.on_primary(lambda: weights.save_backbone(tree, {{"kind": "small"}}, path))
for _ in range(1 + i):
  print(weights.read_metadata(path)["kind"], weights.load_backbone(path, tree)["params"]["a"].sum())
""",
    )
    assert [status for status, _, _ in done] == [0, 0], done
    assert [out.splitlines() for _, out, _ in done] == [["small 3.0"], ["small 3.0"] * 2]

  def test_they_agree_on_which_features_are_missing(self, tmp_path):
    """The first alone knows a folder of its own; nothing is computed that one of them has not."""
    done = small(
      tmp_path,
      f"""
import numpy as np
from crn_jax.retrieval.kept_features import KeptFeatures
def compute(first, last):
  print("computes", first, last, flush=True)
  return np.full((last - first, 2), 3, np.float32)
for folder in ("{tmp_path}/kept", f"{tmp_path}/own{{i}}"):
  for n in (3, 3):
    kept = KeptFeatures.of(folder, {{"of": 1}}, 2)
    print(kept.rows("image", ["a"] * n, compute, "x").sum(), flush=True)
""",
    )
    assert [status for status, _, _ in done] == [1, 1], done
    shared = ["computes 0 3", "18.0", "18.0", "computes 0 3", "18.0"]
    assert done[0][1].splitlines() == [*shared, "18.0"]
    assert done[1][1].splitlines() == shared
    assert "process 0 has read this file, process 1 cannot; name a folder that" in done[1][2]

  @pytest.mark.slow
  def test_they_score_pairs_together(self, tmp_path):
    """Vectors and scores of DCNet: the same in both processes, and in one with as many devices."""
    done = small(
      tmp_path,
      f"""
import numpy as np
from tests.retrieval.test_pairs import Given
_, added = Given.make(pathlib.Path("{tmp_path}", str(i))).encode()
np.savez(f"{tmp_path}/{{i}}.npz", **added)
""",
    )
    assert [status for status, _, _ in done] == [0, 0], done
    _, expected = test_pairs.Given.make(tmp_path / "alone").encode(jax.devices()[:2])
    found = [np.load(tmp_path / f"{i}.npz") for i in range(2)]
    for kind, scores in expected.items():
      np.testing.assert_array_equal(found[0][kind], found[1][kind])
      np.testing.assert_allclose(found[0][kind], scores, rtol=0, atol=test_pairs.TOLERANCE / 0.2)

  @pytest.mark.parametrize(
    ("body", "message"),
    [
      (
        "processes.on_primary(lambda: pathlib.Path('nowhere').read_text())",
        r"No such file or directory: 'nowhere'$",
      ),
      (
        "processes.check_equal({'a': 1, 'the words': i}, 'Mend it')",
        "^error: the words: 1 in process 1, 0 in process 0; it must be the same .*Mend it$",
      ),
      (
        "os.chdir('/' if i else os.getcwd())\nprocesses.check_shared(pathlib.Path('run'))",
        "^error: run: is another folder in process 1 on .* file system that all machines share",
      ),
    ],
  )
  def test_what_one_finds_wrong_stops_all(self, body, message, tmp_path):
    """With the same message, and without waiting for one another."""
    done = small(tmp_path, body)
    assert [status for status, _, _ in done] == [1, 1]
    for _, _, error in done:
      assert re.search(message, error.splitlines()[-1]), error

  @pytest.mark.parametrize("lost", [0, 1])
  def test_where_one_is_killed_the_other_ends_and_says_so(self, lost, tmp_path):
    """While it computes on its own; the first is the one that all talk through."""
    before = time.monotonic()
    done = small(tmp_path, f"if i == {lost}:\n  os.kill(os.getpid(), 9)\ntime.sleep(300)")
    assert time.monotonic() - before < 60
    status, _, error = done[1 - lost]
    assert status == 1
    assert error.splitlines()[-2:] == [
      f"error: process {1 - lost} of 2: another process has ended, its own output says why, and "
      f"none can go on without it. Start all of them again; a training continues from its last "
      f"checkpoint:",
      "  AGAIN",
    ]

  def test_one_that_nobody_joins_says_so(self, tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SMALL.format(body="pass", wait=3))
    processes = start(path, devices=1)
    processes[1].kill()
    (status, _, error), _ = finished(processes, limit=120)
    assert status == 1
    assert re.search(
      r"^error: 127.0.0.1:\d+: not all 2 processes came within 3 s. Start the same command once "
      r"for every --process=0 .. 1",
      error.splitlines()[-1],
    )


class TestPlace:
  @pytest.fixture(autouse=True)
  def no_cluster(self, monkeypatch):
    for name in list(os.environ):
      if name.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROC", "SLURM", "OMPI", "JOB_", "KUBERN")):
        monkeypatch.delenv(name)

  SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[3,7-9]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "4",
  }
  KUBERNETES = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "2",
    "JAX_COORDINATOR_ADDRESS": "crn-0.crn:4321",
    "JAX_NUM_PROCESSES": "3",
  }

  @pytest.mark.parametrize(
    ("environment", "flags", "place"),
    [
      ({}, (None, None, None), None),
      ({}, ("a:1", 2, 1), cluster.Place("a:1", 2, 1)),
      ({}, ("a:1", 1, 0), None),
      (SLURM, (None, None, None), cluster.Place("node3:61441", 8, 5, (1,))),
      (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, (None, None, None),
       cluster.Place("node3:61441", 8, 5)),
      (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (None, None, None), None),
      (SLURM, (None, 1, None), None),
      (KUBERNETES, (None, None, None), cluster.Place("crn-0.crn:4321", 3, 2)),
      # Trainings of their own, and any program in a pod.
      ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}, (None,) * 3, None),
    ],
  )  # fmt: skip
  def test_it_is_as_given_or_as_the_environment_says(self, environment, flags, place, monkeypatch):
    for name, value in environment.items():
      monkeypatch.setenv(name, value)
    assert cluster.find(*flags) == place

  @pytest.mark.parametrize(
    ("flags", "message"),
    [
      (("a:1", None, 1), "--processes: missing; .*--coordinator=HOST:PORT"),
      ((None, 4, 0), "--coordinator: missing"),
      ((None, None, 0), "--coordinator, --processes: missing"),
      (("a", 2, 0), "--coordinator=a: expected HOST:PORT"),
      (("a:1", 2, 2), "--process=2 of --processes=2: expected numbers from 0 to 1"),
      (("a:1", 0, 0), "--process=0 of --processes=0: expected numbers from 0 to 0"),
    ],
  )
  def test_what_cannot_be_is_refused(self, flags, message):
    with pytest.raises(UserError, match=message):
      cluster.find(*flags)

  def test_a_number_in_the_environment_is_one(self, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=two: expected a number"):
      cluster.find()

  def test_nobody_at_the_address_is_said_with_the_time_waited(self):
    with socket.create_server(("127.0.0.1", 0)) as free:
      port = free.getsockname()[1]
    with pytest.raises(
      UserError, match=rf"127.0.0.1:{port}: no answer from process 0 in 1 s .*refused"
    ):
      cluster.join(cluster.Place(f"127.0.0.1:{port}", 2, 1), "AGAIN", wait=1)


LEAVING = """
import threading
from crn_jax import background, cluster

for work in {work}:
  background.start(work)
with cluster.leaving_together():
  print("shown")
  raise {error}
"""


@pytest.mark.parametrize(
  ("error", "status", "says"),
  [
    ("SystemExit('error: said')", 1, "error: said"),
    ("SystemExit(143)", 143, ""),
    ("SystemExit", 0, ""),
    ("ValueError('wrong')", 1, "ValueError: wrong"),
    ("KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
  ],
)
def test_a_program_that_fails_does_not_wait_for_its_threads(error, status, says):
  """It ends as one without threads."""
  done = []
  for work in ("[]", "[threading.Event().wait]"):
    command = [sys.executable, "-c", LEAVING.format(work=work, error=error)]
    done.append(subprocess.run(command, capture_output=True, text=True, timeout=60, check=False))
  assert [p.returncode for p in done] == [status] * 2
  assert [p.stdout for p in done] == ["shown\n"] * 2
  assert [(p.stderr.splitlines() or [""])[-1] for p in done] == [says] * 2


def test_temporary_names_do_not_depend_on_the_number_of_a_process(tmp_path):
  """On two machines it may be the same."""
  with files.replacing(tmp_path / "a") as first, files.replacing(tmp_path / "a") as second:
    assert first != second
    first.touch(), second.touch()
  with (
    files.replacing_folder(tmp_path / "b") as first,
    files.replacing_folder(tmp_path / "b") as second,
  ):
    assert first != second
    first.mkdir(), second.mkdir()
