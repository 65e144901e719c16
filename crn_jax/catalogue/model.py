"""The model that a catalogue is searched with: any that this project has trained."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Protocol

import jax
import ml_collections
import numpy as np

from crn_jax import state
from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods import registry
from crn_jax.methods.base import Method, Variables
from crn_jax.workdir import run
from crn_jax.workdir.checkpoint import CheckpointReader

# Fields of `config.model` that change no vector.
_WITHOUT_EFFECT = ("pretrained", "remat")


class Tokenizer(Protocol):
  """What turns texts into the ids that a method composes with."""

  def encode(self, texts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ids [L] int32 and mask [L] bool of one query's texts."""

  def read(self, texts: tuple[str, ...]) -> list[tuple[str, int]]:
    """The words of one query as the model gets them, and their ids."""


@dataclasses.dataclass(frozen=True)
class Model:
  """A trained model.

  Attributes:
    path: absolute path of its folder.
    method: its code, for one device.
    variables: {'params', 'batch_stats'}, on the device.
    tokenizer: of its texts.
    digest: of all that vectors depend on: parameters, configuration, words.
  """

  path: str
  method: Method
  variables: Variables
  tokenizer: Tokenizer
  digest: str


def load(path: str | os.PathLike) -> Model:
  """The model in a folder: of a run the best checkpoint, or the last if none was evaluated.

  Raises:
    UserError: the folder is not there, or holds no trained model.
  """
  path = pathlib.Path(path).expanduser().absolute()
  if not path.is_dir():
    raise UserError(f"--model={path}: no such folder; expected that of a trained run")
  if not (path / "config.json").exists():
    raise UserError(
      f"--model={path}: holds no trained run (there is no config.json in it); train one with "
      f"python main.py --config=configs/demo.py"
    )
  return _of_run(path)


def _of_run(path: pathlib.Path) -> Model:
  run.check_trained(path)
  config = run.load_config(path)
  tokenizer = Vocabulary.load(path / "vocab.json")
  method = registry.create(config, len(tokenizer))
  like = state.abstract(method)
  params = "average" if like.average else "params"
  with CheckpointReader(path / "checkpoints") as checkpoints:
    step = checkpoints.best_step()
    if step is None:
      step = max(checkpoints.steps(), default=None)
    if step is None:
      raise UserError(f"{path / 'checkpoints'}: holds no checkpoint")
    fields = checkpoints.restore_fields(step, like, (params, "batch_stats"))
  variables = {"params": fields[params], "batch_stats": fields["batch_stats"]}
  digest = _digest(variables, config, tokenizer.words)
  return Model(str(path), method, jax.device_put(variables), tokenizer, digest)


def _digest(variables: Variables, config: ml_collections.ConfigDict, words: tuple) -> str:
  """SHA-256 of everything on which a vector depends; not of where the files are."""
  model = {k: v for k, v in run.as_json(config.model).items() if k not in _WITHOUT_EFFECT}
  data = {k: config.data[k] for k in ("image_size", "resize", "max_words", "markers")}
  settings = {"method": config.method, "model": model, "data": data, "words": words}

  def digest_of(item) -> str:
    path, leaf = item
    leaf = np.ascontiguousarray(leaf)
    head = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} "
    return head + hashlib.sha256(leaf.reshape(-1).view(np.uint8)).hexdigest()

  # In threads: hashing works outside Python's lock, and a Swin-L model has gigabytes.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    leaves = list(pool.map(digest_of, jax.tree_util.tree_leaves_with_path(variables)))
  return hashlib.sha256(json.dumps([settings, leaves], sort_keys=True).encode()).hexdigest()
