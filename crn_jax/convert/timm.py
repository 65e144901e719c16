"""timm's Swin Transformer weights -> parameters of `crn_jax.models.swin`."""

import os
import pathlib
import re
from collections.abc import Mapping

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from crn_jax import weights
from crn_jax.convert import layout
from crn_jax.models import swin

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
  return traverse_util.unflatten_dict(
    layout.fill(flat, names, state_dict, source, "Swin Transformer")
  )


def swin_arguments(state_dict: Mapping[str, np.ndarray]) -> dict:
  """Reads the sizes of a Swin Transformer off its weights.

  Args:
    state_dict: today's timm names -> arrays.

  Returns:
    Arguments of `swin.SwinTransformer`.

  Raises:
    KeyError: if these are not the weights of a Swin Transformer.
  """
  depths, heads, window = [], [], 0
  while f"layers.{len(depths)}.blocks.0.norm1.weight" in state_dict:
    stage = f"layers.{len(depths)}.blocks"
    table = state_dict[f"{stage}.0.attn.relative_position_bias_table"]
    window = max(window, (round(table.shape[0] ** 0.5) + 1) // 2)
    heads.append(table.shape[1])
    blocks = {name.split(".")[3] for name in state_dict if name.startswith(stage + ".")}
    depths.append(len(blocks))
  patches = state_dict["patch_embed.proj.weight"]
  return {
    "embed_dim": patches.shape[0],
    "depths": tuple(depths),
    "num_heads": tuple(heads),
    "patch_size": patches.shape[-1],
    "window_size": window,
  }


def convert_file(
  source: str | os.PathLike, target: str | os.PathLike, *, replace: bool = False
) -> str:
  """Converts a file of timm weights to one for `model.pretrained`.

  Args:
    source: .safetensors, or a PyTorch file of a state dict.
    target: file to write.
    replace: whether an existing target may be replaced.

  Returns:
    What was converted, for people to read.

  Raises:
    FileNotFoundError, FileExistsError: no source, or a target that must not be replaced.
    ValueError: if the source is not a readable file of Swin weights.
    ImportError: if a PyTorch file is given and PyTorch is not installed.
  """
  if pathlib.Path(target).exists() and not replace:
    raise FileExistsError(f"{target}: exists already; choose another --output or give --force")
  state_dict = modern_names(read_state_dict(source))
  try:
    arguments = swin_arguments(state_dict)
  except KeyError as error:
    raise ValueError(
      f"{source}: not the weights of a Swin Transformer of timm: no {error} in it; it holds "
      f"{sorted(state_dict)[:3]}..."
    ) from error
  # Small grids shrink the window; this many pixels keep every stage at the full window.
  side = arguments["patch_size"] * arguments["window_size"] * 2 ** (len(arguments["depths"]) - 1)
  module = swin.SwinTransformer(**arguments)
  image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
  like = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False)["params"], image)
  params = load_swin(like, state_dict, str(source))
  weights.save_backbone({"params": params}, target)
  count = sum(x.size for x in jax.tree.leaves(params))
  return f"{target}: {count:,} parameters; model.backbone = {arguments}"


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads a state dict as numpy arrays; never runs code from the file.

  Raises:
    FileNotFoundError, ValueError, ImportError: see `convert_file`.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"{path}: not found")
  if path.suffix == ".safetensors":
    try:
      return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
      raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path}: reading a PyTorch file needs PyTorch (pip install torch); timm's weights are also "
      f"published as .safetensors, which needs nothing more"
    ) from error
  try:
    loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:  # torch raises many kinds, for files that are damaged or not its own
    raise ValueError(f"{path}: not a readable PyTorch state dict: {error}") from error
  for key in ("state_dict", "model"):
    if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
      loaded = loaded[key]
  return {name: tensor.numpy() for name, tensor in loaded.items() if hasattr(tensor, "numpy")}
