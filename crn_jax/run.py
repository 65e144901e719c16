"""What a work directory says about itself: the configuration it was made with."""

import json
import os
import pathlib

import ml_collections

# Fields that do not change what a step computes, and so may differ when a run is continued.
FREE_FIELDS = (
  "log_every_steps",
  "checkpoint_every_steps",
  "num_epochs",
  "parallel.mode",
  "data.root",
  "data.cache_images",
)


def free_fields(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """`FREE_FIELDS`, less the number of epochs where the learning rate depends on it."""
  fixed = {"num_epochs"} if config.optimizer.schedule == "cosine" else set()
  return tuple(field for field in FREE_FIELDS if field not in fixed)


def save_config(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> None:
  """Writes config.json; the file appears complete or not at all."""
  path = pathlib.Path(workdir) / "config.json"
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(_as_json(config), indent=2) + "\n")
  os.replace(partial, path)


def check_config(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike, free: tuple[str, ...]
) -> None:
  """Compares a configuration with the one of an existing run; does nothing in a new folder.

  Args:
    config: the configuration asked for.
    workdir: folder of the run.
    free: dotted names of fields, or of groups of fields, that may differ.

  Raises:
    ValueError: lists the fields that differ.
  """
  path = pathlib.Path(workdir) / "config.json"
  if not path.exists():
    return
  try:
    saved = _flatten(json.loads(path.read_text()))
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}: not valid JSON ({error}); restore it or choose another --workdir"
    ) from error
  wanted = _flatten(_as_json(config))
  differences = [
    f"{name}: {saved.get(name, 'absent')!r} in the run, {wanted.get(name, 'absent')!r} now"
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
    and not any(name == field or name.startswith(field + ".") for field in free)
  ]
  if differences:
    raise ValueError(
      f"{workdir} holds a run with another configuration:\n  "
      + "\n  ".join(differences)
      + "\nChoose another --workdir, or change these fields back to continue that run. "
      + f"Only these may change: {', '.join(free)}."
    )


def _as_json(config: ml_collections.ConfigDict) -> dict:
  return json.loads(config.to_json_best_effort())


def _flatten(tree: dict, prefix: str = "") -> dict:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
