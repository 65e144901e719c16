"""Reads `torch.save` files as data: nothing that a file names is imported, called or run.

A pickle is a program for a small stack machine. Here the machine is Python's own (`pickle`'s
written in Python), less every instruction that calls something: a global is a name and nothing
else, and only the few constructions that `torch.save` writes are carried out, by the code below.
Anything else is refused by name. PyTorch is not needed.
"""

import dataclasses
import io
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
  "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
  "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}  # fmt: skip

# Classes whose instances may stand in a file; they are read as `Stub`s whatever they are called.
_CLASSES = re.compile(
  r"(model|blocks|text_model|resnet|timm|torch\.nn\.modules|torchvision\.models)(\.\w+)*"
)
_CLASSES_BY_NAME = {("argparse", "Namespace")}
_ORDERED_DICT = ("collections", "OrderedDict")
_SETS = {("__builtin__", "set"), ("builtins", "set")}
_REBUILDS = {
  ("torch._utils", "_rebuild_tensor"),
  ("torch._utils", "_rebuild_tensor_v2"),
  ("torch._utils", "_rebuild_parameter"),
}

_MAX_PICKLE = 64 << 20  # Of the program alone, without the weights: usually about 100 kB.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class RefusedError(ValueError):
  """A file that holds something other than weights, or is damaged."""


class Global(NamedTuple):
  """The name of a class or function that a file asks for. Only a name."""

  module: str
  name: str

  def __str__(self) -> str:
    return f"{self.module}.{self.name}"


@dataclasses.dataclass
class Stub:
  """What is left of an object: the name of its class and its attributes."""

  cls: Global
  attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Storage:
  key: str
  dtype: np.dtype
  size: int


def read(path: str | os.PathLike) -> Any:
  """Reads a file that `torch.save` wrote, in the zip format or the one before PyTorch 1.6.

  Returns:
    The saved object: dictionaries, lists, numbers, strings; tensors as read-only numpy arrays,
    objects as `Stub`.

  Raises:
    RefusedError: if the file is damaged or holds anything that is not data; names it.
  """
  path = pathlib.Path(path)
  try:
    with open(path, "rb") as file:
      if zipfile.is_zipfile(file):
        return _read_zip(file)
      file.seek(0)
      return _read_legacy(file)
  except RefusedError as error:
    raise RefusedError(f"{path}: {error}") from None
  except OSError:
    raise
  except Exception as error:  # A hostile or damaged program fails the machine in many ways.
    raise RefusedError(
      f"{path}: not a readable PyTorch file ({type(error).__name__}: {error}); fetch it again"
    ) from error


def state_dict(module: Stub) -> dict[str, np.ndarray]:
  """Parameters and buffers of a pickled module under the names of its state dict.

  Raises:
    RefusedError: if the modules are nested in a way that no model is.
  """
  found: dict[str, np.ndarray] = {}
  _collect(module, "", found, depth=0)
  return found


def _collect(module, prefix: str, found: dict, depth: int) -> None:
  # A module that holds itself has no end; one that is shared at every level has 2^n names.
  if depth > 32 or len(found) > 100_000:
    raise RefusedError("modules nested without end")
  if not isinstance(module, Stub):
    raise RefusedError(f"{prefix[:-1] or 'the file'} is no module")
  local = module.attributes
  transient = local.get("_non_persistent_buffers_set", ())
  for group in ("_parameters", "_buffers"):
    for name, value in local.get(group, {}).items():
      if isinstance(value, np.ndarray) and not (group == "_buffers" and name in transient):
        found[prefix + name] = value
  for name, child in local.get("_modules", {}).items():
    if child is not None:
      _collect(child, f"{prefix}{name}.", found, depth + 1)


