"""convert_torch_weights.py as a program: paths, errors, what it imports."""

import os
import pathlib
import subprocess
import sys

import pytest
import safetensors.numpy

from tests.convert import small_swin

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments, home) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, ROOT / "convert_torch_weights.py", *arguments],
    cwd=ROOT, env=os.environ | {"HOME": str(home)}, capture_output=True, text=True,
  )  # fmt: skip


@pytest.fixture
def home(tmp_path):
  tensors = small_swin.timm_state_dict(small_swin.params())
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  return tmp_path


def test_home_is_expanded_in_every_path(home):
  done = run("--input=~/model.safetensors", "--output=~/weights", home=home)
  assert not done.returncode, done.stderr
  assert f"recognised {home}/model.safetensors" in done.stdout and (home / "weights").is_dir()
  done = run("--input=~/a,~/b", "--output=~/out", home=home)
  assert f"error: {home}/a: not found" in done.stderr
  done = run("--export=~/run", "--output=~/out", home=home)
  assert f"error: {home}/run/config.json: not found" in done.stderr


def test_errors_of_users_are_one_message(home):
  for arguments, told in (
    (["--input=~/none", "--output=~/out"], f"error: {home}/none: not found\n"),
    (["--input=~/model.safetensors", "--output=~/model.safetensors/out"], "error: [Errno "),
  ):
    done = run(*arguments, home=home)
    assert done.returncode == 1 and told in done.stderr
    assert "Traceback" not in done.stderr


def test_faults_of_the_program_keep_their_traceback(home):
  program = (
    "import convert_torch_weights as program\n"
    "from absl import flags\n"
    "from crn_jax.convert import whole\n"
    "def fail(_): raise ValueError('a fault')\n"
    "whole.paths_of = fail\n"
    "flags.FLAGS(['program', '--input=a', '--output=b'])\n"
    "program.main(['program'])\n"
  )
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
  assert "Traceback" in done.stderr and "ValueError: a fault" in done.stderr


def test_options_are_read_without_jax():
  program = "import sys, convert_torch_weights; sys.exit('jax' in sys.modules)"
  subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
