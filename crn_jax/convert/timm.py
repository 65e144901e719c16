"""timm's names of Swin Transformer weights -> parameters of `crn_jax.models.backbones.swin`.

Microsoft's original files have the names of timm before 0.9.
"""

import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from crn_jax.convert import layout
from crn_jax.errors import UserError
from crn_jax.models.backbones import swin

_LEAVES = {"kernel": "weight", "scale": "weight"}
_TABLE = "relative_position_bias_table"

LEFT_OUT = (
  (r"head\..*", "classifier"),
  (r"(.*\.)?relative_position_index", "constant, follows from the window"),
  (r"(.*\.)?attn_mask", "constant, follows from the window and the grid"),
)


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
  """Renames the keys of timm before 0.9 to today's; leaves out constants and the classifier.

  Old timm closes a stage with its patch merging (`layers.0.downsample`), today's opens the next
  stage with it (`layers.1.downsample`). The names may have a prefix.
  """
  state_dict = {
    name: tensor
    for name, tensor in state_dict.items()
    if not any(re.fullmatch(pattern, name) for pattern, _ in LEFT_OUT)
  }
  if not any(re.search(r"(^|\.)layers\.0\.downsample\.reduction\.weight$", n) for n in state_dict):
    return state_dict

  def modern(name):
    return re.sub(
      r"(^|\.)layers\.(\d+)\.downsample\.",
      lambda m: f"{m[1]}layers.{int(m[2]) + 1}.downsample.",
      name,
    )

  return {modern(name): tensor for name, tensor in state_dict.items()}


def load_swin(params: Mapping, state_dict: Mapping[str, np.ndarray], source: str) -> dict:
  """Backbone parameters with timm's values.

  Args:
    params: parameters of the backbone (or their shapes), the structure to fill.
    state_dict: timm's names, of any version -> arrays.
    source: file that the weights come from, for messages.

  Returns:
    A tree like `params`, float32.

  Raises:
    UserError: if weights are missing, left over, or of another shape; names them.
  """
  state_dict = modern_names(state_dict)
  flat = traverse_util.flatten_dict(params)
  names = {path: timm_name(path) for path in flat}
  return traverse_util.unflatten_dict(
    layout.fill(flat, names, state_dict, source, "Swin Transformer")
  )


def load(state_dict: Mapping[str, np.ndarray], source: str) -> tuple[dict, dict]:
  """A backbone whose sizes are read off its weights.

  Args:
    state_dict: today's timm names -> arrays, classifier and constants left out.
    source: file that the weights come from, for messages.

  Returns:
    Arguments of `swin.SwinTransformer`; its variables {'params'}, float32.

  Raises:
    UserError: if weights are missing, left over, or of another shape; names them.
  """
  try:
    arguments = swin_arguments(state_dict)
    module = swin.SwinTransformer(**arguments)
    # Small grids shrink the window; this many pixels keep every stage at the full window.
    side = arguments["patch_size"] * arguments["window_size"] * 2 ** (len(arguments["depths"]) - 1)
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    like = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False)["params"], image)
  except (KeyError, IndexError) as error:
    raise UserError(f"{source}: not all of a Swin Transformer: missing {error}") from error
  flat = traverse_util.flatten_dict(like)
  for path in flat:
    # Stages whose grid was smaller than the window have a smaller table.
    table = state_dict.get(timm_name(path))
    if path[-1] == _TABLE and table is not None and _window(table):
      flat[path] = jax.ShapeDtypeStruct((table.shape[0], flat[path].shape[1]), np.float32)
  like = traverse_util.unflatten_dict(flat)
  return arguments, {"params": load_swin(like, state_dict, source)}


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
  while any(name.startswith(f"layers.{len(depths)}.blocks.") for name in state_dict):
    stage = f"layers.{len(depths)}.blocks"
    blocks = {int(n.split(".")[3]) for n in state_dict if n.startswith(stage + ".")}
    tables = [t for i in blocks if (t := state_dict.get(f"{stage}.{i}.attn.{_TABLE}")) is not None]
    if not tables:
      raise KeyError(f"{stage}.0.attn.{_TABLE}")
    window = max(window, *map(_window, tables), 1)
    heads.append(tables[0].shape[1])
    depths.append(max(blocks) + 1)
  patches = state_dict["patch_embed.proj.weight"]
  if not depths:
    raise KeyError(f"layers.0.blocks.0.attn.{_TABLE}")
  return {
    "embed_dim": patches.shape[0],
    "depths": tuple(depths),
    "num_heads": tuple(heads),
    "patch_size": patches.shape[-1],
    "window_size": window,
  }


def _window(table: np.ndarray) -> int:
  """Side of the window that a table [(2 w - 1)^2, heads] belongs to; 0 if there is none."""
  side = round(table.shape[0] ** 0.5)
  return (side + 1) // 2 if side % 2 and side * side == table.shape[0] else 0
