"""Weights from the Hugging Face hub."""

import pathlib

import huggingface_hub

from crn_jax.errors import UserError

# Of one file, or of several with their index.
_FILES = (
  "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
  "pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_SETTINGS = ("config.json", "preprocessor_config.json")


def download(repository: str) -> pathlib.Path:
  """Downloads the weights of a repository, or finds them in huggingface_hub's cache.

  Args:
    repository: e.g. 'timm/swin_large_patch4_window7_224.ms_in22k'.

  Returns:
    The folder with the weights and their settings.

  Raises:
    UserError: if there is no such repository, or no network.
  """
  try:
    folder = huggingface_hub.snapshot_download(repository, allow_patterns=[*_FILES, *_SETTINGS])
  except Exception as error:  # Of the hub, of its HTTP client, of the system.
    raise UserError(
      f"--hub={repository}: cannot be downloaded ({type(error).__name__}: "
      f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). Is the name right, and "
      f"is there a network? Without one, fetch model.safetensors elsewhere and give it with --input"
    ) from error
  return pathlib.Path(folder)
