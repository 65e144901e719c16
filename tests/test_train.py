"""Whole runs of a tiny model: files, compilations, continuation, evaluation."""

import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from crn_jax import train
from crn_jax.errors import UserError
from crn_jax.parallel import DataParallel
from crn_jax.workdir import checkpoint, history
from crn_jax.workdir.interrupt import Interrupted
from crn_jax.workdir.progress import Progress
from tests import tiny
from tests.test_training_step import Compiled, facts, first_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tiny.draw(tmp_path_factory.mktemp("drawn"))


def configured(root):
  """Records every step: records of several hold means, which depend on where a run was stopped."""
  config = tiny.config(root)
  config.log_every_steps = 1
  return config


@pytest.fixture(scope="module")
def finished(quick_compile, root, tmp_path_factory):
  """A finished run: its folder, every function that it compiled and how often any was, and what it
  showed."""
  del quick_compile
  compiled = []
  original = DataParallel.map

  def recording(self, *args, **kwargs):
    compiled.append(original(self, *args, **kwargs))
    return compiled[-1]

  workdir = tmp_path_factory.mktemp("run") / "a"
  with pytest.MonkeyPatch.context() as patch, Compiled() as events:
    patch.setattr(DataParallel, "map", recording)
    config = configured(root)
    config.profile_steps = (2, 3)
    shown = train.train(config, workdir)
  return workdir, (compiled, compilations(events)), shown


def compilations(events) -> int:
  return [name for name, _ in events].count("backend_compile_duration")


def test_a_run_leaves_its_files(finished):
  workdir, _, shown = finished
  for name in ("config.json", "vocab.json", "eval.json", "checkpoints"):
    assert (workdir / name).exists()
  assert list(workdir.glob("events.out.tfevents.*"))
  assert list(workdir.glob("plugins/profile/*/*.xplane.pb"))
  with Image.open(workdir / "pictures" / "retrieval_dress.png") as picture:
    assert picture.width > 1000
  assert "retrieval_dress.png" in shown
  results = json.loads((workdir / "eval.json").read_text())
  assert results["checkpoint_step"] == 4
  assert results["n_queries"] == 30
  assert set(results["protocols"]) == {"val_split", "original_split", "original_with_reference"}
  assert results["protocols"]["original_split"]["gallery"] == 40
  assert set(results["by_text_kind"]) == {"modification", "auxiliary"}


def test_every_function_compiles_once(finished):
  """Two epochs with a ragged end, an evaluation after each with a ragged last batch."""
  _, (compiled, count), _ = finished
  assert len(compiled) == count == 4  # zero image, images, queries, update
  assert [f._cache_size() for f in compiled] == [1, 1, 1, 1]


def test_evaluation_needs_no_training_data_and_repeats_the_results(finished, root, tmp_path):
  workdir, _, _ = finished
  data = tmp_path / "data"
  shutil.copytree(root, data)
  for path in (data / "captions").glob("*.train.json"):
    path.unlink()
  before = json.loads((workdir / "eval.json").read_text())
  train.evaluate_run(tiny.config(data), workdir, "last")
  assert json.loads((workdir / "eval.json").read_text()) == before


def test_starting_a_finished_run_again_trains_no_further(finished, root):
  workdir, _, shown = finished
  with Compiled() as events:
    assert train.train(tiny.config(root), workdir) == shown
  assert compilations(events) == 3  # All but the update.


@pytest.mark.parametrize("damaged", [False, True])
def test_a_step_is_compiled_for_what_a_checkpoint_holds(
  finished, root, tmp_path, monkeypatch, damaged
):
  """Ahead, unless it seemed that there was no step to do."""
  copy = tmp_path / "copy"
  shutil.copytree(finished[0], copy)
  last = copy / "checkpoints" / "4"
  shutil.rmtree(last / "default" if damaged else last)
  step = first_step(configured(root), copy, monkeypatch)
  assert 0 < int(step.given[0].step) < 4
  if damaged:
    assert step.compiled_for is None
  else:
    assert facts(step.given) == facts(step.compiled_for)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_was_stopped_ends_with_the_same_state(finished, root, tmp_path, step):
  """In the middle of an epoch and at its end; parameters, optimizer and losses bit by bit."""
  workdir, _, _ = finished
  stopped = tmp_path / "stopped"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Progress, "stepped", signal_at(step, Progress.stepped))
    with pytest.raises(Interrupted, match=f"stopped at step {step} by SIGTERM"):
      train.train(configured(root), stopped)
  train.train(configured(root), stopped)
  states = [
    ocp.StandardCheckpointer().restore(folder / "checkpoints" / "4" / "default")
    for folder in (workdir, stopped)
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)
  losses = [last_losses(folder) for folder in (workdir, stopped)]
  assert losses[0] == losses[1]
  results = [json.loads((folder / "eval.json").read_text()) for folder in (workdir, stopped)]
  assert results[0] == results[1]


