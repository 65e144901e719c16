"""Any file of weights of a backbone or of towers -> a folder for `model.pretrained`."""

import os
import pathlib

import numpy as np
from flax import traverse_util

from crn_jax.convert import dual_encoder, preprocessing, recognise
from crn_jax.convert import source as sources
from crn_jax.errors import UserError
from crn_jax.workdir import weights


def convert(source: str | os.PathLike, target: str | os.PathLike, *, force: bool = False) -> str:
  """Converts a backbone, or a pair of towers with its tokenizer.

  Args:
    source: file or folder, see `sources.read`.
    target: folder to write.
    force: whether an existing target may be replaced.

  Returns:
    What was recognised, left out and written, for people to read.

  Raises:
    UserError: no source, or a target that must not be replaced; the source is not readable, or not
      such weights, or what must stand beside them is missing.
  """
  check_target(target, force)
  said, metadata, flat, beside = _load(source)
  # In PyTorch's layout most are views of what was read. One at a time, so that memory holds one of
  # them twice, where Orbax would copy all of them at once; all, so that the file can be let go.
  for name in flat:
    flat[name] = np.array(flat[name], order="C")
  variables = traverse_util.unflatten_dict(flat)
  weights.save_backbone(variables, metadata, target, force=force, beside=beside)
  count = sum(x.size for name, x in flat.items() if name[0] == "params")
  written = (
    f"written {target}: {count:,} parameters; use it with --config.model.pretrained={target}"
  )
  return "\n".join([*said, written])


def _load(
  source: str | os.PathLike,
) -> tuple[list[str], dict, dict[tuple, np.ndarray], dict[str, pathlib.Path]]:
  """What is to be said of a file, metadata for it, its flat variables, and files beside them."""
  read = sources.read(source)
  kind, prefix = _recognise(read)
  towers = kind.module == dual_encoder.MODULE
  beside = dual_encoder.tokenizer_files(read.path) if towers else {}
  tensors, left_out = recognise.split(read.tensors, kind.left_out, prefix)
  arguments, variables = kind.load(kind.rename(tensors), str(read.path))
  metadata = {
    "kind": kind.name,
    "architecture": {"module": kind.module, **arguments},
    **({} if towers else {"preprocessing": preprocessing.read(read.path)}),
    "source": {"file": read.path.name, "sha256": sources.sha256(read.files)},
  }
  said = [
    f"recognised {read.path}: {kind.name}",
    *describe_place(read.key, prefix),
    *describe_left_out(read.left_out | left_out),
    dual_encoder.describe(arguments)
    if towers
    else f"model.backbone: {', '.join(f'{k} {v}' for k, v in arguments.items())}",
  ]
  return said, metadata, traverse_util.flatten_dict(variables), beside


def _recognise(read: sources.Source) -> tuple[recognise.Kind, str]:
  """See `recognise.recognise`; of another model also says what its settings call it."""
  try:
    return recognise.recognise(read.tensors, str(read.path))
  except UserError as error:
    name = sources.read_json(read.path.parent / "config.json").get("model_type")
    raise UserError(
      f"{error}" + (f"\nIts config.json names the model {name!r}" if name else "")
    ) from None


def check_target(target: str | os.PathLike, force: bool) -> None:
  """Raises UserError if a target exists and may not be replaced."""
  if pathlib.Path(target).exists() and not force:
    raise UserError(f"{target}: exists already; choose another --output or give --force")


def describe_place(key: str, prefix: str) -> list[str]:
  """Lines that say where in a file the weights were, and what stood before their names."""
  taken = [f"taken from {key!r} in the file"] if key else []
  return taken + ([f"removed from the names: {prefix!r}"] if prefix else [])


def describe_left_out(left_out: dict[str, str]) -> list[str]:
  """Lines that name everything that was left out, by reason."""
  return [
    f"left out ({reason}): {', '.join(name for name, why in left_out.items() if why == reason)}"
    for reason in dict.fromkeys(left_out.values())
  ]
