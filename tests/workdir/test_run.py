import json
import os

import pytest

from configs import default
from crn_jax.errors import UserError
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


def test_settings_are_the_same_whatever_version_began_the_run(tmp_path):
  """Fields that an old run does not have count only where they say something new."""
  config = default.get_config()
  config.model.remat = "none"  # The one whose default changed.
  new = run.settings(config)
  old = run.as_json(config)
  for name in run._ADDED:
    *groups, field = name.split(".")
    group = old
    for key in groups:
      group = group[key]
    del group[field]
  run.write_json(old, tmp_path / "config.json")
  assert run.settings(run.load_config(tmp_path)) == new
  assert new["model.feature_dim"] == config.model.feature_dim
  config.model.remat = "full"
  assert run.settings(config) == new | {"model.remat": "full"}


@pytest.mark.parametrize("name", run._ADDED)
def test_a_run_that_is_older_than_one_field_is_continued(name, tmp_path):
  config = default.get_config()
  config.model.remat = "none"  # The one whose default changed.
  run.save_config(config, tmp_path)
  old = json.loads((tmp_path / "config.json").read_text())
  *groups, field = name.split(".")
  group = old
  for key in groups:
    group = group[key]
  del group[field]
  run.write_json(old, tmp_path / "config.json")
  run.check_config(config, tmp_path, free=())
  assert (
    run.load_config(tmp_path).to_dict()
    == run.ml_collections.ConfigDict(run.as_json(config)).to_dict()
  )


def test_damaged_configuration_file_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json: not valid JSON"):
    check(default.get_config(), tmp_path)


def test_other_training_data_are_refused(tmp_path):
  run.check_data("a", tmp_path)
  run.save_data(tmp_path, fingerprint="a", image_digest="images")
  run.check_data("a", tmp_path)
  assert run.known_digest(tmp_path) == "images"
  with pytest.raises(ValueError, match="not those that this run was begun with"):
    run.check_data("b", tmp_path)


def test_a_file_is_written_whole(tmp_path):
  run.write_json({"a": 1}, tmp_path / "eval.json")
  assert json.loads((tmp_path / "eval.json").read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


def test_a_folder_whose_name_is_no_utf8_is_refused_before_anything_is_written(tmp_path):
  name = os.fsdecode(bytes(tmp_path) + b"/run\xff")
  with pytest.raises(UserError, match="is no UTF-8"):
    run.check_folder(name)
  assert not list(tmp_path.iterdir())