def signal_at(step: int, stepped):
  """`Progress.stepped` that gets a SIGTERM after a step."""

  def signalled(self, metrics):
    stepped(self, metrics)
    if self._step == step:
      os.kill(os.getpid(), signal.SIGTERM)

  return signalled


def last_losses(workdir) -> dict:
  record = [r for r in history.read_records(workdir / "metrics.jsonl") if "train/local/total" in r][
    -1
  ]
  return {k: v for k, v in record.items() if k.startswith(("train/local", "train/global", "step"))}


def test_a_run_records_its_losses_and_recalls(finished):
  workdir, _, _ = finished
  records = history.read_records(workdir / "metrics.jsonl")
  assert [record["step"] for record in records] == [1, 2, 2, 3, 4, 4]
  terms = ("classification", "cross_branch", "mutual_kl", "modification", "auxiliary", "total")
  for branch in ("local", "global"):
    assert {f"train/{branch}/{t}" for t in (*terms, "logit_scale", "grad_norm")} <= set(records[0])
  assert "train/local/perceptual" in records[0]
  for name in ("learning_rate", "examples_per_second", "peak_memory_gib"):
    assert records[1][f"train/{name}"] > 0
  assert {"eval/val_split/R@10", "eval/original_split/R@10"} <= set(records[2])


def test_tensorboard_shows_what_was_recorded_and_the_pictures(finished):
  workdir, _, _ = finished
  events = event_accumulator.EventAccumulator(str(workdir)).Reload()
  tags = events.Tags()["tensors"]
  recorded = history.read(workdir)
  names = [name for name in recorded.metrics("") if name not in ("step", "epoch")]
  pictures = [f"pictures/{p.stem}" for p in (workdir / "pictures").glob("*.png")]
  assert len(pictures) > 3
  assert sorted(tags) == sorted([*names, *pictures])
  for name in names:
    steps = [event.step for event in events.Tensors(name)]
    assert steps == recorded.series(name)[0].tolist()


def test_the_best_checkpoint_is_reported_beside_the_last(finished, root, tmp_path):
  workdir, _, _ = finished
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  for which in ("best", "last"):
    train.evaluate_run(tiny.config(root), copy, which)
    results = json.loads((copy / "eval.json").read_text())
    assert results["selection"] == which
    beside = results.get("beside", [])
    steps = {results["checkpoint_step"], *(r["checkpoint_step"] for r in beside)}
    with checkpoint.Checkpoints(copy / "checkpoints") as checkpoints:
      assert steps == {checkpoints.best_step(), 4}
    # If there is no other to stand beside it, the results say so.
    other = {"best": "last", "last": "best"}[which]
    assert results.get("also") == (other if len(steps) == 1 else None)


def test_a_run_is_not_overwritten_by_another_configuration(finished, root):
  workdir, _, _ = finished
  config = tiny.config(root)
  config.model.word_dim = 32
  with pytest.raises(ValueError, match="model.word_dim: 16 in the run, 32 now"):
    train.train(config, workdir)


def test_evaluating_a_folder_without_a_run_says_so(root, tmp_path):
  with pytest.raises(UserError, match="holds no trained run"):
    train.evaluate_run(tiny.config(root), tmp_path, "best")


