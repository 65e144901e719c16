import pytest

from configs import default
from crn_jax import run


def test_a_new_folder_accepts_any_configuration(tmp_path):
  run.check_config(default.get_config(), tmp_path)


def test_the_same_configuration_continues_a_run(tmp_path):
  run.save_config(default.get_config(), tmp_path)
  config = default.get_config()
  config.data.root = "elsewhere"
  config.log_every_steps = 1
  run.check_config(config, tmp_path)


def test_another_configuration_is_refused_with_the_differences(tmp_path):
  run.save_config(default.get_config(), tmp_path)
  config = default.get_config()
  config.optimizer.learning_rate = 1e-4
  with pytest.raises(ValueError, match=r"optimizer.learning_rate: 3e-05 in the run, 0.0001 now"):
    run.check_config(config, tmp_path)


def test_damaged_configuration_file_is_named(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match="config.json: not valid JSON"):
    run.check_config(default.get_config(), tmp_path)
