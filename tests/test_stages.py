"""Fine-tuning and what learns on its towers: one command, one folder, continued exactly."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import default, presets
from crn_jax import configuration, feature_training, pretrained, stages, state, train
from crn_jax.catalogue import encoders, indexing, model
from crn_jax.catalogue.retriever import Retriever
from crn_jax.catalogue.store import Store
from crn_jax.convert import backbone, whole
from crn_jax.errors import UserError
from crn_jax.input_pipeline.dataset import Dataset, EvalSplit, Triplets
from crn_jax.input_pipeline.tokenizers import base as tokenizers
from crn_jax.methods import registry
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.retrieval import kept_features
from crn_jax.retrieval.encode import Encoded
from crn_jax.workdir import checkpoint, history, run, weights
from crn_jax.workdir.interrupt import Interrupted
from crn_jax.workdir.progress import Progress
from tests import small_towers, tiny, tiny_towers
from tests.catalogue import made

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

N = 20  # Pictures of a catalogue.
# Of cosines, some roundings of float32 (1.2e-7 at 1): other batches are summed in another order.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tiny.draw(tmp_path_factory.mktemp("drawn"))


def configured(root, preset: str = "clip4cir"):
  config = tiny_towers.config(root, preset)
  config.log_every_steps = 1
  return config


@pytest.fixture(scope="module", params=["clip4cir", "bank"])
def finished(request, quick_compile, root, tmp_path_factory):
  """A finished run of both trainings: preset, folder, what was shown."""
  del quick_compile
  workdir = tmp_path_factory.mktemp("run") / "a"
  return request.param, workdir, train.train(configured(root, request.param), workdir)


def last_state(workdir: pathlib.Path):
  step = max(checkpoint.steps(workdir / "checkpoints"))
  return ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / "default")


def test_both_trainings_leave_their_files(finished):
  preset, workdir, shown = finished
  for folder in (workdir, workdir / "towers"):
    for name in ("config.json", "vocab.json", "eval.json", "report.html", "pictures"):
      assert (folder / name).exists(), name
    assert json.loads((folder / "eval.json").read_text())["checkpoint_step"] == 4
  parts = {"clip4cir": "combiner", "bank": "text"}
  for folder, part in ((workdir, parts[preset]), (workdir / "towers", "towers")):
    _, totals = history.read(folder).series(f"train/{part}/total")
    assert np.isfinite(totals).all()
  assert "retrieval_dress.png" in shown


def test_what_comes_after_learns_on_the_best_towers(finished, root):
  preset, workdir, _ = finished
  config = configured(root, preset)
  folder = stages.towers(config, workdir)
  assert folder == str(workdir / "towers" / "weights")
  method = registry.create(config, tiny_towers.VOCAB_SIZE)
  towers = state.towers(method, folder)
  step = weights.read_metadata(folder)["source"]["step"]
  with checkpoint.Checkpoints(workdir / "towers" / "checkpoints") as checkpoints:
    assert step == checkpoints.best_step()
  saved = ocp.StandardCheckpointer().restore(
    workdir / "towers" / "checkpoints" / str(step) / "default"
  )["params"]["towers"]["encoder"]
  jax.tree.map(np.testing.assert_array_equal, towers, saved)
  digests = json.loads((workdir / "towers.json").read_text())
  for kind, digest in digests.items():
    names = {"image": ("image", "image_projection"), "text": ("text", "text_projection")}[kind]
    assert digest == kept_features.digest({name: towers[name] for name in names})


def test_starting_it_again_trains_no_further(finished, root, monkeypatch):
  preset, workdir, shown = finished
  monkeypatch.setattr(Progress, "stepped", None)
  assert train.train(configured(root, preset), workdir) == shown


def test_it_has_no_names_in_pytorch_and_says_so(finished, tmp_path):
  preset, workdir, _ = finished
  with pytest.raises(UserError, match=f"is a run of the method '{preset}'; exported are those of"):
    whole.export(workdir, tmp_path / "out")


@pytest.mark.parametrize("folder", ["", "towers"])
def test_a_catalogue_answers_as_the_runs_own_evaluation(finished, tmp_path, folder):
  compare_catalogue(finished[1] / folder, tmp_path)


def compare_catalogue(workdir, place) -> None:
  """Every picture with its score, of all sorts of queries; the elongated pictures are padded."""
  paths = [made.picture(place / "pictures" / f"{i}.png", i, (40, 90 + i)) for i in range(N)]
  texts = ["is red", "is blue with long sleeves", "no shirt and is more green"]
  split, found = evaluated(workdir, paths, texts)
  with Store(place / "a.db", create=True) as store:
    report = indexing.update(store, encoders.Encoders(model.load(workdir)), place / "pictures")
  assert (report.total, report.skipped) == (N, [])
  with Retriever.open(place / "a.db", batch_size=4) as retriever:
    for i, text in enumerate(texts):
      for vector, query in (
        (found.composed[i], {"image": paths[i], "text": text}),
        (found.composed[i], {"id": split.image_ids[i], "text": text}),
        (found.images[i], {"image": paths[i]}),
        (found.text_only[i], {"text": text}),
      ):
        hits = retriever.query(**query, k=N)
        scores = dict(zip(split.image_ids, found.images @ vector, strict=True))
        scores.pop(query.get("id"), None)  # No answer to its own query.
        assert {hit.id for hit in hits} == set(scores)
        expected = np.array([scores[hit.id] for hit in hits])
        np.testing.assert_allclose([h.score for h in hits], expected, rtol=0, atol=TOLERANCE)
        # The same ranking, but for what rounding alone tells apart.
        assert (np.diff(expected) <= 2 * TOLERANCE).all()


def evaluated(workdir, paths, texts) -> tuple[EvalSplit, Encoded]:
  """What the run's own evaluation makes of pictures and of queries, picture i with text i."""
  config = run.load_config(workdir)
  parallel = DataParallel.create("shard_map")
  words = tokenizers.load(workdir / "vocab.json")
  method = registry.create(config, len(words), AXIS)
  rows = np.arange(len(texts), dtype=np.int32)
  split = EvalSplit(
    "all",
    tuple(path.name for path in paths),
    tuple(map(str, paths)),
    Triplets(rows, rows, tuple((text,) for text in texts)),
    {"all": np.arange(len(paths), dtype=np.int32)},
  )
  dataset = Dataset("made", None, (split,))
  encoder = feature_training.encoder_of_run(method, parallel, dataset, words, workdir)
  variables = state.trained(method, workdir, state.chosen_step(workdir))
  return split, encoder.encode(parallel.replicate(variables), split, words)


