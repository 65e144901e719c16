"""Checkpoints: what is kept, what is damaged, what does not fit on the disk."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from crn_jax.errors import UserError
from crn_jax.methods.base import TrainState
from crn_jax.parallel import REPLICATED, DataParallel
from crn_jax.workdir.checkpoint import (
  CheckpointReader,
  Checkpoints,
  DamagedError,
  checksum,
  steps,
)

WAIT = 60  # Seconds after which a thread that was not released fails.


def state(step: int, size: int = 50) -> TrainState:
  """Incompressible contents, so that a checkpoint's size is known."""
  rng = np.random.default_rng(step)
  params = {"local": {"w": rng.normal(size=(size, 100)).astype(np.float32)}, "global": {}}
  return TrainState(np.asarray(step, np.int32), params, {"local": {}}, {"local": ()}, {})


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def save_all(folder, metrics):
  with Checkpoints(folder) as checkpoints:
    for step, metric in enumerate(metrics, 1):
      checkpoints.save(state(step), metric, None if metric is None else {"recall": metric})


@contextlib.contextmanager
def file_size_limit(size: int):
  """Writing more than `size` bytes to a file fails, as on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_the_last_two_and_the_best_are_kept(tmp_path):
  save_all(tmp_path, [1.0, 3.0, 2.0, None, None, None])
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best_step() == 2
    assert checkpoints.results(2) == {"recall": 3.0}


def test_a_later_checkpoint_must_be_strictly_better_to_be_best(tmp_path):
  save_all(tmp_path, [1.0, 3.0, 3.0])
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best_step() == 2


def test_without_an_evaluation_there_is_no_best(tmp_path):
  save_all(tmp_path, [None])
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best_step() is None


def test_a_state_comes_back_as_it_was(tmp_path):
  save_all(tmp_path, [None, None])
  with Checkpoints(tmp_path) as checkpoints:
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_last(state(0)), state(2))


def test_an_empty_folder_has_nothing_to_continue_from(tmp_path):
  with Checkpoints(tmp_path / "new") as checkpoints:
    assert checkpoints.restore_last(state(0)) is None


def cut_short(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def remove(path):
  path.unlink()


@pytest.mark.parametrize("damage", [cut_short, change_a_byte, remove])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(tmp_path, damage, caplog):
  folder = tmp_path / "checkpoints"
  save_all(folder, [None, None])
  damage(largest_file(folder / "2"))
  with Checkpoints(folder) as checkpoints:
    restored = checkpoints.restore_last(state(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state(1))
    assert "2: damaged checkpoint" in caplog.text
    assert "continuing from step 1" in caplog.text
    # It is out of the way of the step that will be done again, but not lost.
    assert (tmp_path / "damaged" / "2").is_dir()
    checkpoints.save(state(2))
  with Checkpoints(folder) as checkpoints:
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_last(state(0)), state(2))


@pytest.mark.parametrize("name", ["metrics/metrics", "_CHECKPOINT_METADATA", "default/_METADATA"])
def test_damaged_side_files_are_damage_too(tmp_path, name, caplog):
  folder = tmp_path / "checkpoints"
  save_all(folder, [1.0, 2.0])
  (folder / "2" / name).write_text("{")
  with Checkpoints(folder) as checkpoints:
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_last(state(0)), state(1))
    assert "damaged" in caplog.text


def test_a_run_never_starts_anew_because_all_checkpoints_are_damaged(tmp_path):
  save_all(tmp_path / "checkpoints", [None, None])
  for step in "12":
    change_a_byte(largest_file(tmp_path / "checkpoints" / step))
  with (
    Checkpoints(tmp_path / "checkpoints") as checkpoints,
    pytest.raises(ValueError, match="no checkpoint can be read"),
  ):
    checkpoints.restore_last(state(0))


def test_a_failed_write_keeps_the_checkpoint_before_and_says_so(tmp_path, caplog):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state(1))
    checkpoints.wait()
    with file_size_limit(10_000):
      checkpoints.save(state(2))
      checkpoints.wait()
    assert "step 2 was not written" in caplog.text
    assert "the one at step 1 is kept" in caplog.text
    assert checkpoints.steps() == [1]
    # What was written in part is gone, and the run goes on.
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    checkpoints.save(state(3))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1, 3]
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_last(state(0)), state(3))


def with_free_bytes(monkeypatch, free: int):
  usage = shutil.disk_usage("/")
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))


def test_a_full_disk_is_not_written_to(tmp_path, caplog, monkeypatch):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state(1))
    checkpoints.wait()
    with_free_bytes(monkeypatch, 15_000)
    checkpoints.save(state(2))
    assert "step 2 was not written (needs 2e-05 GB, 1.5e-05 GB are free)" in caplog.text
    assert "the one at step 1 is kept" in caplog.text
    with pytest.raises(UserError, match="the same command continues from step 1"):
      checkpoints.require(2)
    monkeypatch.undo()
    checkpoints.save(state(3))
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]


def test_a_small_disk_is_told_of_before_the_first_step(tmp_path, caplog, monkeypatch):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.check_space(state(0))
    assert "GB are free" not in caplog.text
    with_free_bytes(monkeypatch, 50_000)
    checkpoints.check_space(state(0))
    assert "checkpoints will need 8e-05 GB, 5e-05 GB are free" in caplog.text


def test_a_failure_shows_before_the_next_checkpoint(tmp_path, caplog):
  with Checkpoints(tmp_path) as checkpoints:
    with file_size_limit(10_000):
      checkpoints.save(state(1))
      while "not written" not in caplog.text:
        checkpoints.poll()
    assert "there is none yet" in caplog.text


def test_what_a_killed_process_left_half_written_is_cleaned_up(tmp_path):
  save_all(tmp_path, [None])
  (tmp_path / "2.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    checkpoints.save(state(2))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_the_checksum_sees_every_bit():
  changed = state(1)
  changed.params["local"]["w"][3, 4] = np.nextafter(changed.params["local"]["w"][3, 4], 1)
  assert checksum(changed) != checksum(state(1))


def failing(original, error, times=1):
  """A method that fails the first times it is called."""
  calls = []

  def method(self, *args, **kwargs):
    calls.append(args)
    if len(calls) <= times:
      raise error
    return original(self, *args, **kwargs)

  return method


def test_an_error_of_the_moment_is_no_damage(tmp_path, monkeypatch):
  """A disk that fails once: the newest checkpoint is read all the same."""
  folder = tmp_path / "checkpoints"
  save_all(folder, [None, None])
  error = OSError(errno.EIO, "Input/output error")
  monkeypatch.setattr(Checkpoints, "_read_arrays", failing(Checkpoints._read_arrays, error))
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.restore_last(state(0)).step == 2
  assert not (tmp_path / "damaged").exists()


def test_a_disk_that_cannot_be_read_stops_and_moves_nothing(tmp_path, monkeypatch):
  folder = tmp_path / "checkpoints"
  save_all(folder, [None, None])
  error = OSError(errno.EIO, "Input/output error")
  monkeypatch.setattr(Checkpoints, "_read_arrays", failing(Checkpoints._read_arrays, error, 9))
  original = open

  def unreadable(file, *args, **kwargs):
    if "checkpoints" in str(file):
      raise error
    return original(file, *args, **kwargs)

  with Checkpoints(folder) as checkpoints:
    monkeypatch.setattr("builtins.open", unreadable)
    with pytest.raises(UserError, match="2: cannot be read .*Input/output error"):
      checkpoints.restore_last(state(0))
    monkeypatch.undo()
    assert checkpoints.steps() == [1, 2]
  assert not (tmp_path / "damaged").exists()


def test_another_structure_stops_and_names_the_first_differences(tmp_path):
  folder = tmp_path / "checkpoints"
  save_all(folder, [None, None])
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(UserError) as error:
      checkpoints.restore_last(state(0, size=7))
    assert "params.local.w: (50, 100) in the checkpoint, (7, 100) expected" in str(error.value)
    other = state(0).replace(average={"local": np.zeros(3, np.float32)})
    with pytest.raises(
      UserError, match=r"average.local: absent in the checkpoint, \(3,\) expected"
    ):
      checkpoints.restore_last(other)
    assert checkpoints.steps() == [1, 2]
  assert not (tmp_path / "damaged").exists()


def test_a_programming_error_in_reading_or_saving_is_raised(tmp_path, monkeypatch):
  folder = tmp_path / "checkpoints"
  save_all(folder, [None])
  error = TypeError("unsupported operand")
  with Checkpoints(folder) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(Checkpoints, "_read_arrays", failing(Checkpoints._read_arrays, error, 9))
      with pytest.raises(TypeError, match="unsupported operand"):
        checkpoints.restore_last(state(0))
    with monkeypatch.context() as patch:
      patch.setattr(ocp.CheckpointManager, "save", failing(None, error))
      checkpoints.save(state(2))
      with pytest.raises(TypeError, match="unsupported operand"):
        checkpoints.require(2)
    assert checkpoints.steps() == [1]


@contextlib.contextmanager
def held_up(monkeypatch):
  """Orbax as it writes to a disk so slow that it waits for an event, and what it does, in order."""
  release, log, original = threading.Event(), [], ocp.CheckpointManager.save

  def save(self, step, **kwargs):
    log.append(f"begin {step}")
    assert release.wait(WAIT)
    done = original(self, step, **kwargs)
    log.append(f"end {step}")
    return done

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "save", save)
    yield release, log


def test_a_slow_disk_does_not_hold_up_who_saves(tmp_path, monkeypatch):
  with held_up(monkeypatch) as (release, log), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state(1))
    checkpoints.poll()
    assert checkpoints.steps() == []
    release.set()
    checkpoints.require(1)
    assert log == ["begin 1", "end 1"]


def test_checkpoints_are_written_one_after_the_other(tmp_path, monkeypatch):
  with held_up(monkeypatch) as (release, log):
    with Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(state(1))
      release.set()
      checkpoints.save(state(2))
    assert log == ["begin 1", "end 1", "begin 2", "end 2"]
  assert steps(tmp_path) == [1, 2]


def test_a_state_is_saved_as_it_was_though_the_next_steps_take_its_memory(tmp_path, monkeypatch):
  parallel = DataParallel.create("shard_map")
  step = parallel.map(
    lambda state, x: (jax.tree.map(lambda s: s + 1, state), jnp.sum(x)),
    outputs=(REPLICATED, REPLICATED),
    donate_first=True,
  )
  batch = parallel.shard(np.zeros((8, 1), np.float32))
  placed, _ = step(parallel.replicate(state(0)), batch)
  with held_up(monkeypatch) as (release, _), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(parallel.copy(placed))
    for _ in range(3):
      placed, _ = step(placed, batch)
    jax.block_until_ready(placed)
    release.set()
    checkpoints.wait()
    expected = jax.tree.map(lambda x: x + 1, state(0))
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, state(0)), expected)


def test_a_copy_on_the_device_is_let_go_before_the_disk_is_written_to(tmp_path, monkeypatch):
  written_to = threading.Event()
  monkeypatch.setattr(
    "crn_jax.workdir.checkpoint.checksum", lambda tree: written_to.set() or checksum(tree)
  )
  copy = jax.tree.map(jnp.asarray, state(1))
  held = weakref.ref(copy.params["local"]["w"])
  with held_up(monkeypatch) as (release, _), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(copy)
    del copy
    assert written_to.wait(WAIT)
    assert held() is None
    release.set()


def test_an_error_in_the_thread_is_raised_once_and_leaves_no_thread(tmp_path, monkeypatch):
  monkeypatch.setattr(ocp.CheckpointManager, "save", failing(None, TypeError("unsupported"), 9))
  with pytest.raises(TypeError, match="unsupported"), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state(1))
    with pytest.raises(TypeError, match="unsupported"):
      checkpoints.save(state(2))
    checkpoints.wait()
    checkpoints.save(state(3))
  assert not [t for t in threading.enumerate() if t.name.startswith("checkpoint")]


@pytest.mark.usefixtures("usual_handler")
def test_ctrl_c_while_waiting_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
  with held_up(monkeypatch) as (release, _), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(state(1))
    with pytest.raises(KeyboardInterrupt):
      threading.Timer(0, os.kill, (os.getpid(), signal.SIGINT)).start()
      checkpoints.wait()
    assert steps(tmp_path) == []
    release.set()
  assert steps(tmp_path) == [1]


def test_who_saves_alone_does_not_ask_in_the_name_of_all_whether_to_stop(tmp_path, monkeypatch):
  """JAX notes the number of the latest question, and has all processes stop by it."""
  asked = []
  monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
  save_all(tmp_path, [1.0, 2.0])
  assert asked == []


def test_fields_are_read_alone_and_checked(tmp_path):
  save_all(tmp_path, [None, None])
  with CheckpointReader(tmp_path) as checkpoints:
    found = checkpoints.restore_fields(2, state(0), ("params", "batch_stats"))
    assert found.keys() == {"params", "batch_stats"}
    np.testing.assert_array_equal(found["params"]["local"]["w"], state(2).params["local"]["w"])
  change_a_byte(largest_file(tmp_path / "2"))
  with (
    CheckpointReader(tmp_path) as checkpoints,
    pytest.raises(DamagedError, match="2: damaged checkpoint"),
  ):
    checkpoints.restore_fields(2, state(0), ("params",))


def snapshot(folder) -> dict:
  return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_reader_changes_nothing(tmp_path, caplog):
  """Neither half-written checkpoints, which may be another process's, nor damaged ones."""
  folder = tmp_path / "checkpoints"
  save_all(folder, [1.0, 2.0])
  (folder / "3.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
  (folder / "2" / "metrics" / "metrics").write_text("{")
  before = snapshot(tmp_path)
  with CheckpointReader(folder) as checkpoints:
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.best_step() == 1
    assert checkpoints.results(1) == {"recall": 1.0}
  assert snapshot(tmp_path) == before


def test_a_reader_sees_what_appears_and_what_goes(tmp_path):
  save_all(tmp_path, [1.0])
  with CheckpointReader(tmp_path) as reader, Checkpoints(tmp_path) as writer:
    assert reader.steps() == [1]
    for step in (2, 3, 4):
      writer.save(state(step), float(step))
    writer.wait()
    assert reader.steps() == [3, 4]
    assert reader.best_step() == 4
    assert reader.restore_fields(4, state(0), ("params",))["params"]["local"]["w"].shape == (
      50,
      100,
    )
    with pytest.raises(UserError, match="1: .*is gone"):
      reader.restore_fields(1, state(0), ("params",))


def test_a_reader_needs_no_folder(tmp_path):
  with CheckpointReader(tmp_path / "none") as checkpoints:
    assert checkpoints.steps() == []
    assert checkpoints.best_step() is None
