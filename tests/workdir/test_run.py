import json

import pytest

from configs import default
from crn_jax.input_pipeline.dataset import Dataset
from crn_jax.workdir import run


def check(config, workdir):
  run.check_config(config, workdir, run.free_fields(config))


def test_a_new_folder_accepts_any_configuration(tmp_path):
  check(default.get_config(), tmp_path)


def test_the_same_configuration_continues_a_run(tmp_path):
  run.save_config(default.get_config(), tmp_path)
  config = default.get_config()
  config.data.root = "elsewhere"
  config.log_every_steps = 1
  check(config, tmp_path)


def test_another_configuration_is_refused_with_the_differences(tmp_path):
  run.save_config(default.get_config(), tmp_path)
  config = default.get_config()
  config.optimizer.learning_rate = 1e-4
  with pytest.raises(ValueError) as error:
    check(config, tmp_path)
  assert "optimizer.learning_rate: 3e-05 in the run, 0.0001 now" in str(error.value)
  assert "Only these may change: log_every_steps, checkpoint_every_steps" in str(error.value)


def test_more_epochs_are_allowed_unless_the_learning_rate_depends_on_them(tmp_path):
  config = default.get_config()
  run.save_config(config, tmp_path)
  config.num_epochs += 1
  check(config, tmp_path)
  config.optimizer.schedule = "cosine"
  run.save_config(config, tmp_path)
  config.num_epochs += 1
  with pytest.raises(ValueError, match="num_epochs: 51 in the run, 52 now"):
    check(config, tmp_path)


def test_damaged_configuration_file_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json: not valid JSON"):
    check(default.get_config(), tmp_path)


def dataset(fingerprint):
  return Dataset("x", None, (), image_digest="images", fingerprint=fingerprint)


def test_other_training_data_are_refused(tmp_path):
  run.check_data(dataset("a"), tmp_path)
  run.save_data(dataset("a"), tmp_path)
  run.check_data(dataset("a"), tmp_path)
  assert run.known_digest(tmp_path) == "images"
  with pytest.raises(ValueError, match="not those that this run was begun with"):
    run.check_data(dataset("b"), tmp_path)


def test_a_file_is_written_whole(tmp_path):
  run.write_json({"a": 1}, tmp_path / "eval.json")
  assert json.loads((tmp_path / "eval.json").read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]