def test_a_run_of_which_only_the_fine_tuning_is_there_names_what_can_be_asked(
  finished, root, tmp_path
):
  """Whether it was stopped before or while features were computed."""
  preset, workdir, _ = finished
  copy = shutil.copytree(workdir, tmp_path / "copy")
  shutil.rmtree(copy / "checkpoints")
  for _ in range(2):
    for ask in (
      lambda: model.load(copy),
      lambda: train.evaluate_run(configured(root, preset), copy, "best"),
    ):
      with pytest.raises(UserError, match=r"no checkpoint of its own yet.*/copy/towers, which is"):
        ask()
    (copy / "checkpoints").mkdir(exist_ok=True)
  assert model.load(copy / "towers").digest != model.load(workdir).digest


def test_a_run_without_its_towers_says_what_is_missing(finished, tmp_path):
  copy = shutil.copytree(finished[1], tmp_path / "copy")
  shutil.rmtree(copy / "towers")
  with pytest.raises(UserError, match=r"/copy/towers/weights: not found; the run in .*/copy works"):
    model.load(copy)


def test_evaluation_needs_no_training_data_and_repeats_the_results(finished, root, tmp_path):
  preset, workdir, _ = finished
  data = tmp_path / "data"
  shutil.copytree(root, data)
  for path in (data / "captions").glob("*.train.json"):
    path.unlink()
  for folder in (workdir, workdir / "towers"):
    config = configured(data, preset)
    if folder != workdir:
      config = stages.fine_tuning(config)
    before = json.loads((folder / "eval.json").read_text())
    train.evaluate_run(config, folder, "last")
    assert json.loads((folder / "eval.json").read_text()) == before


