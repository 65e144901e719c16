"""What a work directory says about itself: the configuration and the data it was made with."""

import json
import os
import pathlib
import shutil

import ml_collections

from crn_jax.errors import UserError
from crn_jax.workdir import files

# Fields that do not change what a step computes, and so may differ when a run is continued.
FREE_FIELDS = (
  "log_every_steps",
  "checkpoint_every_steps",
  "profile_steps",
  "num_epochs",
  "eval",
  "parallel.mode",
  "deterministic_ops",
  "model.remat",
  "data.root",
  "data.cache_images",
  "data.prepared",  # The pixels are the same.
  "data.features",
  "data.on_missing",  # If other triplets remain, `check_data` refuses to continue.
)

# Those that say on what data another evaluation is made.
_DATA_FIELDS = ("name", "data.dataset", "data.category", "data.captions", "data.shoes_pairs")

# Fields that are newer than some runs, and what those runs did. Each by its full name: a group may
# be older than a field in it.
_ADDED = {
  "method": "crn",
  "profile_steps": [],
  "model.backbone.mean": None,
  "model.backbone.std": None,
  "model.backbone.interpolation": None,
  "model.remat": "none",
  "model.precision": "default",
  "deterministic_ops": False,
  "data.max_ratio": None,
  "data.features": "features",
  "model.composition": None,
  "model.text_encoder": "lstm",
  "loss.triplet": 0.0,
  "loss.correction": 0.0,
  "loss.joint": 0.0,
  "single.margin": 0.2,
  "optimizer.algorithm": "adam",
  "optimizer.momentum": 0.9,
  "optimizer.betas": [0.9, 0.999],
  "optimizer.epsilon": 1e-8,
  "clip4cir.dropout": 0.5,
  "bank.temperature": 0.02,
  "finetune.num_epochs": 0,
  "finetune.batch_size": 128,
  "finetune.evaluate_every_epochs": 1,
  "finetune.optimizer.learning_rate": 3e-05,
  "finetune.optimizer.algorithm": "adam",
  "finetune.optimizer.momentum": 0.9,
  "finetune.optimizer.weight_decay": 1e-06,
  "finetune.optimizer.betas": [0.9, 0.999],
  "finetune.optimizer.epsilon": 1e-08,
  "finetune.optimizer.schedule": "step",
  "finetune.optimizer.decay_every_epochs": 20,
  "finetune.optimizer.decay_factor": 0.1,
  "finetune.optimizer.max_decay_epoch": 20,
  "finetune.optimizer.warmup_steps": 0,
  "finetune.optimizer.clip_norm": 0.0,
  "finetune.optimizer.logit_scale_rate": 1.0,
  "finetune.optimizer.backbone_rate": 1.0,
  "finetune.optimizer.ema_decay": 0.0,
  "zero_shot.query": "sum",
  "zero_shot.slerp_weight": 0.5,
}

# The run of the training before this one, see `stages`.
TOWERS = "towers"

# What a run leaves in its folder.
_WRITTEN = ("checkpoints", "damaged", "config.json", "vocab.json", "tokenizer", "data.json",
            "towers.json", TOWERS, "metrics.jsonl", "events.out.tfevents.*", "eval.json",
            "report.html", "pictures", "plugins", "other_data", "submission")  # fmt: skip


