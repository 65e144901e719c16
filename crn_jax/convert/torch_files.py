"""Reads `torch.save` files, in the zip format or the one before PyTorch 1.6, without PyTorch."""

import contextlib
import functools
import io
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterator
from typing import Any

from crn_jax.convert import pickles
from crn_jax.convert.pickles import RefusedError

_MAX_PICKLE = 64 << 20  # Of the program alone, without the weights: usually about 100 kB.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read(path: str | os.PathLike) -> Any:
  """Reads a file that `torch.save` wrote, in the zip format or the one before PyTorch 1.6.

  Returns:
    The saved object: dictionaries, lists, numbers, strings; tensors as `pickles.Tensor`,
    modules and other objects as `pickles.Stub`.

  Raises:
    RefusedError: if the file is damaged or holds anything that is not data; names it.
  """
  with _naming(path), open(path, "rb") as file:
    return (_read_zip if file.read(2) == b"PK" else _read_legacy)(pathlib.Path(path))


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
  try:
    yield
  except RefusedError as error:
    raise RefusedError(f"{path}: {error}") from None
  except OSError:
    raise
  except Exception as error:  # A hostile or damaged program fails the machine in many ways.
    raise RefusedError(
      f"{path}: not a readable PyTorch file ({type(error).__name__}: {error}); fetch it again"
    ) from error


def _read_zip(path: pathlib.Path) -> Any:
  size = path.stat().st_size
  archive = zipfile.ZipFile(path)
  entries = {entry.filename: entry for entry in archive.infolist()}
  programs = [name for name in entries if name.split("/", 1)[-1] == "data.pkl"]
  if len(programs) != 1:
    raise RefusedError(
      f"a zip without exactly one data.pkl is no PyTorch file; it holds {sorted(entries)[:3]}"
    )
  prefix = programs[0].removesuffix("data.pkl")
  if f"{prefix}constants.pkl" in entries:
    raise RefusedError("a TorchScript program; save its state_dict() with torch.save")
  # PyTorch never compresses, so nothing can grow on reading.
  if any(e.compress_type != zipfile.ZIP_STORED for e in entries.values()):
    raise RefusedError("refused: compressed entries, which torch.save does not write")
  if sum(e.file_size for e in entries.values()) > size:
    raise RefusedError(f"refused: its entries claim more bytes than its {size}")
  if entries[programs[0]].file_size > _MAX_PICKLE:
    raise RefusedError(f"refused: a pickle of {entries[programs[0]].file_size} bytes")
  if (order := entries.get(f"{prefix}byteorder")) and archive.read(order) != b"little":
    raise RefusedError("written on a big-endian machine; save it again on another")

  def bytes_of(entry):
    with _naming(path):
      return archive.read(entry)

  unpickler = pickles.Unpickler(io.BytesIO(archive.read(programs[0])))
  content = unpickler.load()
  for key, storage in unpickler.storages.items():
    entry = entries.get(f"{prefix}data/{key}")
    if entry is None:
      raise RefusedError(f"storage {key!r:.50} is missing")
    storage.check(entry.file_size)
    storage.read = functools.partial(bytes_of, entry)
  return content


def _read_legacy(path: pathlib.Path) -> Any:
  """Pickles (magic number, version, system, object, keys of storages), then the storages."""
  with open(path, "rb") as file:
    if file.read(1) != pickle.PROTO:
      raise RefusedError("not a PyTorch file")
    file.seek(0)
    programs = io.BytesIO(file.read(_MAX_PICKLE))
    if pickles.Unpickler(programs).load() != _LEGACY_MAGIC:
      raise RefusedError("not a PyTorch file")
    pickles.Unpickler(programs).load()
    if pickles.Unpickler(programs).load().get("little_endian") is not True:
      raise RefusedError("written on a big-endian machine; save it again on another")
    unpickler = pickles.Unpickler(programs)
    content = unpickler.load()
    keys = pickles.Unpickler(programs).load()
    start = programs.tell()
    if any(type(key) is not str for key in keys) or sorted(keys) != sorted(unpickler.storages):
      raise RefusedError("refused: its storages are not those of its tensors")
    for storage in map(unpickler.storages.get, keys):
      file.seek(start)
      count = int.from_bytes(file.read(8), "little")
      storage.check(count * (storage.dtype.itemsize if storage.dtype else 1))
      storage.read = functools.partial(_bytes_at, path, start + 8, storage.n_bytes)
      start += 8 + storage.n_bytes
    if start > path.stat().st_size:
      raise RefusedError("cut short; fetch it again")
  return content


def _bytes_at(path: pathlib.Path, start: int, n_bytes: int) -> bytes:
  with open(path, "rb") as file:
    file.seek(start)
    return file.read(n_bytes)


def state_dict(module: pickles.Stub) -> dict[str, pickles.Tensor]:
  """Parameters and buffers of a pickled module under the names of its state dict.

  Raises:
    RefusedError: if the modules are nested in a way that no model is.
  """
  found: dict[str, pickles.Tensor] = {}
  waiting = [("", module)]
  # A module that holds itself has no end; one that is shared at every level has 2^n names.
  for _ in range(10_000):
    if not waiting:
      return found
    prefix, module = waiting.pop()
    if not isinstance(module, pickles.Stub):
      raise RefusedError(f"{prefix[:100]} is no module of a model")
    if len(prefix) > 1000 or len(waiting) > 10_000:
      break
    transient = module.attributes.get("_non_persistent_buffers_set")
    transient = transient if isinstance(transient, set) else ()
    tensors = _items(module, "_parameters")
    tensors += [item for item in _items(module, "_buffers") if item[0] not in transient]
    found |= {prefix + name: t for name, t in tensors if isinstance(t, pickles.Tensor)}
    waiting += [(f"{prefix}{name}.", m) for name, m in _items(module, "_modules") if m is not None]
  raise RefusedError("modules nested without end")


def _items(module: pickles.Stub, group: str) -> list[tuple[str, Any]]:
  found = module.attributes.get(group)
  items = found.items() if isinstance(found, dict) else ()
  return [(name, value) for name, value in items if type(name) is str and len(name) < 1000]
