"""Weights from the Hugging Face hub."""

import pathlib

import huggingface_hub

_FILES = ("model.safetensors", "pytorch_model.bin")
_SETTINGS = ("config.json", "preprocessor_config.json")


def download(repository: str) -> pathlib.Path:
  """Downloads the weights of a repository, or finds them in huggingface_hub's cache.

  Args:
    repository: e.g. 'timm/swin_large_patch4_window7_224.ms_in22k'.

  Returns:
    The file of weights; its settings stand beside it.

  Raises:
    ValueError: if there is no such repository, no weights in it, or no network.
  """
  try:
    folder = pathlib.Path(
      huggingface_hub.snapshot_download(repository, allow_patterns=[*_FILES, *_SETTINGS])
    )
  except Exception as error:  # Of the hub, of its HTTP client, of the system.
    raise ValueError(
      f"--hub={repository}: cannot be downloaded ({type(error).__name__}: "
      f"{str(error).splitlines()[0] if str(error) else 'no reason given'}). Is the name right, and "
      f"is there a network? Without one, fetch model.safetensors elsewhere and give it with --input"
    ) from error
  for name in _FILES:
    if (folder / name).exists():
      return folder / name
  raise ValueError(f"--hub={repository}: holds neither {' nor '.join(_FILES)}")