class _Machine(pickle._Unpickler):
  """Python's unpickler without the instructions that call, import or allocate by a number."""

  dispatch = dict(pickle._Unpickler.dispatch)
  for _opcode in (
    pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID,
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
  ):  # fmt: skip
    del dispatch[_opcode[0]]

  def __init__(self, file, tensor: Callable[..., np.ndarray], storages: dict | None = None):
    super().__init__(file, encoding="utf-8")
    self._tensor = tensor
    self.storages = {} if storages is None else storages

  def load(self):
    """As `pickle.Unpickler.load`; an instruction that is not allowed is named."""
    try:
      return super().load()
    except KeyError as error:
      if isinstance(error.args[0], int):
        code = bytes([error.args[0]])
        raise RefusedError(f"refused: pickle instruction {code!r}") from None
      raise

  def find_class(self, module: str, name: str) -> Global:
    wanted = Global(module, name)
    known = wanted in _REBUILDS | _SETS | _CLASSES_BY_NAME | {_ORDERED_DICT}
    storage = module == "torch" and name in _DTYPES
    allowed = name.isidentifier() and _CLASSES.fullmatch(module)
    if not (known or storage or allowed):
      raise RefusedError(
        f"refused: it asks for {wanted}, which is not part of a model. Do not load this file with "
        f"PyTorch unless you trust its author"
      )
    return wanted

  def persistent_load(self, pid) -> _Storage:
    kind, storage, key, _, size, *_ = pid
    dtype = isinstance(storage, Global) and storage.module == "torch" and _DTYPES.get(storage.name)
    if kind != "storage" or not dtype or not isinstance(key, str) or not _is_size(size):
      raise RefusedError(f"refused: persistent id {pid!r}")
    return self.storages.setdefault(key, _Storage(key, np.dtype(dtype), size))

  def load_reduce(self):
    args = self.stack.pop()
    self.stack[-1] = self._build(self.stack[-1], args)

  dispatch[pickle.REDUCE[0]] = load_reduce

  def load_newobj(self):
    args = self.stack.pop()
    cls = self.stack.pop()
    self.append(self._instance(cls, args))

  dispatch[pickle.NEWOBJ[0]] = load_newobj

  def load_build(self):
    state = self.stack.pop()
    target = self.stack[-1]
    if isinstance(target, Stub) and isinstance(state, dict):
      target.attributes.update(state)
    # Ordered dictionaries carry `_metadata`, the versions of modules: of no use.
    elif not (isinstance(target, dict) and isinstance(state, dict)):
      raise RefusedError(f"refused: state for {target!r:.100}")

  dispatch[pickle.BUILD[0]] = load_build

  def load_setitem(self):
    value = self.stack.pop()
    key = self.stack.pop()
    self._fill([key, value])

  dispatch[pickle.SETITEM[0]] = load_setitem

  def load_setitems(self):
    self._fill(self.pop_mark())

  dispatch[pickle.SETITEMS[0]] = load_setitems

  def load_dict(self):
    items = self.pop_mark()
    self.append({})
    self._fill(items)

  dispatch[pickle.DICT[0]] = load_dict

  def load_additems(self):
    items = self.pop_mark()
    self.stack[-1].update(_keys(items))

  dispatch[pickle.ADDITEMS[0]] = load_additems

  def load_frozenset(self):
    self.append(frozenset(_keys(self.pop_mark())))

  dispatch[pickle.FROZENSET[0]] = load_frozenset

  def _fill(self, items: list) -> None:
    target = self.stack[-1]
    if not isinstance(target, dict):
      raise RefusedError(f"refused: items for {target!r:.100}")
    target.update(zip(_keys(items[::2]), items[1::2], strict=True))

  def _build(self, function, args):
    if function == _ORDERED_DICT and args == ():
      return {}
    if function == _ORDERED_DICT and len(args) == 1:  # As Python 2 wrote it: a list of pairs.
      return dict(zip(_keys([k for k, _ in args[0]]), [v for _, v in args[0]], strict=True))
    if function in _SETS:
      return set(_keys(args[0]))
    if function == ("torch._utils", "_rebuild_parameter"):
      return args[0]
    if function in _REBUILDS:
      storage, offset, shape, strides = args[:4]
      return self._tensor(storage, offset, shape, strides)
    return self._instance(function, args)

  def _instance(self, cls, args):
    if not isinstance(cls, Global) or args != () or cls in _REBUILDS or cls.module == "torch":
      # repr would follow the arguments of a hostile file; the name is enough.
      raise RefusedError(f"refused: it calls {cls if isinstance(cls, Global) else type(cls)}")
    if cls == _ORDERED_DICT:
      return {}
    return Stub(cls)


