"""What a work directory says about itself: the configuration and the data it was made with."""

import json
import os
import pathlib

import ml_collections

from crn_jax.input_pipeline.dataset import Dataset
from crn_jax.workdir import files

# Fields that do not change what a step computes, and so may differ when a run is continued.
FREE_FIELDS = (
  "log_every_steps",
  "checkpoint_every_steps",
  "num_epochs",
  "parallel.mode",
  "data.root",
  "data.cache_images",
  "data.prepared",  # The pixels are the same.
  "data.on_missing",  # If other triplets remain, `check_data` refuses to continue.
)


def free_fields(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """`FREE_FIELDS`, less the number of epochs where the learning rate depends on it."""
  fixed = {"num_epochs"} if config.optimizer.schedule == "cosine" else set()
  return tuple(field for field in FREE_FIELDS if field not in fixed)


def save_config(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> None:
  """Writes config.json."""
  write_json(as_json(config), pathlib.Path(workdir) / "config.json")


def load_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """The configuration of an existing run."""
  return ml_collections.ConfigDict(_read_json(pathlib.Path(workdir) / "config.json"))


def save_data(dataset: Dataset, workdir: str | os.PathLike) -> None:
  """Writes data.json: what `check_data` and `known_digest` need."""
  facts = {"fingerprint": dataset.fingerprint, "image_digest": dataset.image_digest}
  write_json(facts, pathlib.Path(workdir) / "data.json")


def known_digest(workdir: str | os.PathLike) -> str | None:
  """Digest of the images that this run has found readable, or None; see `open_dataset`."""
  return _saved_data(workdir).get("image_digest")


def check_data(dataset: Dataset, workdir: str | os.PathLike) -> None:
  """Raises ValueError if a run was begun with other training triplets than these."""
  saved = _saved_data(workdir).get("fingerprint", dataset.fingerprint)
  if saved != dataset.fingerprint:
    raise ValueError(
      f"{workdir}: the training triplets are not those that this run was begun with, so it cannot "
      f"be continued exactly. Restore the data (were images skipped, or fetched since?), or choose "
      f"another --workdir"
    )


def write_json(content: dict, path: pathlib.Path) -> None:
  """Writes a file that appears complete or not at all."""
  with files.replacing(path) as partial:
    partial.write_text(json.dumps(content, indent=2) + "\n")


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
  saved = flat(_read_json(path))
  wanted = flat(as_json(config))
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


def as_json(config: ml_collections.ConfigDict) -> dict:
  """The configuration as config.json holds it."""
  return json.loads(config.to_json_best_effort())


def flat(tree: dict, prefix: str = "") -> dict:
  """A nested configuration as {"data.root": value}."""
  fields = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      fields |= flat(value, f"{prefix}{name}.")
    else:
      fields[prefix + name] = value
  return fields


def _saved_data(workdir: str | os.PathLike) -> dict:
  path = pathlib.Path(workdir) / "data.json"
  return _read_json(path) if path.exists() else {}


def _read_json(path: pathlib.Path) -> dict:
  try:
    return json.loads(path.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path}: not valid JSON ({error}); restore it or choose another --workdir"
    ) from error
