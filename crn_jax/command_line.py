"""The command line of main.py: what is added to it, and errors in one line each.

Starts neither JAX nor TensorFlow unless a configuration is read.
"""

import importlib.util
import os
import pathlib
import re
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib.machinery import SourceFileLoader
from types import ModuleType

import ml_collections
from absl import flags

from crn_jax.errors import UserError

_OVERRIDE = r"--?(?:no)?config\.([^=]*)"


def parse(argv: list[str], configs: pathlib.Path) -> list[str]:
  """Parses flags, for `app.run(..., flags_parser=...)`.

  Args:
    argv: as `sys.argv`, which becomes what `complete` makes of it.
    configs: folder of the project's configurations.

  Returns:
    The program's name.

  Raises:
    SystemExit: with one line, if something is wrong.
  """
  try:
    # Flags that override fields of the configuration are looked for in sys.argv.
    sys.argv = argv = complete(flags.FLAGS.read_flags_from_files(argv, force_gnu=False), configs)
    if (config := _value(argv, "config")) is not None:
      _check_overrides(argv, load(config, configs))
    elif overrides := [arg for arg in argv[1:] if re.match(_OVERRIDE, arg)]:
      raise UserError(f"{overrides[0]}: needs a configuration, e.g. --config=configs/demo.py")
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise UserError(f"unknown arguments {rest[1:]}; options are written --name=value")
    return rest
  except (flags.Error, UserError, OSError) as error:
    raise SystemExit(f"error: {_in_words(error)}") from None


def complete(argv: list[str], configs: pathlib.Path) -> list[str]:
  """The same command line with the configuration first.

  If none is named, but the folder of a run that shall be continued, evaluated or submitted, it is
  the run's.

  Raises:
    UserError: if that folder holds no run.
  """
  spans = _spans(argv, "config")
  if spans:
    moved = [i for span in spans for i in span]
    rest = [arg for i, arg in enumerate(argv) if i not in moved]
    return [rest[0], *(argv[i] for i in moved), *rest[1:]]
  workdir = _value(argv, "workdir")
  if not workdir or _value(argv, "mode") not in (None, "train", "eval", "submit"):
    return argv
  saved = os.path.join(os.path.expanduser(workdir), "config.json")
  if not os.path.exists(saved):
    raise UserError(
      f"{saved}: not found, so {workdir} holds no run; name the folder of one with --workdir, or a "
      f"configuration with --config, e.g. --config=configs/demo.py"
    )
  return [argv[0], f"--config={configs / 'run.py'}:{workdir}", *argv[1:]]


def load(config: str, configs: pathlib.Path) -> ml_collections.ConfigDict:
  """The configuration that FILE or FILE:ARGUMENT stands for.

  Raises:
    UserError: if there is no such file, or it is no configuration.
    flags.Error: of the file itself, about the argument.
  """
  name, *argument = config.split(":", 1)
  path = pathlib.Path(name)
  if not path.is_file():
    from crn_jax.configuration import did_you_mean

    known = {p.stem: os.path.relpath(p) for f in (configs, path.parent) for p in f.glob("*.py")}
    what = "is a folder, not a file" if path.is_dir() else "no such file"
    hint = did_you_mean(path.stem, known) or f"; there are {', '.join(sorted(known.values()))}"
    raise UserError(f"--config={name}: {what}{hint}")
  try:
    found = _module(path)
    if not hasattr(found, "get_config"):
      raise UserError(f"--config={name}: no configuration, as it defines no get_config()")
    loaded = found.get_config(*argument)
  except (flags.Error, UserError):
    raise
  except Exception as error:  # Whatever the file's code does.
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == name]
    where = f", line {lines[-1]}" if lines else ""
    message = (str(error).splitlines() or [""])[0]
    raise UserError(f"--config={name}{where}: {type(error).__name__}: {message}") from error
  if not isinstance(loaded, ml_collections.ConfigDict):
    raise UserError(
      f"--config={name}: get_config() gives a {type(loaded).__name__}, not a ConfigDict"
    )
  return loaded


def check_flags(mode: str, only_with: Mapping[str, Sequence[str]]) -> None:
  """Raises UserError for a flag on the command line that has no meaning with the mode.

  Args:
    mode: the value of --mode.
    only_with: name of a flag -> modes that it has a meaning with; it has with all if not named.
  """
  for flag, modes in only_with.items():
    if flags.FLAGS[flag].present and mode not in modes:
      meant = ", ".join(f"--mode={other}" for other in modes)
      raise UserError(f"--{flag} has no meaning with --mode={mode}; it is for {meant}")


def again() -> str:
  """The command that continues this run: as it was called, less what would begin it anew."""
  return shlex.join(arg for arg in sys.orig_argv if not re.match(r"--?overwrite(=|$)", arg))


def loss(workdir: str | os.PathLike) -> str:
  """What --overwrite removes, for people to read."""
  from crn_jax.workdir import checkpoint, run

  names = [path.name for path in run.written(workdir)]
  if not names:
    return f"--overwrite: {workdir} holds no run yet"
  if steps := checkpoint.steps(pathlib.Path(workdir) / "checkpoints"):
    names[0] += f" (steps {', '.join(map(str, sorted(steps)))})"
  return (
    f"--overwrite: before training starts, the run in {workdir} is removed: {', '.join(names)}; "
    f"other files stay"
  )


def _module(path: pathlib.Path) -> ModuleType:
  """Runs a Python file, whatever it is called."""
  loader = SourceFileLoader("configuration_file", str(path))
  module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
  loader.exec_module(module)
  return module


def _check_overrides(argv: list[str], config: ml_collections.ConfigDict) -> None:
  """Raises UserError for --config.FIELD where FIELD is neither a field nor a group of fields."""
  from crn_jax import configuration
  from crn_jax.workdir import run

  fields = run.flat(config.to_dict())
  for arg in argv[1:]:
    match = re.match(_OVERRIDE, arg)
    if match and not any(f"{field}.".startswith(f"{match[1]}.") for field in fields):
      hint = configuration.did_you_mean(match[1], {field: field for field in fields})
      hint = hint or "; configs/default.py has them all"
      raise UserError(f"--config.{match[1]}: no such field{hint}")


def _in_words(error: Exception) -> str:
  """An error's message; of an unfit value of a field, with what was expected."""
  if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error)):
    from crn_jax.configuration import RULES

    if match[1] in RULES:
      expected = RULES[match[1]].expected.removesuffix(", or None")  # Which cannot be given here.
      return f"--config.{match[1]}={match[2]}: expected {expected}"
  return str(error)


def _spans(argv: list[str], name: str) -> list[tuple[int, ...]]:
  """Where a flag stands: the positions of --name=value, or of --name and value."""
  spans = []
  for i, arg in enumerate(argv[1:], 1):
    if arg == "--":
      break
    if re.match(rf"--?{name}=", arg):
      spans.append((i,))
    elif arg in (f"--{name}", f"-{name}") and i + 1 < len(argv):
      spans.append((i, i + 1))
  return spans


def _value(argv: list[str], name: str) -> str | None:
  """The value of a flag before flags are parsed; the last one counts."""
  spans = _spans(argv, name)
  if not spans:
    return None
  return argv[spans[-1][-1]] if len(spans[-1]) == 2 else argv[spans[-1][0]].partition("=")[2]
