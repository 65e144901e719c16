"""The model that a catalogue is searched with: a trained run, or a folder of converted towers."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib

import jax
import ml_collections
import numpy as np

from crn_jax import feature_training, pretrained, state
from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers import base as tokenizers
from crn_jax.input_pipeline.tokenizers import pretrained as towers_tokenizer
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods import registry
from crn_jax.methods.base import Method, Variables
from crn_jax.workdir import run

# Fields of `config.model` that change no vector, and those of `config.data` that do.
_WITHOUT_EFFECT = ("model.pretrained", "model.remat")
_OF_DATA = ("data.image_size", "data.resize", "data.max_ratio", "data.max_words", "data.markers")


@dataclasses.dataclass(frozen=True)
class Model:
  """A trained model.

  Attributes:
    path: absolute path of its folder.
    method: its code, for one device.
    variables: {'params', 'batch_stats'}, on the device; frozen towers are among the parameters.
    tokenizer: of its texts.
    digest: of all that vectors depend on: parameters, configuration, words.
  """

  path: str
  method: Method
  variables: Variables
  tokenizer: Tokenizer
  digest: str


def load(path: str | os.PathLike) -> Model:
  """The model in a folder.

  Of a run it is the best checkpoint, or the last if none was evaluated. Towers (CLIP, SigLIP,
  BGE-VL), as convert_torch_weights.py writes them, are used as they are (`methods/zero_shot.py`).

  Raises:
    UserError: the folder is not there, or holds no such model.
  """
  path = pathlib.Path(path).expanduser().absolute()
  if not path.is_dir():
    raise UserError(
      f"{path}: no such folder; a model is that of a trained run, or of converted towers"
    )
  if (path / "config.json").exists():
    return _of_run(path)
  if (path / "_CHECKPOINT_METADATA").exists():
    return _of_towers(path)
  raise UserError(
    f"{path}: holds neither a trained run (config.json) nor weights that "
    f"convert_torch_weights.py wrote; train one with python main.py --config=configs/demo.py"
  )


def _of_run(path: pathlib.Path) -> Model:
  run.check_trained(path)
  config = run.load_config(path)
  tokenizer = tokenizers.load(path / "vocab.json")
  method = registry.create(config, len(tokenizer))
  variables = feature_training.answering(method, path, state.chosen_step(path))
  return _model(path, method, variables, tokenizer)


def _of_towers(path: pathlib.Path) -> Model:
  config = ml_collections.ConfigDict(
    {
      "method": "zero_shot",
      "seed": 0,
      "zero_shot": {"query": "sum", "slerp_weight": 0.5},
      "model": {
        "pretrained": str(path),
        "encoder": {},
        "dtype": "float32",
        "remat": "none",
        "precision": "default",
      },
      "data": {
        "image_size": None,
        "resize": None,
        "max_words": None,
        "max_ratio": None,
        "prepared": "",
      },
    }
  )
  pretrained.describe(config)
  tokenizer = pretrained.new_tokenizer(config, captions=())
  method = registry.create(config, len(tokenizer))
  return _model(path, method, state.initial_variables(method, str(path)), tokenizer)


def _model(path: pathlib.Path, method: Method, variables: Variables, tokenizer: Tokenizer) -> Model:
  digest = _digest(variables, method, tokenizer)
  return Model(str(path), method, jax.device_put(variables), tokenizer, digest)


def _digest(variables: Variables, method: Method, tokenizer: Tokenizer) -> str:
  """SHA-256 of everything on which a vector depends; not of where the files are."""
  config = method.config
  settings = {
    name: value
    for name, value in run.settings(config).items()
    if name in _OF_DATA or name.startswith((f"{config.method}.", "model."))
  }
  settings = {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT}
  settings["model.dtype"] = method.numerics

  def digest_of(item) -> str:
    path, leaf = item
    leaf = np.ascontiguousarray(leaf)
    head = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} "
    return head + hashlib.sha256(leaf.reshape(-1).view(np.uint8)).hexdigest()

  # In threads: hashing works outside Python's lock, and a Swin-L model has gigabytes.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    leaves = list(pool.map(digest_of, jax.tree_util.tree_leaves_with_path(variables)))
  content = [config.method, settings, _words(tokenizer), leaves]
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _words(tokenizer: Tokenizer) -> list:
  """What texts become with a tokenizer, in JSON."""
  if isinstance(tokenizer, Vocabulary):
    return list(tokenizer.words)
  names = towers_tokenizer.found_files(tokenizer.folder)
  read = [(tokenizer.folder / name).read_bytes() for name in names]
  return [tokenizer.lower_case, *(hashlib.sha256(content).hexdigest() for content in read)]
