"""timm's Swin Transformer weights -> parameters of `crn_jax.models.swin`."""

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from crn_jax.convert import layout

_LEAVES = {"kernel": "weight", "scale": "weight"}


def timm_name(path: tuple[str, ...]) -> str:
  """Name in timm (1.0 and newer) of a parameter of the backbone.

  Args:
    path: Flax path, e.g. ('stage1_block0', 'attn', 'qkv', 'kernel').

  Returns:
    E.g. 'layers.1.blocks.0.attn.qkv.weight'.
  """
  *modules, leaf = path
  name = ".".join((*modules, _LEAVES.get(leaf, leaf)))
  for pattern, replacement in (
    (r"^patch_embed\.", "patch_embed.proj."),
    (r"^patch_norm\.", "patch_embed.norm."),
    (r"^stage(\d+)_block(\d+)\.", r"layers.\1.blocks.\2."),
    (r"^stage(\d+)_merging\.", r"layers.\1.downsample."),
    (r"\.mlp_", ".mlp."),
  ):
    name = re.sub(pattern, replacement, name)
  return name


def modern_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames the keys of timm before 0.9 to today's; leaves out buffers and the classifier.

  Old timm closes a stage with its patch merging (`layers.0.downsample`), today's opens the next
  stage with it (`layers.1.downsample`).
  """
  old = "layers.0.downsample.reduction.weight" in state_dict
  renamed = {}
  for name, tensor in state_dict.items():
    if name.startswith("head.") or name.endswith(("relative_position_index", "attn_mask")):
      continue
    match = re.match(r"layers\.(\d+)\.downsample\.(.*)", name)
    if old and match:
      name = f"layers.{int(match[1]) + 1}.downsample.{match[2]}"
    renamed[name] = tensor
  return renamed


def load_swin(params: Mapping, state_dict: Mapping[str, np.ndarray], source: str) -> dict:
  """Backbone parameters with timm's values.

  Args:
    params: parameters of the backbone (or their shapes), the structure to fill.
    state_dict: timm's names -> arrays, of any timm version.
    source: file that the weights come from, for messages.

  Returns:
    A tree like `params`, float32.

  Raises:
    ValueError: if weights are missing, left over, or of another shape; names them.
  """
  state_dict = modern_names(state_dict)
  flat = traverse_util.flatten_dict(params)
  names = {path: timm_name(path) for path in flat}
  problems = [f"missing {n}" for n in names.values() if n not in state_dict]
  problems += [f"unexpected {n}" for n in state_dict if n not in set(names.values())]
  loaded = {}
  for path, name in names.items():
    if name in state_dict:
      try:
        loaded[path] = layout.to_flax(
          np.asarray(state_dict[name], np.float32), path[-1], flat[path].shape
        )
      except ValueError as error:
        problems.append(f"{name} {error}")
  if problems:
    shown = "\n  ".join(problems[:10])
    raise ValueError(
      f"{source}: not the weights of this Swin Transformer ({len(problems)} differences):\n"
      f"  {shown}\nCheck model.backbone (embed_dim, depths, num_heads, patch_size, window_size) and "
      f"data.image_size against the file."
    )
  return traverse_util.unflatten_dict(loaded)
