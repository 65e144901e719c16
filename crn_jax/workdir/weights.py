"""Folders of pretrained weights, as convert_torch_weights.py writes them.

Each is an Orbax checkpoint of a backbone's variables, with metadata about where they come from and
what they fit.
"""

import math
import os
import pathlib
import shutil
import types
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from crn_jax.errors import UserError
from crn_jax.workdir import alone, files

_TABLE = "relative_position_bias_table"
_POSITIONS = "position_embedding"


def read_metadata(path: str | os.PathLike) -> dict:
  """What convert_torch_weights.py recorded: architecture, kind, preprocessing, source.

  Raises:
    UserError: if the path is no folder that it wrote.
  """
  path = pathlib.Path(path).absolute()
  try:
    with alone.checkpointer() as checkpointer:
      return dict(checkpointer.metadata(path).custom_metadata["backbone"])
  except Exception as error:  # Orbax raises many kinds.
    raise UserError(
      f"{path}: not a folder of backbone weights written by convert_torch_weights.py "
      f"({type(error).__name__}); convert the weights again"
    ) from error


def save_backbone(
  variables: dict,
  metadata: dict,
  path: str | os.PathLike,
  *,
  force: bool = False,
  beside: Mapping[str, pathlib.Path] = types.MappingProxyType({}),
) -> None:
  """Writes backbone variables as an Orbax checkpoint; the folder appears complete or not at all.

  Args:
    variables: {'params'[, 'batch_stats']} of the backbone, numpy arrays.
    metadata: see `read_metadata`; 'architecture' has the class of the
      backbone as 'module', and its arguments.
    path: folder to write.
    force: whether a folder that is there may be replaced.
    beside: name in the folder -> file to copy there, e.g. those of a tokenizer.

  Raises:
    UserError: if the path exists and `force` is not given.
  """
  if pathlib.Path(path).exists() and not force:
    raise UserError(f"{path}: exists already")
  # Nothing changes the arrays while they are written: Orbax need not copy them before.
  registry = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, ocp.type_handlers.ArrayHandler()),  # Without it Orbax warns.
  )
  with (
    files.replacing_folder(path) as partial,
    alone.checkpointer(type_handler_registry=registry) as checkpointer,
  ):
    checkpointer.save(
      partial, ocp.args.PyTreeSave(variables), custom_metadata={"backbone": metadata}
    )
    for name, file in beside.items():
      (partial / name).parent.mkdir(exist_ok=True)
      shutil.copyfile(file, partial / name)


def load_backbone(path: str | os.PathLike, like: dict) -> dict:
  """Reads backbone variables written by `save_backbone`.

  Relative position tables of another window are interpolated, and so are position tables of image
  towers for pictures of another size.

  Args:
    path: the folder.
    like: {'params'[, 'batch_stats']} of the backbone, for structure and shapes.

  Raises:
    UserError: if the folder holds other variables; names the differences.
  """
  with alone.checkpointer() as checkpointer:
    folder = pathlib.Path(path).absolute()
    structure = checkpointer.metadata(folder).item_metadata.tree
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
    loaded = checkpointer.restore(folder, restore_args=arrays)
  loaded = traverse_util.flatten_dict(loaded)
  expected = {k: v.shape for k, v in traverse_util.flatten_dict(like).items()}
  for name, shape in expected.items():
    if name[-1] == _TABLE and name in loaded and loaded[name].shape != shape:
      loaded[name] = resize_table(loaded[name], shape)
    if name[-1] == _POSITIONS and name[1:2] == ("image",) and name in loaded:
      loaded[name] = resize_positions(loaded[name], shape)
  found = {k: v.shape for k, v in loaded.items()}
  if found != expected:
    differences = [
      f"{'/'.join(k)}: {found.get(k, 'absent')} in the weights, {expected.get(k, 'absent')} in the "
      f"model"
      for k in sorted(found.keys() | expected.keys())
      if found.get(k) != expected.get(k)
    ]
    shown = "\n  ".join(differences)
    raise UserError(
      f"{path}: not the weights of this backbone, {len(differences)} differences:\n  {shown}\n"
      f"Check model.backbone and data.image_size, or convert the weights again."
    )
  return traverse_util.unflatten_dict(loaded)


def resize_table(table: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """A relative position table for another window, as timm interpolates it (after BEiT).

  Linear interpolation between knots whose distance grows geometrically from the centre, so that
  near offsets, which matter most, keep their values.

  Args:
    table: [(2 w - 1)^2, heads].
    shape: [(2 v - 1)^2, heads] of the result.

  Returns:
    The table; unchanged if it is not square or `shape` is not.
  """
  old, new = round(table.shape[0] ** 0.5), round(shape[0] ** 0.5)
  if old**2 != table.shape[0] or new**2 != shape[0] or not old % 2 or not new % 2 or old < 3:
    return table
  knots = _knots(old // 2, new // 2)
  offsets = np.arange(-(new // 2), new // 2 + 1)
  along = np.stack([np.interp(offsets, knots, row) for row in np.eye(old)], axis=1)  # [new, old]
  grid = table.reshape(old, old, -1)
  return (
    np.einsum("yi,xj,ijh->yxh", along, along, grid).reshape(-1, table.shape[1]).astype(table.dtype)
  )


def resize_positions(table: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """A position table for another grid of patches, bicubic as PyTorch interpolates it.

  A class token's row, the first, stays as it is. PyTorch's kernel has a = -0.75 and is not widened
  where the grid shrinks; JAX's has a = -0.5 and is, which gives other tables altogether.

  Args:
    table: [class tokens + n * n, width].
    shape: [class tokens + m * m, width] of the result.

  Returns:
    The table; unchanged if the grids are not square.
  """
  rows, wanted = table.shape[0], shape[0]
  first = next((c for c in (0, 1) if _is_square(rows - c) and _is_square(wanted - c)), None)
  if first is None or rows == wanted:
    return table
  old, new = math.isqrt(rows - first), math.isqrt(wanted - first)
  along = bicubic_weights(old, new)
  grid = table[first:].reshape(old, old, -1).astype(np.float64)
  resized = np.einsum("yi,xj,ijc->yxc", along, along, grid).reshape(new * new, -1)
  return np.concatenate([table[:first], resized.astype(table.dtype)])


def bicubic_weights(old: int, new: int) -> np.ndarray:
  """[new, old] weights of PyTorch's bicubic interpolation, `align_corners=False`, no antialias."""
  a = -0.75
  at = (np.arange(new) + 0.5) * old / new - 0.5
  weights = np.zeros((new, old))
  for offset in (-1, 0, 1, 2):
    source = np.floor(at) + offset
    t = np.abs(at - source)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    # Beyond the border its value goes on.
    column = np.clip(source, 0, old - 1).astype(int)
    np.add.at(weights, (np.arange(new), column), np.where(t <= 1, near, far))
  return weights


def _is_square(n: int) -> bool:
  return n > 0 and math.isqrt(n) ** 2 == n


def _knots(n: int, reach: int) -> np.ndarray:
  """Positions -x_n .. 0 .. x_n, where x_n = 1 + q + ... + q^(n - 1) is about `reach`."""
  low, high = 1.01, 1.5
  while high - low > 1e-6:
    ratio = (low + high) / 2
    if (1 - ratio**n) / (1 - ratio) > reach:
      high = ratio
    else:
      low = ratio
  positive = np.cumsum(ratio ** np.arange(n))
  return np.concatenate([-positive[::-1], [0.0], positive])