def _read_zip(file) -> Any:
  size = os.fstat(file.fileno()).st_size
  archive = zipfile.ZipFile(file)
  entries = {entry.filename: entry for entry in archive.infolist()}
  programs = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
  if len(programs) != 1:
    raise RefusedError(
      f"a zip without exactly one data.pkl is no PyTorch file; it holds {sorted(entries)[:3]}"
    )
  # PyTorch never compresses, so nothing can grow on reading.
  if any(e.compress_type != zipfile.ZIP_STORED for e in entries.values()):
    raise RefusedError("refused: compressed entries, which torch.save does not write")
  if sum(e.file_size for e in entries.values()) > size:
    raise RefusedError(f"refused: its entries claim more bytes than its {size}")
  if entries[programs[0]].file_size > _MAX_PICKLE:
    raise RefusedError(f"refused: a pickle of {entries[programs[0]].file_size} bytes")
  prefix = programs[0].removesuffix("data.pkl")
  if (order := entries.get(f"{prefix}byteorder")) and archive.read(order) != b"little":
    raise RefusedError("written on a big-endian machine; save it again on another")
  loaded: dict[str, np.ndarray] = {}

  def tensor(storage, offset, shape, strides):
    if isinstance(storage, _Storage) and storage.key not in loaded:
      name = f"{prefix}data/{storage.key}"
      if name not in entries:
        raise RefusedError(f"storage {storage.key!r} is missing")
      _check_bytes(storage, entries[name].file_size)
      loaded[storage.key] = np.frombuffer(archive.read(entries[name]), storage.dtype)
    return _strided(loaded, storage, offset, shape, strides)

  return _Machine(io.BytesIO(archive.read(programs[0])), tensor).load()


def _read_legacy(file) -> Any:
  """Pickles (magic number, version, system, object, keys of storages), then the storages."""
  size = os.fstat(file.fileno()).st_size
  start = file.read(2)
  if start == b"PK":
    raise RefusedError("a zip file that is cut short; fetch it again")
  if start[:1] != pickle.PROTO:
    raise RefusedError("not a PyTorch file")
  file.seek(0)
  # Tensors are made before their storages are read: keep what they ask for, and fill it in later.
  storages: dict[str, _Storage] = {}
  zeros: dict[str, np.ndarray] = {}

  def tensor(storage, offset, shape, strides):
    if isinstance(storage, _Storage) and storage.key not in zeros:
      if sum(a.nbytes for a in zeros.values()) + storage.size * storage.dtype.itemsize > size:
        raise RefusedError(f"refused: its storages claim more bytes than its {size}")
      zeros[storage.key] = np.zeros(storage.size, storage.dtype)
    return _strided(zeros, storage, offset, shape, strides)

  def program():
    return _Machine(file, tensor, storages).load()

  if program() != _LEGACY_MAGIC:
    raise RefusedError("not a PyTorch file")
  program()
  if program().get("little_endian") is not True:
    raise RefusedError("written on a big-endian machine; save it again on another")
  content = program()
  for key in program():
    if key not in storages:
      raise RefusedError(f"storage {key!r} belongs to no tensor")
    storage = storages[key]
    count = int.from_bytes(file.read(8), "little")
    if count != storage.size:
      raise RefusedError(
        f"refused: storage {key!r} claims {storage.size} elements and holds {count}"
      )
    data = file.read(count * storage.dtype.itemsize)
    _check_bytes(storage, len(data))
    if key in zeros:
      zeros[key][:] = np.frombuffer(data, storage.dtype)
  return content


def _check_bytes(storage: _Storage, n_bytes: int) -> None:
  if n_bytes != storage.size * storage.dtype.itemsize:
    raise RefusedError(
      f"refused: storage {storage.key!r} claims {storage.size} elements of {storage.dtype} and "
      f"holds {n_bytes} bytes"
    )


def _strided(arrays: dict, storage, offset, shape, strides) -> np.ndarray:
  """A view of a storage, inside its bounds."""
  if not isinstance(storage, _Storage):
    raise RefusedError("refused: a tensor without a storage")
  base = arrays[storage.key]
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or len(shape) > 8 or not all(map(_is_size, numbers)):
    raise RefusedError(f"refused: a tensor of shape {shape!r:.100}, strides {strides!r:.100}")
  count = 1
  for side in shape:
    count *= side
  last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
  if count > base.size or (count and last >= base.size):
    raise RefusedError(
      f"refused: a tensor of shape {tuple(shape)} reaches beyond storage {storage.key!r} of "
      f"{base.size} elements"
    )
  if not count:
    return np.zeros(shape, base.dtype)
  return np.lib.stride_tricks.as_strided(
    base[offset:], shape, [stride * base.itemsize for stride in strides], writeable=False
  )


def _is_size(value) -> bool:
  return type(value) is int and 0 <= value < 1 << 48


def _keys(values) -> list:
  # Nothing else is a key in these files, and a deep tuple would take forever to hash.
  for value in values:
    if type(value) not in (str, int):
      raise RefusedError(f"refused: a key of type {type(value).__name__}")
  return values
