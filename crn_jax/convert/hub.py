"""Weights from the Hugging Face hub."""

import pathlib

import huggingface_hub

from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers.pretrained import FILES as TOKENIZER_FILES

# Of one file, or of several with their index.
_FILES = (
  "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
  "pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json")


def download(repository: str) -> pathlib.Path:
  """Downloads the weights of a repository, or finds them in huggingface_hub's cache.

  Args:
    repository: e.g. 'timm/swin_large_patch4_window7_224.ms_in22k'.

  Returns:
    The folder with the weights, their settings and their tokenizer.

  Raises:
    UserError: if there is no such repository, or no network.
  """
  patterns = [*_FILES, *_SETTINGS, *TOKENIZER_FILES]
  try:
    folder = huggingface_hub.snapshot_download(repository, allow_patterns=patterns)
  except Exception as error:  # Of the hub, of its HTTP client, of the system.
    raise UserError(
      f"--hub={repository}: cannot be downloaded ({type(error).__name__}: "
      f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). Is the name right, and "
      f"is there a network? Without one, fetch model.safetensors elsewhere and give it with --input"
    ) from error
  return pathlib.Path(folder)
