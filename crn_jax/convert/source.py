"""Reads weights that somebody else's program wrote: a file, or a folder with one."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tqdm

from crn_jax.convert import pickles, safetensors_files, torch_files
from crn_jax.errors import UserError

_IN_FOLDERS = (
  "model.safetensors", "model.safetensors.index.json",
  "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip

_LARGE = 1 << 30  # Bytes from which on the progress is shown.

# Where training programs keep the weights in a checkpoint; the first that is there is taken.
_KEYS = ("state_dict", "model", "model_state_dict", "net", "teacher")

_OTHER_FORMATS = (
  (b"version https://git-lfs", "a Git LFS pointer in the place of the file: run `git lfs pull`"),
  (b"<", "a web page in the place of the file; fetch it again"),
  (b"\x89HDF", "an HDF5 file, as Keras writes it; only PyTorch's weights can be converted"),
)


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights as found.

  Attributes:
    path: the file, or the index of several.
    files: the files that hold the tensors.
    tensors: names as in the file -> arrays; a file of `torch.save` is read when one is asked for.
    left_out: what in the file is no weight -> why it is left out.
    key: where in the file's dictionary the weights are, e.g. 'state_dict'; '' if it is itself.
    module: the pickled module, if the file holds one.
  """

  path: pathlib.Path
  files: tuple[pathlib.Path, ...]
  tensors: Mapping[str, np.ndarray]
  left_out: dict[str, str] = dataclasses.field(default_factory=dict)
  key: str = ""
  module: pickles.Stub | None = None


