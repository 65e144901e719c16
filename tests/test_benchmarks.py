"""The benchmarks of a device run where only JAX's libraries are installed, and count right."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import tiny

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]

# What an image of a rented machine lacks.
ABSENT = ("tensorflow", "tensorflow_datasets", "clu", "tensorboard", "transformers", "jinja2")


CRN = "from tests import tiny_model\n\n\ndef get_config():\n  return tiny_model.config()\n"
TOWERS = (
  "from tests import tiny_towers\n\n\ndef get_config():\n"
  "  return tiny_towers.config('nowhere', '{preset}')\n"
)


def run(tmp_path, name: str, *args, config: str = CRN) -> dict:
  (tmp_path / "tiny.py").write_text(config)
  for module in ABSENT:
    (tmp_path / f"{module}.py").write_text(f"raise ImportError('{module}')\n")
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
  done = subprocess.run(
    [sys.executable, str(ROOT / "benchmarks" / name), f"--config={tmp_path / 'tiny.py'}", *args],
    cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  (line,) = done.stdout.splitlines()
  return json.loads(line)


def test_a_step_is_measured(tmp_path):
  found = run(tmp_path, "train_step.py", "--steps=3", "--config.batch_size=8")
  assert found["batch_size"] == 8
  assert found["finite"]
  assert 0 < found["min_seconds"] <= found["median_seconds"]
  assert found["triplets_per_second"] == pytest.approx(8 / found["median_seconds"])
  assert found["share_of_products"] == pytest.approx(
    found["tflop_per_step"] / found["median_seconds"] / found["tflops_of_products"]
  )
  assert found["lower_seconds"] > 0 < found["compile_seconds"]
  assert found["stablehlo_lines"] > 1_000


@pytest.mark.parametrize("changes", [(), ("--config.finetune.num_epochs=0",)])
@pytest.mark.parametrize("preset", ["clip4cir", "bank"])
def test_a_step_of_towers_and_of_features_is_measured(tmp_path, preset, changes):
  config = TOWERS.format(preset=preset)
  found = run(tmp_path, "train_step.py", "--steps=1", *changes, config=config)
  assert found["finite"]
  assert found["share_of_products"] > 0


def test_encoding_by_towers_is_measured(tmp_path):
  config = TOWERS.format(preset="clip4cir")
  found = run(tmp_path, "inference.py", "--batch_size=4", "--repetitions=2", config=config)
  assert found["backbone"] == "clip"
  assert found["images_per_second"] > 0


def test_encoding_is_measured(tmp_path):
  found = run(tmp_path, "inference.py", "--batch_size=4", "--repetitions=2", "--notorch")
  assert (found["batch_size"], found["program"]) == (4, "crn_jax")
  assert found["images_per_second"] == pytest.approx(4 / found["median_seconds"])
  assert found["share_of_products"] > 0


def test_what_a_checkpoint_costs_is_measured(tmp_path):
  found = run(tmp_path, "checkpoints.py", "--saves=2", f"--folder={tmp_path}")
  for name in ("first_blocked", "blocked", "fetch", "until_written"):
    assert found[f"{name}_seconds"] > 0
  assert found["copied_on_device"]
  assert found["arrays"] > 100


def test_starting_is_measured(tmp_path):
  config = tiny.config_file(tmp_path)
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
         "PYTHONPATH": str(ROOT)}  # fmt: skip
  done = subprocess.run(
    [sys.executable, str(ROOT / "benchmarks" / "start.py"), f"--config={config}"],
    env=env, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  for start in (found["first"], found["second"]):
    assert start["seconds"] > 0
    assert start["processor_seconds"] > 0


def test_a_start_that_fails_is_no_measurement(tmp_path):
  done = subprocess.run(
    [sys.executable, str(ROOT / "benchmarks" / "start.py"), f"--config={tmp_path / 'none.py'}"],
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert "ended with status 1" in done.stderr
