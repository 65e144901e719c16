"""Unpickles what `torch.save` wrote as data: nothing that it names is imported, called or run.

A pickle is a program for a small stack machine. Python's unpickler runs it, but whatever class or
function the program asks for, it gets one of the inert classes below, or is refused by name.
`_check` reads the program before, for what would go past that or exhaust the machine.
"""

import functools
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable

import ml_dtypes
import numpy as np

from crn_jax.errors import UserError

_STORAGES = {
  "torch.FloatStorage": np.float32, "torch.DoubleStorage": np.float64,
  "torch.HalfStorage": np.float16, "torch.BFloat16Storage": ml_dtypes.bfloat16,
  "torch.LongStorage": np.int64, "torch.IntStorage": np.int32, "torch.ShortStorage": np.int16,
  "torch.CharStorage": np.int8, "torch.ByteStorage": np.uint8, "torch.BoolStorage": np.bool_,
  "torch.ComplexFloatStorage": np.complex64, "torch.ComplexDoubleStorage": np.complex128,
  "torch.storage.UntypedStorage": None,
}  # fmt: skip
# Types without a storage of their own.
_DTYPES = {
  "torch.uint16": np.uint16, "torch.uint32": np.uint32, "torch.uint64": np.uint64,
  "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
  "torch.float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
  "torch.float8_e5m2": ml_dtypes.float8_e5m2,
  "torch.float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
  "torch.float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip

_MODULES = re.compile(
  r"(model|blocks|text_model|resnet|timm|torch\.nn\.(modules|parallel)|torchvision\.models)(\.\w+)+"
)
# What training programs keep beside the weights: numbers of NumPy, settings, paths, histories; and
# enumerations in timm's modules.
_HARMLESS = re.compile(
  r"argparse\.Namespace|_codecs\.encode|collections\.(deque|Counter|defaultdict)"
  r"|builtins\.(frozenset|bytes|bytearray|complex|slice|range|xrange)"
  r"|datetime\.\w+|decimal\.Decimal|uuid\.UUID|pathlib(\._local)?\.\w*Path"
  r"|numpy\.(dtype|ndarray)|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)"
  r"|numeric\._frombuffer)|numpy\.random(\.\w+)+"
  r"|torch\.(Size|device|Tensor|Generator)|torch\.serialization\._get_layout"
  r"|torch\.(optim|utils\.data)(\.\w+)*\.[A-Z]\w*"
  r"|(timm|omegaconf|ml_collections|easydict|addict|yacs|fvcore|lightning|pytorch_lightning"
  r"|lightning_fabric|mmengine|mmcv|mmdet|transformers|accelerate)(\.\w+)*\.[A-Z]\w*"
)
# Names that stand for themselves.
_NAMES = re.compile(
  r"torch\.(float|bfloat|u?int|complex|bool|long|double|half|strided|sparse)\w*|typing\.\w+"
  r"|builtins\.(dict|list|tuple|int|long|str|unicode|float|bool|object)"
)


class RefusedError(UserError):
  """A file that holds something other than weights, or is damaged."""


class _Inert:
  """A class that a program may call; what it returns may not be given a state."""

  def __setstate__(self, state):
    raise RefusedError("refused: state for something that has none")


class Stub(dict):
  """What is left of an object: its attributes, and its items if it is a dictionary."""

  def __new__(cls, *arguments):
    if arguments:
      raise RefusedError("refused: it calls a class of a model with arguments")
    stub = super().__new__(cls)
    stub.attributes = {}
    return stub

  def __setstate__(self, state):
    # (attributes, slots) where a class has slots.
    self.attributes |= state if isinstance(state, dict) else {}


class _Harmless(Stub):
  """Also takes arguments, items and states of every kind, and forgets them."""

  def __new__(cls, *_):
    return super().__new__(cls)

  def __init__(self, *_):
    super().__init__()

  def append(self, _):
    pass

  add = append
  __eq__, __hash__ = object.__eq__, object.__hash__  # It may be a key.


class _OrderedDict(dict):
  def __init__(self, pairs=()):  # Python 2 wrote a list of pairs.
    if not all(type(key) is str for key, _ in pairs):
      raise RefusedError("refused: a key that is no string")
    super().__init__(pairs)

  def __setstate__(self, state):
    """Forgets `_metadata`, the versions of modules."""


class _Set(_Inert):
  def __new__(cls, items=()):
    return {item for item in items if type(item) is str}


class _Attribute(_Inert):
  """`getattr`, which Python 2 wrote for the method of a class."""

  def __new__(cls, owner, name):
    if owner is not _Harmless:
      raise RefusedError(_asks_for("builtins.getattr"))
    return _Harmless()


class Storage(_Inert):
  """The numbers of one or several tensors.

  Attributes:
    dtype: type of the numbers; None if the tensors say it.
    n_bytes: how many bytes they are.
    read: gives the bytes.
  """

  def __init__(self, dtype: type | None, size: int):
    self.dtype = None if dtype is None else np.dtype(dtype)
    self.n_bytes = size if dtype is None else size * self.dtype.itemsize
    self.read: Callable[[], bytes] | None = None

  def check(self, found: int) -> None:
    """Raises RefusedError if the file holds another number of bytes."""
    if found != self.n_bytes:
      raise RefusedError(f"refused: a storage claims {self.n_bytes} bytes and holds {found}")

  @functools.cached_property
  def content(self) -> bytes:
    return self.read()


class Tensor(_Inert):
  """A tensor of a file, inside the bounds of its storage; its values are read when asked for."""

  # The arguments of torch._utils._rebuild_tensor, _v2 and _v3; only the last has a type.
  def __new__(cls, storage, offset, shape, strides, requires_grad=None, hooks=None, dtype="", *_):
    if not isinstance(storage, Storage):
      raise RefusedError("refused: a tensor without a storage")
    if storage.dtype is None and not (type(dtype) is str and dtype in _DTYPES):
      raise RefusedError(f"a tensor of {dtype if type(dtype) is str else 'an unknown type'}")
    tuples = type(shape) is type(strides) is tuple and len(shape) == len(strides) <= 8
    if not tuples or not all(map(_is_size, (offset, *shape, *strides))):
      raise RefusedError("refused: a tensor whose offset, shape and strides are no sizes")
    tensor = super().__new__(cls)
    tensor.storage, tensor.offset, tensor.shape, tensor.strides = storage, offset, shape, strides
    tensor.dtype = storage.dtype or np.dtype(_DTYPES[dtype])
    last = offset + sum((side - 1) * step for side, step in zip(shape, strides, strict=True))
    size = storage.n_bytes // tensor.dtype.itemsize
    if math.prod(shape) > size or (math.prod(shape) and last >= size):
      raise RefusedError(
        f"refused: a tensor of shape {shape} reaches beyond its storage of {size} elements"
      )
    return tensor

  def read(self) -> np.ndarray:
    """The values, read-only.

    Raises:
      RefusedError: if the file is damaged there.
    """
    if not math.prod(self.shape):
      return np.zeros(self.shape, self.dtype)
    size = self.dtype.itemsize
    steps = [step * size for step in self.strides]
    return np.ndarray(self.shape, self.dtype, self.storage.content, self.offset * size, steps)


class _Parameter(_Inert):
  """`torch._utils._rebuild_parameter`: a tensor, and what training needs."""

  def __new__(cls, tensor, *_):
    if not isinstance(tensor, Tensor):
      raise RefusedError("refused: a parameter that is no tensor")
    return tensor


class _TensorWithState(_Inert):
  """`torch._tensor._rebuild_from_type_v2`: a tensor, and attributes that somebody gave it."""

  def __new__(cls, rebuild, kind, arguments, state):
    if rebuild not in (Tensor, _Parameter):
      raise RefusedError("refused: a tensor of a class of its own")
    return rebuild(*arguments)


_STAND_INS = {
  "collections.OrderedDict": _OrderedDict,
  "builtins.set": _Set,
  "builtins.getattr": _Attribute,
  "torch._utils._rebuild_tensor": Tensor,
  "torch._utils._rebuild_tensor_v2": Tensor,
  "torch._utils._rebuild_tensor_v3": Tensor,
  "torch._utils._rebuild_parameter": _Parameter,
  "torch._utils._rebuild_parameter_with_state": _Parameter,
  "torch._tensor._rebuild_from_type_v2": _TensorWithState,
}


class Unpickler(pickle.Unpickler):
  """Unpickles data alone. `storages` are those that the program asked for, by key."""

  def __init__(self, programs: io.BytesIO):
    start = programs.tell()
    _check(programs)
    programs.seek(start)
    super().__init__(programs, encoding="utf-8", errors="replace")
    self.storages: dict[str, Storage] = {}

  def find_class(self, module: str, name: str) -> type | str:
    wanted = f"{module.replace('__builtin__', 'builtins')}.{name}"
    if wanted in _STAND_INS:
      return _STAND_INS[wanted]
    if wanted in _STORAGES or _NAMES.fullmatch(wanted):
      return wanted
    if name.isidentifier() and _HARMLESS.fullmatch(wanted):
      return _Harmless
    if name.isidentifier() and _MODULES.fullmatch(wanted):
      return Stub
    raise RefusedError(_asks_for(wanted))

  def persistent_load(self, pid) -> Storage | type:
    # Before PyTorch 1.6 a module's class came with its source.
    if len(pid) == 4 and any(pid[1] is stand_in for stand_in in (Stub, _Harmless)):
      return pid[1]
    kind, name, key, _, size, *view = pid
    strings = type(kind) is type(name) is type(key) is str
    if not strings or kind != "storage" or name not in _STORAGES or not _is_size(size):
      raise RefusedError("refused: a persistent id that is no storage")
    if any(part is not None for part in view):
      raise RefusedError("a storage that is part of another; save the file again with new PyTorch")
    asked = Storage(_STORAGES[name], size)
    storage = self.storages.setdefault(key, asked)
    if (storage.dtype, storage.n_bytes) != (asked.dtype, asked.n_bytes):
      raise RefusedError(f"refused: two storages with the key {key:.50}")
    return storage


def _asks_for(wanted: str) -> str:
  return (
    f"refused: it asks for {wanted:.200}, which is not part of a model. Do not load this file with "
    f"PyTorch unless you trust its author"
  )


_MAX_INSTRUCTIONS = 4_000_000  # A model of 1,000 tensors has 30,000; one makes up to 200 bytes.
# Extensions go past `find_class`; no pickler of `torch.save` writes the others.
_REFUSED = {"EXT1", "EXT2", "EXT4", "PUT", "GET"}
_PUTS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"BINGET", "LONG_BINGET"}
# Instructions that hash: which of the values that they take are keys.
_KEYS = {
  "SETITEM": slice(1, 2), "SETITEMS": slice(0, None, 2), "DICT": slice(0, None, 2),
  "ADDITEMS": slice(None), "FROZENSET": slice(None),
}  # fmt: skip


