"""Whole runs of a tiny model: files, compilations, continuation, evaluation."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from crn_jax import train
from crn_jax.parallel import DataParallel
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tiny.draw(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def finished(quick_compile, root, tmp_path_factory):
  """A finished run: its folder, every function that it compiled, and what it showed."""
  del quick_compile
  compiled = []
  original = DataParallel.map

  def recording(self, *args, **kwargs):
    compiled.append(original(self, *args, **kwargs))
    return compiled[-1]

  workdir = tmp_path_factory.mktemp("run") / "a"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(DataParallel, "map", recording)
    shown = train.train(tiny.config(root), workdir)
  return workdir, compiled, shown


def test_a_run_leaves_its_files(finished):
  workdir, _, shown = finished
  for name in ("config.json", "vocab.json", "eval.json", "checkpoints"):
    assert (workdir / name).exists()
  assert list(workdir.glob("events.out.tfevents.*"))
  with Image.open(workdir / "pictures" / "retrieval_dress.png") as picture:
    assert picture.width > 1000
  assert "retrieval_dress.png" in shown
  results = json.loads((workdir / "eval.json").read_text())
  assert results["checkpoint_step"] == 4
  assert results["n_queries"] == 30
  assert set(results["protocols"]) == {"val_split", "original_split"}
  assert results["protocols"]["original_split"]["gallery"] == 40
  assert set(results["by_text_kind"]) == {"modification", "auxiliary"}


def test_every_function_compiles_once(finished):
  """Two epochs with a ragged end, an evaluation after each with a ragged last batch."""
  _, compiled, _ = finished
  assert len(compiled) == 4  # zero image, images, queries, update
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
  assert train.train(tiny.config(root), workdir) == shown


def test_a_continued_run_ends_with_the_same_parameters(finished, root, tmp_path, monkeypatch):
  workdir, _, _ = finished
  stopped = tmp_path / "stopped"

  def interrupt(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    # After the first epoch's checkpoint.
    patch.setattr(train, "recall_scalars", interrupt)
    with pytest.raises(KeyboardInterrupt):
      train.train(tiny.config(root), stopped)
  train.train(tiny.config(root), stopped)
  states = [
    ocp.StandardCheckpointer().restore(folder / "checkpoints" / "4" / "default")
    for folder in (workdir, stopped)
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_run_is_not_overwritten_by_another_configuration(finished, root):
  workdir, _, _ = finished
  config = tiny.config(root)
  config.model.word_dim = 32
  with pytest.raises(ValueError, match="model.word_dim: 16 in the run, 32 now"):
    train.train(config, workdir)


def test_evaluating_a_folder_without_a_run_says_so(root, tmp_path):
  with pytest.raises(FileNotFoundError, match="holds no trained run"):
    train.evaluate_run(tiny.config(root), tmp_path, "best")


def test_missing_pretrained_weights_stop_before_training(root, tmp_path):
  config = tiny.config(root)
  config.model.pretrained = str(tmp_path / "none.safetensors")
  with pytest.raises(FileNotFoundError, match="convert_torch_weights.py"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_is_named():
  with pytest.raises(FloatingPointError, match="step 3: local/total not finite"):
    train.check_finite({"local/total": float("nan"), "global/total": 1.0}, 3)


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
