"""Names of the PyTorch release's `local_model` and `global_model` for the variables of a `Branch`.

The release has no licence and its code is not used; names and shapes are facts that the golden
numbers were recorded with. Those of CLVC-Net's ResNet-50 were not recorded: torchvision's names in
the place of timm's are our reading.
"""

import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from crn_jax.convert import layout, timm, torchvision
from crn_jax.models.backbones import stacking

# Where the backbone's own names begin.
BACKBONE = "img_model.img_model."

_LEAVES = {
  'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight',
  'mean': 'running_mean', 'var': 'running_var',
}  # fmt: skip

_RULES = (
  (r"^head\.lift\.", "img_model.img1x1conv3."),
  (r"^head\.pool\.", "img_model.img_pool."),
  (r"^head\.fc\.", "img_model.img_fc."),
  (r"^head\.aggregation_fc\.", "img_model.final_fc."),
  (r"^text\.embedding\.", "text_model.embedding_layer."),
  (r"^text\.input_gates\.(\w+)$", r"text_model.lstm.\1_ih_l0"),
  (r"^text\.hidden_kernel$", "text_model.lstm.weight_hh_l0"),
  (r"^text\.hidden_bias$", "text_model.lstm.bias_hh_l0"),
  (r"^composition\.embed\.", "KIND_fuse.img1x1conv."),
  (r"^composition\.(gamma|beta)\.", r"KIND_fuse.inception_\1."),
  (r"\.branch([12])_(\d)\.", r".branch\1.\2."),
  (r"\.branch3\.", ".branch3.1."),
  (r"^query_(pool|fc)\.", r"KIND_\1."),
  (r"^relation\.query_fc\.", "correct_module.fc1.0."),
  (r"^relation\.target_fc\.", "correct_module.fc2.0."),
  (r"^relation\.fc\.", "correct_module.fc.0."),
  (r"^logit_scale$", "loss_weight"),
)


def release_name(kind: str, path: tuple[str, ...]) -> str:
  """Name in the release's state dict of a parameter or running statistic.

  Args:
    kind: 'local' or 'global'.
    path: Flax path inside the branch, e.g. ('head', 'fc', 'kernel').
  """
  if path[0] == "backbone":
    own_name = torchvision.torchvision_name if _is_resnet(path) else timm.timm_name
    return BACKBONE + own_name(path[1:])
  *modules, leaf = path
  name = ".".join((*modules, _LEAVES.get(leaf, leaf)))
  for pattern, replacement in _RULES:
    name = re.sub(pattern, replacement, name)
  return name.replace("KIND", kind)


def load_branch(kind: str, tree: Mapping, state_dict: Mapping[str, np.ndarray]) -> dict:
  """Fills a branch's parameters (or running statistics) from the release's state dict.

  Args:
    kind: 'local' or 'global'.
    tree: the structure to fill, one array a block.
    state_dict: release's names (with today's timm names) -> arrays.

  Raises:
    KeyError: if the state dict lacks an entry.
    ValueError: if an entry does not fit.
  """
  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict({
    path: layout.to_flax(np.asarray(state_dict[release_name(kind, path)]), path[-1], value.shape)
    for path, value in flat.items()
  })  # fmt: skip


def to_release(kind: str, tree: Mapping, shapes: Mapping[str, tuple]) -> dict[str, np.ndarray]:
  """Inverse of `load_branch`: a tree like a branch's variables -> the release's names and layouts.

  Args:
    kind: 'local' or 'global'.
    tree: parameters, gradients or running statistics of a branch, stacked or not.
    shapes: release's name -> PyTorch shape.
  """
  out = {}
  for path, value in _one_a_block(tree).items():
    name = release_name(kind, path)
    out[name] = layout.to_torch(np.asarray(value), path[-1], tuple(shapes[name]))
  return out


def export_branch(kind: str, tree: Mapping) -> dict[str, np.ndarray]:
  """As `to_release`, with PyTorch's shapes derived from ours; contiguous, as files need it."""
  exported = to_release(kind, tree, torch_shapes(kind, tree))
  return {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in exported.items()}


def torch_shapes(kind: str, tree: Mapping) -> dict[str, tuple[int, ...]]:
  """Release's name -> PyTorch's shape, of everything in a branch's tree of arrays or shapes."""
  return {
    release_name(kind, path): _torch_shape(kind, path, value.shape)
    for path, value in _one_a_block(jax.eval_shape(stacking.unstack, tree)).items()
  }


def _one_a_block(tree: Mapping) -> dict[tuple[str, ...], np.ndarray]:
  """Path -> value, as the release has them: no stacked arrays."""
  return traverse_util.flatten_dict(stacking.unstack(tree))


def _torch_shape(kind: str, path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
  if path[-1] not in layout.KERNELS:
    return shape
  *window, inputs, outputs = shape
  name = release_name(kind, path)
  if "patch_embed" in name:  # A plain matrix here: 3 colours of square patches.
    side = math.isqrt(inputs // 3)
    return outputs, 3, side, side
  if _is_resnet(path):
    window = window or [1, 1]
  elif name.endswith("conv.weight") or "img1x1conv" in name:
    dims = 1 if kind == "global" and "inception" in name else 2
    window = window or [1] * dims
  return (outputs, inputs, *window)


def _is_resnet(path: tuple[str, ...]) -> bool:
  return path[0] == "backbone" and any(part.startswith(("conv", "bn")) for part in path[1:])