def _check(program: io.BytesIO) -> None:
  """Follows a program without carrying it out, for what would exhaust the unpickler.

  Nested tuples as keys take forever to hash, or more stack than there is; large numbers have the
  same hash; the memo is as long as its largest index; one instruction makes a whole object.

  Raises:
    RefusedError: names the instruction.
  """
  # Of each value: whether it may not be a key. What calls return is one of the classes above.
  stack: list[bool] = []
  memo: dict[int, bool] = {}
  marks: list[int] = []
  for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
    name, taken = opcode.name, opcode.stack_before
    if name in _REFUSED:
      raise RefusedError(f"refused: pickle instruction {name}")
    if count > _MAX_INSTRUCTIONS:
      raise RefusedError(f"refused: more than {_MAX_INSTRUCTIONS} pickle instructions")
    if name in _PUTS:
      index = len(memo) if argument is None else argument
      if index > count:
        raise RefusedError(f"refused: pickle instruction {name} with index {index}")
      memo[index] = stack[-1]
    elif name in _GETS:
      stack.append(memo[argument])
    elif name == "DUP":
      stack.append(stack[-1])
    elif name == "MARK":
      marks.append(len(stack))
    elif name == "POP" and marks and marks[-1] == len(stack):
      marks.pop()
    else:
      marked = pickletools.markobject in taken
      start = marks.pop() if marked else len(stack) - len(taken)
      if name in _KEYS and any(stack[start:][_KEYS[name]]):
        raise RefusedError(f"refused: pickle instruction {name} with a tuple or huge number as key")
      del stack[start - (taken.index(pickletools.markobject) if marked else 0) :]
      large = isinstance(argument, int) and argument.bit_length() > 64
      stack += [large or made.name in ("tuple", "frozenset") for made in opcode.stack_after]


def _is_size(value) -> bool:
  return type(value) is int and 0 <= value < 1 << 48