def test_missing_pretrained_weights_stop_before_training(root, tmp_path):
  config = tiny.config(root)
  config.model.pretrained = str(tmp_path / "none.safetensors")
  with pytest.raises(UserError, match="convert_torch_weights.py"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(root, tmp_path):
  """The first step's huge update makes the second step's losses overflow; nobody logs it."""
  config = tiny.config(root)
  config.update_mode = "simultaneous"
  config.optimizer.learning_rate = 1e30
  config.checkpoint_every_steps = 1
  with pytest.raises(UserError, match=r"step 2: (local|global)/\w+.* not finite"):
    train.train(config, tmp_path / "run")
  with checkpoint.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [1]


def test_the_first_step_that_is_not_finite_is_named():
  config = tiny.config("unused")
  with Progress(config, 10, 20, 2) as progress:
    for total in (1.0, np.nan, np.nan):
      progress.stepped({"local/total": jnp.float32(total), "global/total": jnp.float32(1)})
    with pytest.raises(UserError, match="step 12: local/total not finite"):
      progress.read(DataParallel.create("shard_map"), [10])


def test_averaged_parameters_are_what_is_evaluated(root, tmp_path):
  config = tiny.config(root)
  config.num_epochs = 1
  config.optimizer.ema_decay = 0.5
  train.train(config, tmp_path)
  state = ocp.StandardCheckpointer().restore(tmp_path / "checkpoints" / "2" / "default")
  different = jax.tree.map(lambda a, b: np.any(a != b), state["average"], state["params"])
  assert np.mean(jax.tree.leaves(different)) > 0.5
  by_average = json.loads((tmp_path / "eval.json").read_text())
  train.evaluate_run(config, tmp_path, "last")
  assert json.loads((tmp_path / "eval.json").read_text()) == by_average


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_evaluation_does_not_depend_on_the_devices(finished, root, mode, monkeypatch, tmp_path):
  """Eight devices in the finished run, against one device and against pmap."""
  workdir, _, _ = finished
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  config = tiny.config(root)
  config.parallel.mode = mode
  original = DataParallel.create
  devices = jax.devices()[:1] if mode == "shard_map" else None
  monkeypatch.setattr(DataParallel, "create", lambda m: original(m, devices))
  train.evaluate_run(config, copy, "last")
  expected = json.loads((workdir / "eval.json").read_text())
  assert json.loads((copy / "eval.json").read_text()) == expected


def test_a_start_that_failed_does_not_lock_its_folder(root, tmp_path):
  config = tiny.config(root)
  config.num_epochs = 1
  config.batch_size = 1000  # More than there are triplets: found before anything is written.
  with pytest.raises(UserError, match="batch_size"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{}")  # As an earlier version left it.
  config.batch_size = 16
  train.train(config, tmp_path / "run")
  assert json.loads((tmp_path / "run" / "eval.json").read_text())["checkpoint_step"] == 2


def test_a_run_is_replaced_on_purpose_only(finished, root, tmp_path):
  workdir, _, _ = finished
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  (copy / "notes.txt").write_text("mine")
  config = tiny.config(root)
  config.num_epochs, config.seed = 1, 7
  with pytest.raises(UserError, match="seed: 599 in the run, 7 now"):
    train.train(config, copy)
  train.train(config, copy, overwrite=True)
  assert json.loads((copy / "config.json").read_text())["seed"] == 7
  assert [r["step"] for r in history.read_records(copy / "metrics.jsonl")] == [2, 2]
  with checkpoint.Checkpoints(copy / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [2]
  assert (copy / "notes.txt").read_text() == "mine"


def test_fields_of_the_evaluation_may_change_when_a_run_is_continued(finished, root, tmp_path):
  workdir, _, _ = finished
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  config = configured(root)
  config.eval.best_metric, config.eval.recall_at = "original_split/R@5", (5,)
  train.train(config, copy)
  results = json.loads((copy / "eval.json").read_text())
  assert results["best_metric"] == "original_split/R@5"
  assert set(results["protocols"]["original_split"]) == {"gallery", "R@5", "intervals"}


def test_fewer_epochs_than_are_done_say_so(finished, root):
  workdir, _, _ = finished
  config = configured(root)
  config.num_epochs = 1
  with pytest.raises(UserError, match="num_epochs = 1 end at step 2; .* is at step 4 already"):
    train.train(config, workdir)


def test_too_little_memory_is_one_line_and_does_not_lock_the_folder(root, tmp_path, monkeypatch):
  config = tiny.config(root)

  def exhausted(state, batch):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")

  with monkeypatch.context() as patch:
    patch.setattr(train.training_step, "compiled_ahead", lambda *_: exhausted)
    with pytest.raises(UserError, match="out of memory on cpu: .*8 bytes.\nA lower batch_size"):
      train.train(config, tmp_path / "run")
  config.num_epochs, config.batch_size = 1, 8
  train.train(config, tmp_path / "run")


def test_a_folder_that_is_none_or_cannot_be_written_is_found_first(root, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="file: is no folder; choose another --workdir"):
    train.train(tiny.config(root), tmp_path / "file" / "run")


def test_data_in_a_folder_whose_name_is_no_utf8_are_trained_on_and_drawn(tmp_path):
  folder = pathlib.Path(os.fsdecode(bytes(tmp_path) + b"/d\xff\xfe"))
  config = tiny.config(tiny.draw(folder))
  config.num_epochs = 1
  shown = train.train(config, tmp_path / "run")
  for name in ("report.html", "retrieval_dress.png", "attention_dress.png"):
    assert name in shown