def free_fields(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """`FREE_FIELDS`, less the number of epochs where the learning rate depends on it."""
  fixed = {"num_epochs"} if config.optimizer.schedule == "cosine" else set()
  return tuple(field for field in FREE_FIELDS if field not in fixed)


def fields_free_to_evaluate(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> tuple[str, ...]:
  """`FREE_FIELDS`; on another data set than the run's, also what says which data those are."""
  return FREE_FIELDS + (_DATA_FIELDS if is_elsewhere(config, workdir) else ())


def is_elsewhere(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> bool:
  """Whether a configuration names another data set than that of the run in a folder."""
  return config.data.dataset != load_config(workdir).data.dataset


def save_config(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> None:
  """Writes config.json."""
  write_json(as_json(config), pathlib.Path(workdir) / "config.json")


def load_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """The configuration of an existing run."""
  return ml_collections.ConfigDict(_read_config(workdir))


def save_data(workdir: str | os.PathLike, *, fingerprint: str, image_digest: str) -> None:
  """Writes data.json: what `check_data` and `known_digest` need, see `Dataset`."""
  facts = {"fingerprint": fingerprint, "image_digest": image_digest}
  write_json(facts, pathlib.Path(workdir) / "data.json")


def known_digest(workdir: str | os.PathLike) -> str | None:
  """Digest of the images that this run has found readable, or None; see `open_dataset`."""
  return _saved_data(workdir).get("image_digest")


def check_data(fingerprint: str, workdir: str | os.PathLike) -> None:
  """Raises UserError if a run was begun with other training triplets than these."""
  if _saved_data(workdir).get("fingerprint", fingerprint) != fingerprint:
    raise UserError(
      f"{workdir}: the training triplets are not those that this run was begun with, so it cannot "
      f"be continued exactly. Restore the data (were images skipped, or fetched since?), or choose "
      f"another --workdir"
    )


def save_towers(digests: dict[str, str], workdir: str | os.PathLike) -> None:
  """Writes towers.json: kind of tower -> digest of the weights on whose features a run learns."""
  write_json(digests, pathlib.Path(workdir) / "towers.json")


def check_towers(digests: dict[str, str], workdir: str | os.PathLike) -> None:
  """Raises UserError if a run was begun on features of other weights than these."""
  path = pathlib.Path(workdir) / "towers.json"
  if path.exists() and (saved := _read_json(path)) != digests:
    changed = " and ".join(kind for kind in digests if saved.get(kind) != digests[kind])
    raise UserError(
      f"{workdir}: the run was begun on features of other weights ({changed} tower) than those "
      f"that are there now; restore the folder of weights, or choose another --workdir"
    )


def check_folder(workdir: str | os.PathLike) -> None:
  """Raises UserError unless a run can be written to this folder; nothing is written."""
  path = pathlib.Path(workdir).absolute()
  try:
    str(path).encode()
  except UnicodeEncodeError:
    raise UserError(
      f"{path!r}: the name is no UTF-8, which TensorBoard's and Orbax's files need; choose another "
      f"--workdir"
    ) from None
  there = next(p for p in (path, *path.parents) if p.exists())
  if not there.is_dir():
    raise UserError(f"{there}: is no folder; choose another --workdir")
  if not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f"{there}: cannot be written to; choose another --workdir")


def check_trained(workdir: str | os.PathLike) -> None:
  """Raises UserError unless the folder holds a trained run."""
  workdir = pathlib.Path(workdir)
  if _has_checkpoints(workdir / TOWERS) and not _has_checkpoints(workdir):
    raise UserError(
      f"{workdir}: holds no checkpoint of its own yet, only the fine-tuning of its towers; "
      f"continue with python main.py --workdir={workdir}, or name {workdir / TOWERS}, which is a "
      f"run as well: its queries are the sum of the features of image and text"
    )
  for name in ("config.json", "vocab.json", "checkpoints"):
    path = workdir / name
    if not path.exists():
      raise UserError(
        f"{path}: not found, so {workdir} holds no trained run. Name the folder of a run with "
        f"--workdir, or train one with --mode=train"
      )


def _has_checkpoints(workdir: pathlib.Path) -> bool:
  return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def written(workdir: str | os.PathLike) -> list[pathlib.Path]:
  """What a run has written to its folder, which may not be there."""
  return [path for pattern in _WRITTEN for path in sorted(pathlib.Path(workdir).glob(pattern))]


def remove(workdir: str | os.PathLike) -> None:
  """Removes everything that a run writes; other files stay."""
  for path in written(workdir):
    if path.is_dir():
      # At once out of the way: half of the checkpoints must not be taken for a run.
      removed = path.rename(path.with_name(f".{path.name}.removed"))
      shutil.rmtree(removed)
    else:
      path.unlink()


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
    UserError: lists the fields that differ.
  """
  if not (pathlib.Path(workdir) / "config.json").exists():
    return
  saved = flat(_read_config(workdir))
  wanted = flat(as_json(config))
  differences = [
    f"{name}: {saved.get(name, 'absent')!r} in the run, {wanted.get(name, 'absent')!r} now"
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
    and not any(name == field or name.startswith(field + ".") for field in free)
  ]
  if differences:
    raise UserError(
      f"{workdir} holds a run with another configuration:\n  "
      + "\n  ".join(differences)
      + "\nChoose another --workdir, or change these fields back to continue that run. "
      + f"Only these may change: {', '.join(free)}."
    )


def as_json(config: ml_collections.ConfigDict) -> dict:
  """The configuration as config.json holds it."""
  return json.loads(config.to_json_best_effort())


def settings(config: ml_collections.ConfigDict) -> dict:
  """The fields of a configuration as `flat`, less newer ones that say what older runs did.

  So they are the same for a run whatever version began it and reads it.
  """
  fields = flat(as_json(config)).items()
  return {name: value for name, value in fields if name not in _ADDED or value != _ADDED[name]}


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


def _read_config(workdir: str | os.PathLike) -> dict:
  """config.json, with the fields that are newer than it."""
  config = _read_json(pathlib.Path(workdir) / "config.json")
  for name, value in _ADDED.items():
    *groups, field = name.split(".")
    group = config
    for key in groups:
      group = group.setdefault(key, {})
    group.setdefault(field, value)
  return config


def _read_json(path: pathlib.Path) -> dict:
  mend = "restore it or choose another --workdir"
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:  # Malformed JSON or UTF-8.
    raise UserError(f"{path}: not valid JSON ({error}); {mend}") from error
  if not isinstance(content, dict):
    raise UserError(f"{path}: expected an object, found a {type(content).__name__}; {mend}")
  return content