def signal_at(folder: str, step: int, stepped):
  """`Progress.stepped` that gets a SIGTERM after a step of one of the two trainings."""

  def signalled(self, metrics):
    stepped(self, metrics)
    part = next(iter(metrics)).partition("/")[0]
    if self._step == step and (part == "towers") == (folder == "towers"):
      os.kill(os.getpid(), signal.SIGTERM)

  return signalled


@pytest.mark.parametrize(("folder", "step"), [("towers", 1), ("towers", 2), ("towers", 4), ("", 2)])
def test_a_run_that_was_stopped_ends_with_the_same_state(finished, root, tmp_path, folder, step):
  """In either training: parameters, optimizer, losses, results, bit by bit."""
  preset, workdir, _ = finished
  stopped, config = tmp_path / "stopped", configured(root, preset)
  config.data.features = str(tmp_path / "features")  # Computed anew.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Progress, "stepped", signal_at(folder, step, Progress.stepped))
    with pytest.raises(Interrupted, match=f"stopped at step {step} by SIGTERM"):
      train.train(config, stopped)
  assert (stopped / "config.json").exists()  # The folder alone is enough to continue.
  train.train(config, stopped)
  for part in ("towers", ""):
    jax.tree.map(
      np.testing.assert_array_equal, last_state(workdir / part), last_state(stopped / part)
    )
    records = [
      {k: v for k, v in record.items() if k.endswith(("total", "grad_norm", "R@10", "step"))}
      for path in (workdir, stopped)
      for record in [history.read_records(path / part / "metrics.jsonl")[-1]]
    ]
    assert records[0] == records[1]
    results = [json.loads((f / part / "eval.json").read_text()) for f in (workdir, stopped)]
    assert results[0] == results[1]


def test_an_interruption_while_features_are_computed_costs_nothing(finished, root, tmp_path):
  preset, workdir, _ = finished
  stopped, config = tmp_path / "stopped", configured(root, preset)
  config.data.features = str(tmp_path / "features")
  original, calls = kept_features._write, []

  def write(path, rows):
    original(path, rows)
    calls.append(path)
    if len(calls) == 2:
      raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(kept_features, "_write", write)
    with pytest.raises(Interrupted, match="stopped at step 0 by SIGINT"):
      train.train(config, stopped)
  train.train(config, stopped)
  assert all(path.exists() for path in calls)
  jax.tree.map(np.testing.assert_array_equal, last_state(workdir), last_state(stopped))


def test_other_towers_in_the_place_of_a_runs_are_refused(finished, root, tmp_path):
  preset, workdir, _ = finished
  copy, config = tmp_path / "copy", configured(root, preset)
  shutil.copytree(workdir, copy)
  folder = copy / "towers" / "weights"
  method = registry.create(config, tiny_towers.VOCAB_SIZE)
  towers = state.towers(method, str(folder))
  towers["image_projection"]["kernel"] = towers["image_projection"]["kernel"] + 1
  weights.save_backbone(
    {"params": towers}, weights.read_metadata(folder), folder, force=True
  )  # fmt: skip
  for again in (
    lambda: train.train(config, copy),
    lambda: train.evaluate_run(config, copy, "last"),
    lambda: model.load(copy),
  ):
    with pytest.raises(UserError, match=r"features of other weights \(image tower\).*restore"):
      again()
  (copy / "towers.json").unlink()
  assert model.load(copy).digest != model.load(workdir).digest


def test_another_fine_tuning_in_the_same_folder_is_refused(finished, root):
  preset, workdir, _ = finished
  config = configured(root, preset)
  config.finetune.optimizer.learning_rate = 1e-2
  with pytest.raises(UserError, match=r"finetune.optimizer.learning_rate: 0.001 in the run, 0.01"):
    train.train(config, workdir)


