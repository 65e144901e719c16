"""The command line: one line for what the user can mend, runs by their folder alone."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from crn_jax import command_line
from crn_jax.errors import UserError
from crn_jax.workdir import run
from tests import made_up, tiny

REPOSITORY = pathlib.Path(__file__).parents[1]
MAIN = REPOSITORY / "main.py"
CONFIGS = REPOSITORY / "configs"

# Runs main.py and says which of the slow packages it started.
WATCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
  runpy.run_path(sys.argv[0], run_name="__main__")
finally:
  print("STARTED", *sorted({"jax", "tensorflow", "flax", "orbax"} & set(sys.modules)))
"""


# A training whose step is compiled for ever, and that fails meanwhile.
ENDLESS = """
import runpy, sys, threading
from crn_jax.errors import UserError
from crn_jax.methods.crn import CRN
from crn_jax.workdir.checkpoint import Checkpoints

begun = threading.Event()

def train_step(*_):
  begun.set()
  threading.Event().wait()

def check_space(*_):
  begun.wait()
  raise UserError("no room")

CRN.train_step, Checkpoints.check_space = train_step, check_space
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(*options, folder, interpreter=(), **environment):
  """A process of main.py in a folder of its own."""
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""} | environment
  return subprocess.Popen(
    [sys.executable, *interpreter, str(MAIN), *options],
    cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def finished(process) -> tuple[int, str, str]:
  """Exit status, standard output and error."""
  out, error = process.communicate()
  return process.returncode, out, error


class TestOneLine:
  """Whole programs; what they say is looked at more closely below."""

  @pytest.mark.parametrize(
    ("options", "message"),
    [
      ([], "--mode=train needs --config, e.g. --config=configs/demo.py, or --workdir with"),
      (["--mode=eval"], "--mode=eval needs --config, .*, or --workdir with the folder of a run"),
      (["--mode=prepare"], "--mode=prepare needs --config, e.g. --config=[^ ]*$"),
      (["--mode=plan", "--workdir=x"], "--workdir has no meaning with --mode=plan; it is for"),
      (["--mode=compare", "--process=1"], "--process has no meaning with --mode=compare; .*eval"),
      (["--mode=search", "--workdir=x"], "--workdir has no meaning with --mode=search; it is for"),
      (["--mode=index", "--nojson", "--k=3"], "--k has no meaning with --mode=index; .*=search$"),
      (
        [f"--config={CONFIGS}/demo.py", "--mode=eval", "--overwrite"],
        "--overwrite has no meaning with --mode=eval; it is for --mode=train",
      ),
      (["--mode=evla"], "--mode=evla: value should be one of <train"),
      (["--workdri=x"], "'workdri'. Did you mean: workdir"),
      (["configs/demo.py"], r"unknown arguments \['configs/demo.py'\]; options are written"),
      (["--config.batch_size=3"], "--config.batch_size=3: needs a configuration"),
      (["--workdir=nowhere"], "nowhere/config.json: not found, so nowhere holds no run"),
      (["--config.bath_size=3", f"--config={CONFIGS}/demo.py"], "bath_size: .*mean batch_size"),
      ([f"--config={CONFIGS}/demo.py:crm"], "'crm' after the configuration's colon"),
      (
        [f"--config={CONFIGS}/demo.py", "--config.batch_size=abc"],
        "--config.batch_size=abc: expected an integer, 1 or more",
      ),
      ([f"--config={CONFIGS}/run.py:nowhere"], "nowhere/config.json: no run to take the"),
    ],
  )
  def test_a_command_that_cannot_be_read(self, options, message, tmp_path):
    status, out, error = finished(start(*options, folder=tmp_path))
    assert (status, out) == (1, "")
    (line,) = error.splitlines()
    assert re.search(f"^error: .*{message}", line), line
    assert not list(tmp_path.iterdir())

  @pytest.mark.parametrize("mode", ["train", "prepare"])
  def test_a_configuration_that_cannot_be_used(self, mode, tmp_path):
    """All its faults, a line each; nothing is read or written."""
    options = (
      f"--config={CONFIGS}/demo.py", f"--mode={mode}", "--config.num_epochs=0",
      "--config.model.backbone.depths=3", "--config.eval.recall_at=1",
    )  # fmt: skip
    status, out, error = finished(start(*options, folder=tmp_path))
    assert (status, out) == (1, "")
    assert "Traceback" not in error
    for name in ("num_epochs = 0", "model.backbone.depths = (3,)", "eval.recall_at = (1,)"):
      assert sum(name in line for line in error.splitlines()) == 1, name
    assert not list(tmp_path.iterdir())

  def test_what_no_model_would_read_is_not_prepared(self, tmp_path):
    config = tmp_path / "cropped.py"
    config.write_text(
      "from configs import demo\n\n\ndef get_config():\n  config = demo.get_config('clip4cir')\n"
      "  config.data.max_ratio = None\n  return config\n"
    )
    options = (f"--config={config}", "--mode=prepare", "--config.data.prepared=prepared")
    status, out, error = finished(start(*options, folder=tmp_path))
    assert (status, out) == (1, "")
    assert "error: data.prepared: prepared images are resized bilinear, this" in error
    assert {path.name for path in tmp_path.iterdir()} <= {config.name, "__pycache__"}

  def test_an_error_does_not_wait_for_the_step_that_is_being_compiled(self, tmp_path):
    config = tiny.config_file(tmp_path)
    process = start(f"--config={config}", folder=tmp_path, interpreter=("-c", ENDLESS))
    status, out, error = finished(process)
    assert status == 1
    assert "initial values: random" in out
    assert error.splitlines()[-1] == "error: no room"
    assert "Traceback" not in error

  def test_help_needs_no_configuration(self, tmp_path):
    status, out, _ = finished(start("--help", folder=tmp_path))
    assert status in (0, 1)  # absl's is 1.
    assert "--[no]overwrite" in out
    assert "other files stay" in re.sub(r"\s+", " ", out)


class TestConfigurationFile:
  @pytest.mark.parametrize(
    ("name", "message"),
    [
      ("nope.py", "nope.py: no such file; there are .*demo.py"),
      ("demo.pyy", "demo.pyy: no such file; did you mean .*configs/demo.py"),
      ("fashionq_dress.py", "did you mean .*fashioniq_dress.py"),
      (".", "is a folder, not a file"),
    ],
  )
  def test_a_file_that_is_not_there(self, name, message):
    check_refused(CONFIGS / name, message)

  @pytest.mark.parametrize(
    ("content", "message"),
    [
      ("# Title\n\nIt's a text.\n", "SyntaxError: .*line 3"),
      ("def get_config(:\n", "SyntaxError: .*line 1"),
      ("", "no configuration, as it defines no get_config"),
      ("import nowhere\n", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
      ("def get_config():\n  return {}['a']\n", "line 2: KeyError: 'a'"),
      ("def get_config():\n  raise ValueError('a\\nb')\n", "line 2: ValueError: a$"),
      ("def get_config():\n  raise OSError('disk')\n", "line 2: OSError: disk"),
      ("def get_config():\n  return 3\n", r"get_config\(\) gives a int, not a ConfigDict"),
    ],
  )
  def test_a_file_that_is_no_configuration(self, content, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(content)
    check_refused(path, message)

  def test_an_argument_that_it_does_not_take(self, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n  return 3\n")
    check_refused(f"{path}:crn", "TypeError: get_config")

  def test_a_binary_file(self, tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(bytes(range(256)))
    check_refused(path, "Error: ")

  def test_what_is_published(self):
    config = command_line.load(f"{CONFIGS}/demo.py:clvc_net", CONFIGS)
    assert config.name == "demo_clvc_net"


def check_refused(config, message):
  with pytest.raises(UserError) as error:
    command_line.load(str(config), CONFIGS)
  assert "\n" not in str(error.value)
  assert re.search(message, str(error.value)), str(error.value)


class TestFields:
  @pytest.mark.parametrize(
    ("option", "hint"),
    [
      ("--config.bath_size=3", "did you mean batch_size"),
      ("--config.model.backbne.depths=3", "did you mean model.backbone.depths"),
      ("-config.root=x", r"did you mean data.root\?"),
      ("--noconfig.keep_map", r"did you mean model.keep_map\?"),
      ("--config.seed.x=3", r"did you mean seed\?"),
      ("--config.eval.recall_at[0]=3", "did you mean eval.recall_at"),
      ("--config.keys=3", "configs/default.py has them all"),
      ("--config.=3", "configs/default.py has them all"),
    ],
  )
  def test_one_that_is_not_there(self, option, hint):
    argv = ["main.py", f"--config={CONFIGS}/demo.py", option]
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(sys, "argv", argv)
      with pytest.raises(SystemExit) as stop:
        command_line.parse(argv, CONFIGS)
    name = option.partition("config.")[2].partition("=")[0]
    assert re.fullmatch(
      f"error: --config.{re.escape(name)}: no such field; {hint}.*", stop.value.code
    )


class TestCompletedCommand:
  def complete(self, *options):
    program, *rest = command_line.complete(["main.py", *options], pathlib.Path("c"))
    assert program == "main.py"
    return rest

  @pytest.mark.parametrize("config", [("--config=a.py",), ("-config=a.py",), ("--config", "a.py")])
  def test_the_configuration_comes_first(self, config):
    """Before what overrides its fields; and it is what was named, not the run's."""
    rest = ["--config.seed=3", "--workdir=nowhere"]
    assert self.complete(*rest, *config) == [*config, *rest]

  @pytest.mark.parametrize(
    "mode", [(), ("--mode=eval",), ("--mode", "eval"), ("-mode=train",), ("--mode=submit",)]
  )
  @pytest.mark.parametrize("form", ["--workdir={}", "-workdir={}", "--workdir {}"])
  def test_a_runs_own_is_taken_unless_one_is_named(self, mode, form, tmp_path):
    run.write_json({}, tmp_path / "config.json")
    options = [*mode, *form.format(tmp_path).split(), "--config.data.root=x"]
    assert self.complete(*options) == [f"--config=c/run.py:{tmp_path}", *options]

  @pytest.mark.parametrize("mode", ["compare", "prepare"])
  def test_other_modes_take_no_run(self, mode):
    assert self.complete(f"--mode={mode}", "--workdir=x") == [f"--mode={mode}", "--workdir=x"]

  def test_home_folder(self, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run.write_json({}, tmp_path / "config.json")
    assert self.complete("--workdir=~")[0] == "--config=c/run.py:~"
    run.write_json({"method": 3}, tmp_path / "config.json")
    with pytest.raises(flags.IllegalFlagValueError, match=f"^{tmp_path}/config.json: "):
      command_line.load(f"{CONFIGS}/run.py:~", CONFIGS)


def test_the_command_that_continues_does_not_begin_anew(monkeypatch):
  called = ["/opt/my env/bin/python3", "-X", "dev", "a/main.py", "--workdir=my run", "--overwrite",
            "-overwrite=true", "--config.data.root=x;y"]  # fmt: skip
  monkeypatch.setattr(sys, "orig_argv", called)
  assert command_line.again() == (
    "'/opt/my env/bin/python3' -X dev a/main.py '--workdir=my run' '--config.data.root=x;y'"
  )


def test_overwriting_says_what_is_lost(tmp_path):
  assert command_line.loss(tmp_path / "new") == f"--overwrite: {tmp_path / 'new'} holds no run yet"
  for name in ("config.json", "eval.json", "notes.txt"):
    (tmp_path / name).write_text("{}")
  for step in (5, 10):
    (tmp_path / "checkpoints" / str(step) / "default").mkdir(parents=True)
  shown = command_line.loss(tmp_path)
  assert f"{tmp_path} is removed: checkpoints (steps 5, 10), config.json, eval.json;" in shown
  assert "notes.txt" not in shown
  run.remove(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_comparing_runs_starts_neither_jax_nor_tensorflow(tmp_path):
  data = made_up.dataset(made_up.split(tmp_path))
  for name in ("a", "b"):
    config = made_up.config()
    results = made_up.evaluation(config, data).results.to_json()
    (tmp_path / name).mkdir()
    run.save_config(config, tmp_path / name)
    run.write_json(results, tmp_path / name / "eval.json")
    (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0}\n')
  process = start(
    "--mode=compare", "--workdirs=~/a,~/b", "--workdir=~/out",
    folder=tmp_path, interpreter=("-c", WATCH), HOME=str(tmp_path),
  )  # fmt: skip
  status, out, error = finished(process)
  assert status == 0, error
  assert out.splitlines()[-1].split() == ["STARTED"]
  assert (tmp_path / "out" / "compare.html").exists()


CONFIG = """
from tests import tiny

def get_config():
  config = tiny.config({root!r})
  config.num_epochs = 20
  config.eval.every_epochs = 20
  config.log_every_steps = 1
  # As little to compile as can be.
  config.update_mode = "simultaneous"
  config.loss.modification = config.loss.auxiliary = 0.0
  return config
"""


@pytest.mark.slow
def test_a_run_goes_on_and_is_evaluated_by_its_folder_alone(tmp_path):
  """Begun in the place of another, stopped, continued; evaluated where its data have moved to."""
  home, run_folder = tmp_path / "home", tmp_path / "home" / "my run"
  run_folder.mkdir(parents=True)
  run.write_json({"old": True}, run_folder / "config.json")
  root = tiny.draw(home)
  config = tmp_path / "config.py"
  config.write_text(CONFIG.format(root="nowhere"))
  quick = {
    "folder": tmp_path,
    "HOME": str(home),
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  process = start(
    f"--config={config}", "--workdir=~/my run", "--overwrite", "--config.data.root=~/data", **quick
  )
  while process.poll() is None and not (run_folder / "metrics.jsonl").exists():
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  status, out, error = finished(process)
  assert status == 128 + signal.SIGTERM, error
  assert f"the run in {run_folder} is removed: config.json; other files stay" in out
  assert error.splitlines()[-1].strip() == (
    f"{sys.executable} {MAIN} --config={config} '--workdir=~/my run' '--config.data.root=~/data'"
  )
  saved = json.loads((run_folder / "config.json").read_text())
  assert saved["data"]["root"] == str(root)  # As expanded.

  stopped_at = max(int(path.name) for path in (run_folder / "checkpoints").iterdir())
  epochs = stopped_at // 2 + 1
  status, out, error = finished(
    start("--workdir=~/my run", f"--config.num_epochs={epochs}", **quick)
  )
  assert status == 0, error
  assert f"continuing from the checkpoint at step {stopped_at}" in out
  saved["num_epochs"] = epochs
  assert json.loads((run_folder / "config.json").read_text()) == saved

  before = json.loads((run_folder / "eval.json").read_text())
  (run_folder / "eval.json").unlink()
  shutil.move(root, home / "moved")
  status, out, error = finished(
    start("--mode=eval", "--checkpoint=last", "--workdir=~/my run", "--config.data.root=~/moved",
          **quick)
  )  # fmt: skip
  assert status == 0, error
  after = json.loads((run_folder / "eval.json").read_text())
  assert (after["checkpoint_step"], after["protocols"]) == (2 * epochs, before["protocols"])


def test_free_fields_are_those_of_the_docs():
  text = (REPOSITORY / "docs" / "runs.md").read_text(encoding="utf-8")
  (sentence,) = re.findall(r"Only these fields may\s+change: (.*?)\.\s", text, re.DOTALL)
  assert tuple(re.findall(r"`([\w.]+)`", sentence)) == run.FREE_FIELDS
