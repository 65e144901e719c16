"""torchvision's ResNet weights <-> variables of `crn_jax.models.backbones.resnet`."""

import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from crn_jax.convert import layout
from crn_jax.errors import UserError
from crn_jax.models.backbones import resnet

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}

LEFT_OUT = (
  (r"fc\..*", "classifier"),
  (r".*\.num_batches_tracked", "counter of batches; the momentum of the statistics is constant"),
)


def torchvision_name(path: tuple[str, ...]) -> str:
  """Name in torchvision of a parameter or running statistic of the backbone.

  Args:
    path: Flax path below the collection, e.g. ('stage1_block0', 'conv_shortcut', 'kernel').

  Returns:
    E.g. 'layer2.0.downsample.0.weight'.
  """
  *modules, leaf = path
  name = ".".join((*modules, _LEAVES.get(leaf, leaf)))
  name = re.sub(r"^stage(\d+)_block(\d+)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}", name)
  return name.replace("conv_shortcut", "downsample.0").replace("bn_shortcut", "downsample.1")


def load_resnet(variables: Mapping, state_dict: Mapping[str, np.ndarray], source: str) -> dict:
  """Backbone variables with torchvision's values.

  Args:
    variables: {'params', 'batch_stats'} of the backbone (or their shapes), the structure to fill.
    state_dict: torchvision's names -> arrays; the classifier `fc` and the counters
      `num_batches_tracked` are left out.
    source: file that the weights come from, for messages.

  Returns:
    A tree like `variables`, float32.

  Raises:
    UserError: if weights are missing, left over, or of another shape; names them.
  """
  state_dict = {
    name: tensor
    for name, tensor in state_dict.items()
    if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
  }
  flat = traverse_util.flatten_dict(variables)
  names = {path: torchvision_name(path[1:]) for path in flat}
  return traverse_util.unflatten_dict(layout.fill(flat, names, state_dict, source, "ResNet"))


def load(state_dict: Mapping[str, np.ndarray], source: str) -> tuple[dict, dict]:
  """A backbone whose sizes are read off its weights.

  Args:
    state_dict: torchvision's names -> arrays.
    source: file that the weights come from, for messages.

  Returns:
    Arguments of `resnet.ResNet`; its variables {'params', 'batch_stats'}, float32.

  Raises:
    UserError: if weights are missing, left over, or of another shape; names them.
  """
  try:
    arguments = resnet_arguments(state_dict)
  except KeyError as error:
    raise UserError(f"{source}: not all of a ResNet: missing {error}") from error
  module = resnet.ResNet(**arguments)
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  like = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
  return arguments, load_resnet(like, state_dict, source)


def resnet_arguments(state_dict: Mapping[str, np.ndarray]) -> dict:
  """Reads the sizes of a ResNet off its weights.

  Args:
    state_dict: torchvision's names -> arrays.

  Returns:
    Arguments of `resnet.ResNet`.

  Raises:
    KeyError: if these are not the weights of a ResNet.
  """
  found = [m for m in (re.match(r"layer(\d+)\.(\d+)\.", name) for name in state_dict) if m]
  stages = {int(m[1]) for m in found}
  if "conv1.weight" not in state_dict:
    raise KeyError("conv1.weight")
  if absent := sorted(set(range(1, max(stages, default=1) + 1)) - stages):
    raise KeyError(f"layer{absent[0]}")
  depths = tuple(max(int(m[2]) for m in found if int(m[1]) == i) + 1 for i in sorted(stages))
  is_bottleneck = "layer1.0.conv3.weight" in state_dict
  return {
    "width": state_dict["conv1.weight"].shape[0],
    "depths": depths,
    "expansion": resnet.BOTTLENECK if is_bottleneck else resnet.BASIC,
  }


def to_torchvision(variables: Mapping) -> dict[str, np.ndarray]:
  """Inverse of `load_resnet`: backbone variables -> state dict without a classifier.

  torchvision's strict loading wants a counter beside each running mean; it is 0 here.
  """
  state_dict = {}
  for path, value in traverse_util.flatten_dict(variables).items():
    shape = value.shape
    if path[-1] == "kernel":
      # A 1 x 1 convolution is a plain matrix here.
      window = shape[:-2] or (1, 1)
      shape = (shape[-1], shape[-2], *window)
    name = torchvision_name(path[1:])
    state_dict[name] = layout.to_torch(np.asarray(value), path[-1], shape)
    if path[-1] == "mean":
      counter = name.replace("running_mean", "num_batches_tracked")
      state_dict[counter] = np.zeros((), np.int64)
  return state_dict