def read(path: str | os.PathLike) -> Source:
  """Reads .safetensors, or what `torch.save` wrote; never runs code from the file.

  Args:
    path: a file, the index of several (*.index.json), or a folder with one of `_IN_FOLDERS`.

  Raises:
    UserError: no such file, it is damaged, or holds something other than weights.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    found = [path / name for name in _IN_FOLDERS if (path / name).exists()]
    if not found:
      raise UserError(f"{path}: none of {', '.join(_IN_FOLDERS)} in this folder")
    path = found[0]
  if not path.exists():
    raise UserError(f"{path}: not found")
  return _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)


def sha256(files: Iterable[pathlib.Path]) -> str:
  """Of the files' bytes, one after the other; large ones show their progress."""
  files = list(files)
  total = sum(path.stat().st_size for path in files)
  digest = hashlib.sha256()
  with tqdm.tqdm(
    total=total, desc="SHA-256", unit="B", unit_scale=True, leave=False, disable=total < _LARGE
  ) as bar:
    for path in files:
      with open(path, "rb") as file:
        while block := file.read(1 << 24):
          digest.update(block)
          bar.update(len(block))
  return digest.hexdigest()


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file; {} if there is no such file.

  Raises:
    UserError: if the file is not valid.
  """
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise UserError(f"{path}: not valid JSON ({error})") from error
  return content if isinstance(content, dict) else {}


def _read_file(path: pathlib.Path) -> Source:
  with open(path, "rb") as file:
    head = file.read(32)
  if not head:
    raise UserError(f"{path}: empty file; fetch it again")
  # Before pickles: the length of a header may begin like one.
  if head[8:9] == b"{":
    return Source(path, (path,), safetensors_files.read(path))
  if head.startswith((b"PK", b"\x80")):
    return _torch_file(path)
  for start, what in _OTHER_FORMATS:
    if head.startswith(start):
      raise UserError(f"{path}: {what}")
  raise UserError(
    f"{path}: neither a safetensors file nor one of torch.save: it begins with {head[:8]!r}"
  )


def _read_shards(index: pathlib.Path) -> Source:
  """The files that an index names, which stand beside it."""
  names = read_json(index).get("weight_map")
  if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
    raise UserError(f"{index}: no weight_map (name of a tensor -> file) in it")
  shards = sorted(set(names.values()))
  if outside := [shard for shard in shards if pathlib.PurePath(shard).name != shard]:
    raise UserError(f"{index}: refused: it names files outside of its folder: {outside[:3]}")
  if absent := [shard for shard in shards if not (index.parent / shard).is_file()]:
    raise UserError(f"{index}: files that it names are not there: {', '.join(absent)}")
  read_ones = {shard: _read_file(index.parent / shard) for shard in shards}
  wrong = [f"{n} ({shard})" for n, shard in names.items() if n not in read_ones[shard].tensors]
  wrong += [n for source in read_ones.values() for n in source.tensors if n not in names]
  if wrong:
    raise UserError(
      f"{index}: {len(wrong)} tensors are in the index or in its files, but not in both: "
      f"{', '.join(wrong[:5])}. Fetch the folder again"
    )
  tensors = collections.ChainMap(*(source.tensors for source in read_ones.values()))
  return Source(index, tuple(index.parent / shard for shard in shards), tensors)


class _TorchTensors(Mapping):
  """Reads a tensor when it is asked for: a checkpoint holds much that is not wanted."""

  def __init__(self, tensors: dict[str, pickles.Tensor]):
    self._tensors = tensors

  def __getitem__(self, name: str) -> np.ndarray:
    return self._tensors[name].read()

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)


def _torch_file(path: pathlib.Path) -> Source:
  content = torch_files.read(path)
  found = _mappings(content)
  if not isinstance(content, dict):
    raise UserError(f"{path}: holds a {type(content).__name__}, not weights")
  if not found:
    raise UserError(f"{path}: holds no tensors; its keys are {_listed(content)}")
  key = _key_of_weights(found)
  if key is None:
    raise UserError(
      f"{path}: holds several sets of tensors, and which are the weights is not known: "
      f"{_listed(found)}. Save one of them to a file of its own with torch.save"
    )
  weights = found[key]
  left_out = {}
  if key:
    others = [str(k) for k in content if isinstance(k, str) and k != key.split(".")[0]]
    left_out = dict.fromkeys(others, "not the model")
  if _is_module(weights):
    tensors = torch_files.state_dict(weights)
    return Source(path, (path,), _TorchTensors(tensors), left_out, key, weights)
  tensors = {n: t for n, t in weights.items() if _is_tensor(n, t)}
  left_out |= {n: "not a tensor" for n in weights if isinstance(n, str) and n not in tensors}
  return Source(path, (path,), _TorchTensors(tensors), left_out, key)


def _key_of_weights(found: dict[str, dict]) -> str | None:
  for wanted in _KEYS:
    keys = [key for key in found if key.split(".")[-1] == wanted]
    if wanted in keys or len(keys) == 1:
      return wanted if wanted in keys else keys[0]
  largest = max(found, key=lambda key: _size(found[key]))
  return largest if not largest or len(found.keys() - {""}) == 1 else None


def _mappings(content: Any) -> dict[str, dict]:
  """Dictionaries and modules with tensors, at most two keys deep: keys joined by dots -> each."""
  found, seen = {}, set()
  waiting = collections.deque([("", content)])
  while waiting:
    key, value = waiting.popleft()
    if not isinstance(value, dict) or id(value) in seen:
      continue
    seen.add(id(value))
    if _is_module(value) or any(_is_tensor(n, t) for n, t in value.items()):
      found[key] = value
    if key.count(".") < 1 and not _is_module(value):
      waiting += [(f"{key}.{n}".lstrip("."), v) for n, v in value.items() if isinstance(n, str)]
  return found


def _is_module(value: Any) -> bool:
  return isinstance(value, pickles.Stub) and "_modules" in value.attributes


def _is_tensor(name: Any, value: Any) -> bool:
  return isinstance(name, str) and isinstance(value, pickles.Tensor)


def _size(value: dict) -> int:
  return len(value.attributes["_modules"]) if _is_module(value) else len(value)


def _listed(names: Iterable) -> str:
  names = [repr(name)[:50] for name in names if isinstance(name, str)]
  return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
