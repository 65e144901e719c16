"""Trains, evaluates, compares and plans models, checks data, searches one's own pictures.

main.py --config=configs/demo.py; --help lists the modes.
"""

import functools
import os
import pathlib
import sys

# Before TensorFlow is first imported: its start-up notices are of no use to anybody here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from absl import app, flags, logging
from ml_collections import config_flags

from crn_jax import cluster, command_line
from crn_jax.catalogue import command_line as catalogue
from crn_jax.errors import UserError
from crn_jax.workdir.interrupt import Interrupted

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Configuration file, with a preset after a colon: configs/demo.py:crn_released. Not needed to "
  "continue or evaluate the run in --workdir, which has its own.",
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "submit", "compare", "prepare", "plan", *catalogue.MODES],
  "What to do.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; default runs/<config.name>, of --mode=compare runs/compare."
)
_WORKDIRS = flags.DEFINE_list("workdirs", [], "Folders of the runs that --mode=compare compares.")
_CHECKPOINT = flags.DEFINE_enum(
  "checkpoint", "best", ["best", "last"], "Checkpoint of --mode=eval and --mode=submit."
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite",
  False,
  "Remove the run in --workdir (checkpoints, records, results; other files stay) and train anew.",
)
_COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder for compiled programs, or 'none'; default: see docs/runs.md."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, to train or evaluate on several machines by hand."
)
_PROCESSES = flags.DEFINE_integer(
  "processes", None, "Number of processes on all machines; 1 is alone, also on a cluster."
)
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")
_CARD = flags.DEFINE_string(
  "card", None, "GPU that --mode=plan compiles for without one, e.g. h100; see docs/runs.md."
)
_JSON = flags.DEFINE_bool("json", False, "Print what --mode=plan, index or search finds as JSON.")

_TOGETHER = ("train", "eval", "submit")  # Modes in which several processes take part.

# Flags that would be ignored in the other modes: who gives one expects something of it.
_ONLY_WITH = {
  "config": (*_TOGETHER, "prepare", "plan"),
  "workdir": (*_TOGETHER, "compare"),
  "workdirs": ("compare",),
  "checkpoint": ("eval", "submit"),
  "overwrite": ("train",),
  **dict.fromkeys(("coordinator", "processes", "process"), _TOGETHER),
  "card": ("plan",),
  "json": ("plan", "index", "search"),
  **catalogue.ONLY_WITH,
}


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO.
  with cluster.leaving_together():
    _main()


def _main():
  try:
    if text := _run(_MODE.value):
      print(text)
  except Interrupted as stop:
    command = command_line.again()
    print(f"{stop}, everything is saved. Continue with:\n  {command}", file=sys.stderr)
    raise SystemExit(128 + stop.signal) from None
  except (UserError, OSError) as error:
    # What the user can mend is said in the message; a traceback would bury it.
    raise SystemExit(f"error: {error}") from error


def _run(mode: str) -> str:
  command_line.check_flags(mode, _ONLY_WITH)
  # Imported here: comparing runs starts neither JAX nor TensorFlow.
  if mode == "compare":
    from crn_jax.reports import compare

    workdirs = [os.path.expanduser(workdir) for workdir in _WORKDIRS.value]
    return compare.compare(workdirs, _workdir("compare"))
  if mode in catalogue.MODES:
    return catalogue.run(mode, _COMPILATION_CACHE.value, as_json=_JSON.value)
  config = _CONFIG.value
  if config is None:
    of_run = ", or --workdir with the folder of a run" if mode in _TOGETHER else ""
    raise UserError(f"--mode={mode} needs --config, e.g. --config=configs/demo.py{of_run}")
  from crn_jax import configuration, pretrained, xla

  place = None
  if mode in _TOGETHER:
    place = cluster.find(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
  if place is not None:
    xla.tune_alone()
    cluster.join(place, command_line.again())
  if config.deterministic_ops:
    xla.exclude_nondeterministic_ops()
  configuration.expand_paths(config)
  pretrained.describe(config)
  if mode == "prepare":
    from crn_jax.input_pipeline import prepare

    configuration.check(config)
    if config.data.prepared:
      from crn_jax.methods import registry

      registry.create(config, vocab_size=1)  # Refuses images that are not resized as it wants them.
    return prepare.prepare(config, functools.partial(pretrained.new_tokenizer, config))
  from crn_jax import compilation_cache

  compilation_cache.enable(_COMPILATION_CACHE.value)
  if mode == "plan":
    from crn_jax import plan

    configuration.check(config)
    return plan.plan(config, card=_CARD.value, as_json=_JSON.value)
  from crn_jax import train

  workdir = _workdir(config.name)
  if mode == "eval":
    return train.evaluate_run(config, workdir, _CHECKPOINT.value)
  if mode == "submit":
    from crn_jax import submit

    return submit.submit(config, workdir, _CHECKPOINT.value)
  from crn_jax import processes

  if _OVERWRITE.value:
    processes.say(command_line.loss(workdir))
  return train.train(config, workdir, overwrite=_OVERWRITE.value)


def _workdir(name: str) -> str:
  return os.path.expanduser(_WORKDIR.value or os.path.join("runs", name))


if __name__ == "__main__":
  configs = pathlib.Path(__file__).parent / "configs"
  app.run(main, flags_parser=functools.partial(command_line.parse, configs=configs))