def test_overwriting_trains_both_anew(finished, root, tmp_path):
  preset, workdir, _ = finished
  copy, config = tmp_path / "copy", configured(root, preset)
  shutil.copytree(workdir, copy)
  config.seed = 1
  config.num_epochs = config.finetune.num_epochs = 1
  train.train(config, copy, overwrite=True)
  for folder in (copy, copy / "towers"):
    assert json.loads((folder / "config.json").read_text())["seed"] == 1
    assert checkpoint.steps(folder / "checkpoints") == [2]


def test_towers_that_are_given_need_no_fine_tuning(finished, root, tmp_path):
  """The towers of one run, exported, are those of another."""
  preset, workdir, _ = finished
  config = configured(root, preset)
  config.finetune.num_epochs = 0
  config.model.pretrained = str(workdir / "towers" / "weights")
  with pytest.raises(UserError, match="no tokenizer in this folder"):  # Trained from words.
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def pretrained_towers(tmp_path_factory):
  """Folder of converted CLIP towers with a tokenizer of their own."""
  folder = tmp_path_factory.mktemp("clip")
  small_towers.save("clip", folder / "published")
  backbone.convert(folder / "published", folder / "converted")
  return str(folder / "converted")


def on_pretrained(root, preset: str, folder: str):
  """A configuration as main.py describes it from the folder of the towers."""
  config = default.get_config(preset)
  config.data.update(root=str(root), category="dress", features=str(root / "features"))
  config.model.pretrained = folder
  config.num_epochs, config.batch_size = 1, 16
  config.finetune.num_epochs = min(config.finetune.num_epochs, 1)
  config.finetune.batch_size = config.eval.batch_size = 16
  pretrained.describe(config)
  return config


def test_pretrained_towers_are_fine_tuned_and_what_is_left_is_a_folder_of_towers(
  pretrained_towers, root, tmp_path
):
  """clip4cir from published weights; then a bank, and no training at all, on its towers."""
  train.train(on_pretrained(root, "clip4cir", pretrained_towers), tmp_path / "clip4cir")
  folder = str(tmp_path / "clip4cir" / "towers" / "weights")
  config = on_pretrained(root, "bank", folder)
  assert config.model.encoder == on_pretrained(root, "bank", pretrained_towers).model.encoder
  assert stages.fine_tuning(config) is None
  train.train(config, tmp_path / "bank")
  assert not (tmp_path / "bank" / "towers").exists()
  config = on_pretrained(root, "bank", folder)
  config.method = "zero_shot"
  train.evaluate_run(config, tmp_path / "zero_shot", "last")
  results = {
    name: json.loads((tmp_path / name / "eval.json").read_text())["by_query"]
    for name in ("clip4cir", "clip4cir/towers", "bank", "zero_shot")
  }
  # The towers that were exported are those that were evaluated, whichever method asks them.
  assert results["zero_shot"] == results["clip4cir/towers"]
  for name, found in results.items():
    assert found["image_only"] == results["zero_shot"]["image_only"], name
  assert results["clip4cir"]["text_only"] == results["zero_shot"]["text_only"]
  # The text tower of the bank starts there.
  start = state.initial_variables(registry.create(config_of_bank(config), 1), folder)["params"]
  towers = state.towers(registry.create(config, 1), folder)
  jax.tree.map(
    np.testing.assert_array_equal,
    start["text"]["encoder"],
    {name: towers[name] for name in ("text", "text_projection")},
  )

  for name in ("clip4cir", "bank"):
    compare_catalogue(tmp_path / name, tmp_path / f"of_{name}")


