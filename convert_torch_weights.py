"""Converts weights of PyTorch programs, and back. See docs/weights.md.

A backbone, for model.pretrained:
python convert_torch_weights.py --input=model.safetensors --output=weights/swin_large
python convert_torch_weights.py --hub=timm/swin_large_patch4_window7_224.ms_in22k \
  --output=weights/swin_large
A whole model of the PyTorch release, to a work directory:
python convert_torch_weights.py --input=FOLDER --output=runs/released \
  --config=configs/fashioniq_dress.py:crn_released
A run, to files for the PyTorch release:
python convert_torch_weights.py --export=runs/mine --output=exported
"""

import os

from absl import app, flags, logging
from ml_collections import config_flags

from crn_jax.errors import UserError

_INPUT = flags.DEFINE_string(
  "input", None, "File or folder of weights; of a whole model its folder, or LOCAL,GLOBAL."
)
_HUB = flags.DEFINE_string("hub", None, "Repository on the Hugging Face hub to download.")
_EXPORT = flags.DEFINE_string("export", None, "Work directory of a run to write as safetensors.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write.")
_FORCE = flags.DEFINE_bool("force", False, "Replace the output if it exists.")
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration to use a whole model with; a backbone needs none."
)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}; options are written --name=value")
  logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO.
  given = [flag for flag in (_INPUT, _HUB, _EXPORT) if flag.value]
  if len(given) != 1:
    raise app.UsageError("give one of --input, --hub and --export")
  try:
    print(_convert(_expanded(_INPUT.value), _expanded(_EXPORT.value), _expanded(_OUTPUT.value)))
  except (UserError, OSError) as error:
    raise SystemExit(f"error: {error}") from error


def _expanded(paths: str | None) -> str | None:
  """Shells leave the ~ of --input=~/a,~/b as it is."""
  return paths and ",".join(map(os.path.expanduser, paths.split(",")))


def _convert(given: str | None, export: str | None, output: str) -> str:
  from crn_jax.convert import backbone, hub, whole  # JAX takes seconds: not for --help.

  force = _FORCE.value
  if export:
    return whole.export(export, output, force=force)
  if _HUB.value:
    backbone.check_target(output, force)
    return backbone.convert(hub.download(_HUB.value), output, force=force)
  paths = whole.paths_of(given)
  if paths is None:
    return backbone.convert(given, output, force=force)
  if _CONFIG.value is None:
    raise UserError(
      f"{given}: a whole model needs the configuration that it will be used with, e.g. "
      f"--config=configs/fashioniq_dress.py:crn_released"
    )
  return whole.convert(paths, output, _CONFIG.value, force=force)


if __name__ == "__main__":
  flags.mark_flags_as_required(["output"])
  app.run(main)
