"""The configuration of a run that is there: --config=configs/run.py:WORKDIR.

`python main.py --workdir=WORKDIR` without a configuration, to continue or (--mode=eval) to evaluate
a run, uses it by itself. With another --workdir, it begins another run of the same configuration.
"""

import os

import ml_collections
from absl import flags

from configs import default
from crn_jax.errors import UserError
from crn_jax.workdir import run


def get_config(workdir: str = "") -> ml_collections.ConfigDict:
  """config.json of a work directory, with the types of `configs/default.py`.

  Raises:
    flags.IllegalFlagValueError: if there is none, or not one; it reaches the terminal as one line.
  """
  path = os.path.join(os.path.expanduser(workdir), "config.json")
  try:
    if not workdir or not os.path.exists(path):
      raise UserError(
        f"{path if workdir else repr(workdir)}: no run to take the configuration from; name its "
        f"folder with --workdir, or a configuration with --config"
      )
    saved = run.load_config(os.path.dirname(path))
    config = default.get_config()
    _fill(config, saved.to_dict())
    return config
  except (UserError, TypeError) as error:  # TypeError: a value of another type than the default.
    prefix = f"{path}: " if isinstance(error, TypeError) else ""
    # Not a ValueError, to which the configuration's parser adds a traceback.
    raise flags.IllegalFlagValueError(f"{prefix}{error}") from error


def _fill(config: ml_collections.ConfigDict, saved: dict) -> None:
  """Puts saved values, JSON's lists as tuples, in the place of the defaults."""
  for name, value in saved.items():
    if isinstance(value, dict) and isinstance(config.get(name), ml_collections.ConfigDict):
      _fill(config[name], value)
    else:
      config[name] = tuple(value) if isinstance(value, list) else value