def config_of_bank(config):
  config = config.copy_and_resolve_references()
  config.method = "bank"
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"finetune.num_epochs": 0}, "finetune.num_epochs = 0: expected the folder of pretrained tow"),
    ({"finetune.batch_size": 1000}, "batch_size: expected 1 .. 40"),
    ({"finetune.batch_size": 12}, "batch_size = 12: expected a multiple of the number of devices"),
    ({"finetune.optimizer.betas": (0.9,)}, "finetune.optimizer.betas .*: expected two numbers"),
    ({"clip4cir.dropout": 1.0}, "clip4cir.dropout = 1.0: expected a number of 0 or more, below 1"),
    ({"data.max_ratio": 0.5}, "data.max_ratio = 0.5: expected a number of 1 or more"),
    ({"data.prepared": "x"}, "data.prepared = 'x', data.max_ratio = 1.25: expected ''"),
    ({"model.encoder.text.vocab_size": 20}, "vocab_size = 20: the captions have"),
    ({"model.encoder.text.end_id": 5}, "expected pooling 'end', end_id 3 and data.markers 'tok"),
    ({"data.max_words": 30}, "data.max_words = 30: expected 20 or less"),
  ],
)
def test_what_cannot_work_is_said_before_anything_is_written(root, tmp_path, changes, message):
  config = configured(root)
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", presets.TOWER_PRESETS)
def test_presets_have_the_published_settings(preset):
  config = default.get_config(preset)
  assert (config.preset, config.method) == (preset, preset)
  optimizer, first = config.optimizer, config.finetune.optimizer
  if preset == "bank":
    assert (config.batch_size, config.num_epochs, config.bank.temperature) == (256, 3, 0.02)
    assert (optimizer.algorithm, optimizer.learning_rate) == ("adamw", 2e-5)
    assert config.finetune.num_epochs == 0
  else:
    assert (config.batch_size, config.num_epochs, config.clip4cir.dropout) == (4096, 300, 0.5)
    assert (optimizer.algorithm, optimizer.learning_rate, optimizer.weight_decay) == (
      "adam", 2e-5, 0.0
    )  # fmt: skip
    assert config.finetune.batch_size == 128
    assert (first.algorithm, first.learning_rate, first.betas, first.epsilon) == (
      "adamw", 2e-6, (0.9, 0.999), 1e-7
    )  # fmt: skip
  assert (config.data.captions, config.data.max_ratio) == ("mixed", 1.25)


def test_the_training_before_has_its_own_settings_and_no_other():
  config = tiny_towers.config("nowhere", "clip4cir")
  config.finetune.update(num_epochs=7, batch_size=24, evaluate_every_epochs=3)
  config.finetune.optimizer.learning_rate = 0.5
  first = stages.fine_tuning(config)
  configuration.check(first)
  assert first.method == "fine_tuning"
  assert (first.num_epochs, first.batch_size, first.eval.every_epochs) == (7, 24, 3)
  assert first.optimizer.learning_rate == 0.5
  assert first.data.to_dict() == config.data.to_dict()
  assert stages.fine_tuning(first) is None
  assert config.finetune.num_epochs == 7  # Unchanged.


def test_what_is_due_within_steps_done_at_once_is_due_behind_them():
  plan = train.Plan(
    steps_per_epoch=4, stride=4, total_steps=40, evaluate_every=20, save_every=6, log_every=10
  )
  calls = range(4, 41, 4)
  assert [step for step in calls if plan.evaluates(step)] == [20, 40]
  assert [step for step in calls if plan.saves(step)] == [8, 12, 20, 24, 32, 36, 40]
  assert [step for step in calls if plan.logs(step)] == [8, 12, 20, 24, 32, 36, 40]
  one = train.Plan(4, 1, 40, 20, 6, 10)
  assert [step for step in range(1, 41) if one.saves(step)] == [6, 12, 18, 20, 24, 30, 36, 40]


def test_progress_counts_steps_done_at_once():
  config = tiny_towers.config("unused", "clip4cir")
  with Progress(config, 8, 40, 4, 4) as progress:
    for total in (1.0, np.nan):
      progress.stepped({"combiner/total": np.float32(total)})
    with pytest.raises(UserError, match="step 16: combiner/total not finite"):
      progress.read(DataParallel.create("shard_map"), [8])
