"""The state of a training: the one place that builds it, with values or as shapes only."""

import dataclasses
import os
import pathlib

import jax
import ml_collections
import numpy as np

from crn_jax import initial_values
from crn_jax.errors import UserError
from crn_jax.methods.base import Method, TrainState, Variables
from crn_jax.methods.encoder import EncoderMethod
from crn_jax.methods.registry import METHODS
from crn_jax.models.backbones import registry, stacking
from crn_jax.models.dual_encoder import DualEncoderConfig
from crn_jax.workdir import weights
from crn_jax.workdir.checkpoint import CheckpointReader


def initial(method: Method, tx, folder: str) -> TrainState:
  """The state before the first update: random values from `config.seed`.

  Args:
    method: what is trained.
    tx: optimizer of a part.
    folder: that backbones, or towers, start from; '' for random values.

  Raises:
    UserError: if the folder holds other weights.
  """
  return of_variables(method, tx, initial_variables(method, folder))


def initial_variables(method: Method, folder: str) -> Variables:
  """What a state begins with, see `initial`."""
  key = jax.random.key(method.config.seed)
  if not folder:
    return initial_values.draw(method.init, key)
  variables = initial_values.draw(method.init, key, without=(method.pretrained,))
  if isinstance(method, EncoderMethod):
    return _with_towers(method, variables, folder)
  return with_pretrained(variables, folder)


def towers(method: EncoderMethod, folder: str) -> dict:
  """Parameters of both towers, NumPy, from a folder of weights.

  Raises:
    UserError: if it holds others than the method's.
  """
  like = jax.eval_shape(method.init_encoder, jax.random.key(0))
  return weights.load_backbone(folder, {"params": like})["params"]


def _with_towers(method: EncoderMethod, variables: Variables, folder: str) -> Variables:
  """Variables with what every part has of the towers from a folder of weights."""
  own = [tree for tree in variables["params"].values() if "encoder" in tree]
  loaded = towers(method, folder) if own else {}
  for tree in own:
    tree["encoder"] = {name: loaded[name] for name in tree["encoder"]}
  return variables


def of_variables(method: Method, tx, variables: Variables) -> TrainState:
  """The state of a run that begins with given variables, whose blocks it stacks."""
  variables = stacking.stack(variables)
  return TrainState.create(variables, tx, averaged=method.config.optimizer.ema_decay > 0)


def abstract(method: Method) -> TrainState:
  """Shapes and dtypes of a state, to restore one into; nothing is computed."""
  tx = method.optimizer(steps_per_epoch=1, total_steps=1)  # The shapes do not depend on these.
  return jax.eval_shape(lambda: of_variables(method, tx, method.init(jax.random.key(0))))


def chosen_step(workdir: str | os.PathLike, which: str | None = None) -> int:
  """Step of a run's checkpoint.

  Args:
    workdir: of the run.
    which: 'best' or 'last'; None is the best, if one was chosen, or else the last.

  Raises:
    UserError: there is no such checkpoint.
  """
  folder = pathlib.Path(workdir) / "checkpoints"
  with CheckpointReader(folder) as checkpoints:
    steps = {"best": checkpoints.best_step(), "last": max(checkpoints.steps(), default=None)}
  step = steps[which] if which else next((s for s in steps.values() if s is not None), None)
  if step is None:
    raise UserError(f"{folder}: holds no {f'{which} ' if which else ''}checkpoint")
  return step


def trained(method: Method, workdir: str | os.PathLike, step: int) -> Variables:
  """Variables of a run's checkpoint, as evaluation reads them: without Adam's moments."""
  like, folder = abstract(method), pathlib.Path(workdir) / "checkpoints"
  params = like.evaluated_field
  with CheckpointReader(folder) as checkpoints:
    fields = checkpoints.restore_fields(step, like, (params, "batch_stats"))
  return {"params": fields[params], "batch_stats": fields["batch_stats"]}


def with_pretrained(variables: Variables, folder: str) -> Variables:
  """Variables with the backbone of every part from a folder of converted weights.

  Only the shapes of the backbones that are there matter.
  """
  for part in variables["params"]:
    own = {c: tree[part] for c, tree in variables.items() if "backbone" in tree[part]}
    if own:
      loaded = weights.load_backbone(folder, {c: tree["backbone"] for c, tree in own.items()})
      for collection, tree in own.items():
        tree["backbone"] = loaded[collection]
  return variables


def check_pretrained(config: ml_collections.ConfigDict) -> None:
  """Checks, from the metadata alone, that `config.model.pretrained` is there and fits.

  Raises:
    UserError: if the folder of pretrained weights is not there, holds none, or those of another
      backbone, or of other pictures, than `config.model.backbone`.
  """
  path = config.model.pretrained
  if not path:
    return
  if METHODS[config.method].pretrained == "encoder":
    _check_towers(config)
    return
  if not pathlib.Path(path).exists():
    raise UserError(
      f"{path}: pretrained backbone weights (model.pretrained) not found. Make the folder with\n"
      f"  python convert_torch_weights.py --input=MODEL.safetensors --output={path}\n"
      f"from published weights (docs/weights.md lists the kinds), or start from random values: "
      f"--config.model.pretrained=''"
    )
  metadata = weights.read_metadata(path)
  found = metadata["architecture"]
  if found["module"] == "DualEncoder":
    raise UserError(
      f"{path}: holds a pair of towers, image and text; the method {config.method!r} wants a "
      f"backbone. See docs/encoders.md for what is done with towers"
    )
  module = registry.create(config.model.backbone)
  wanted = {key: getattr(module, key, None) for key in found if key != "module"}
  wanted["module"] = type(module).__name__
  # Tables of another window are interpolated.
  differences = [
    f"model.backbone.{key}: {found[key]} in the weights, {wanted[key]} in the configuration"
    for key in sorted(found.keys() - {"window_size"})
    if _plain(found[key]) != _plain(wanted[key])
  ]
  if differences:
    raise UserError(
      f"{path}: weights of another backbone:\n  " + "\n  ".join(differences) + "\n"
      "Change model.backbone, or convert other weights to another folder."
    )
  ours = registry.preprocessing(config.model.backbone)
  for key in ("mean", "std"):
    value = tuple(metadata["preprocessing"][key])
    if not np.allclose(value, getattr(ours, key), atol=1e-3):
      raise UserError(
        f"{path}: trained on pictures normalised with {key} {value}, not with "
        f"{getattr(ours, key)}: give --config.model.backbone.{key}='{value}'"
      )


def _check_towers(config: ml_collections.ConfigDict) -> None:
  """Raises UserError unless the folder of weights holds the towers that are described."""
  path = config.model.pretrained
  found = dict(weights.read_metadata(path)["architecture"])
  module = found.pop("module")
  described = DualEncoderConfig.from_dict(config.model.encoder.to_dict())
  known = DualEncoderConfig.from_dict(found) if module == "DualEncoder" else None
  if known == described:
    return
  if known and dataclasses.replace(known, squeeze=described.squeeze) == described:
    ways = {True: "squeezed into squares", False: "cropped to squares"}
    raise UserError(
      f"{path}: these towers want pictures {ways[known.squeeze]}, in this configuration they are "
      f"{ways[described.squeeze]}. They were converted anew: name the folder from before with "
      f"model.pretrained, or begin with a configuration file"
    )
  raise UserError(
    f"{path}: holds other weights than the towers of this configuration (model.encoder); name "
    f"their folder with model.pretrained, or begin with a configuration file"
  )


def _plain(value):
  return list(value) if isinstance(value, (list, tuple)) else value
