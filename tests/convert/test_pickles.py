"""`torch.save` files are read as data: what PyTorch wrote, exactly; what does more, not at all."""

import argparse
import collections
import copyreg
import datetime
import io
import pathlib
import pickle
import sys
import types
import zipfile
from typing import Any

import numpy as np
import pytest

from crn_jax.convert import pickles, torch_files
from crn_jax.errors import UserError
from tests.torch_models import torch


class Call:
  """Pickles as a call of a function."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def write_zip(path, program: bytes, storages=(), compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", program)
    for key, data in storages:
      archive.writestr(f"archive/data/{key}", data)
  return path


def write_legacy(path, program: bytes):
  head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
  path.write_bytes(b"".join([*head, program, pickle.dumps([], 2)]))
  return path


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_every_type_and_layout(legacy, tmp_path):
  base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
  content = collections.OrderedDict(
    plain=base, transposed=base.T, part=base[1:3, ::2], scalar=torch.tensor(3), empty=base[:0],
    double=base.double(), half=base.half(), bfloat16=base.bfloat16(), flags=base > 3,
    parameter=torch.nn.Parameter(base), bytes=base.byte(),
  )  # fmt: skip
  torch.save({"state": content, "n": [1, "a", None, 0.5]}, tmp_path / "f.pt",
             _use_new_zipfile_serialization=not legacy)  # fmt: skip
  found = torch_files.read(tmp_path / "f.pt")
  assert found["n"] == [1, "a", None, 0.5]
  assert found["state"].keys() == content.keys()
  for name, tensor in content.items():
    value = found["state"][name].read()
    assert value.shape == tensor.shape, name
    assert not value.flags.writeable or not value.size
    np.testing.assert_array_equal(value.astype(np.float64), tensor.detach().double().numpy())


def made_up_class(monkeypatch, module_name, name, base=object):
  """A class of a library that is not needed here, as far as a pickle knows it."""
  module = types.ModuleType(module_name)
  cls = type(name, (base,), {"__module__": module_name, "min": lambda self: 0})
  setattr(module, name, cls)
  cls.min.__module__, cls.min.__qualname__ = module_name, f"{name}.min"
  *parents, _ = module_name.split(".")
  for i in range(len(parents)):
    monkeypatch.setitem(sys.modules, ".".join(parents[: i + 1]), types.ModuleType("parent"))
  monkeypatch.setitem(sys.modules, module_name, module)
  return cls


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_programs_keep_is_harmless(legacy, protocol, tmp_path, monkeypatch):
  settings = made_up_class(monkeypatch, "omegaconf.dictconfig", "DictConfig")()
  settings._content = {"lr": 0.1, "type": Any, "ref": dict}
  attributes = made_up_class(
    monkeypatch, "pytorch_lightning.utilities.parsing", "AttributeDict", dict
  )
  history = made_up_class(monkeypatch, "mmengine.logging.history_buffer", "HistoryBuffer")
  content = {
    "model": {"weight": torch.ones(2)},
    "numpy": [np.float32(0.5), np.int64(3), np.zeros(3), np.dtype("float32"), np.bool_(True)],
    "torch": [torch.float32, torch.Size([1, 2]), torch.device("cpu"), torch.strided],
    "paths": [pathlib.Path("a/b"), pathlib.PureWindowsPath("c")],
    "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"), out=pathlib.Path("x")),
    "counts": collections.defaultdict(int, a=1),
    "last": collections.deque([1, 2]),
    "bytes": b"\x00\xff",
    "sets": [frozenset("ab"), {1, 2}],
    "when": datetime.datetime(2020, 1, 1),
    "random": [np.random.default_rng(0), np.random.default_rng(0).bit_generator.state],
    "labels": {np.int64(1): "dress"},
    "optimizer": torch.optim.AdamW([torch.zeros(2)]).state_dict(),
    "settings": [settings, attributes(lr=0.1)],
    "history": [history(), *([history.min] if protocol == 2 else [])],
  }
  torch.save(content, tmp_path / "f.pt", pickle_protocol=protocol,
             _use_new_zipfile_serialization=not legacy)  # fmt: skip
  found = torch_files.read(tmp_path / "f.pt")
  assert found.keys() == content.keys()
  np.testing.assert_array_equal(found["model"]["weight"].read(), [1, 1])
  assert found["args"].attributes["lr"] == 0.1


def test_tensors_with_attributes_are_tensors(tmp_path):
  tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.zeros(3))
  tensor.mine = parameter.mine = 1
  torch.save([tensor, parameter], tmp_path / "f.pt")
  np.testing.assert_array_equal(torch_files.read(tmp_path / "f.pt")[0].read(), [1, 1])
  np.testing.assert_array_equal(torch_files.read(tmp_path / "f.pt")[1].read(), [0, 0, 0])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint16"])
def test_types_without_a_storage_of_their_own(name, tmp_path):
  tensor = torch.tensor([0.5, 2, 448]).to(getattr(torch, name))
  torch.save(tensor, tmp_path / "f.pt")
  found = torch_files.read(tmp_path / "f.pt").read()
  assert found.dtype.name == name
  np.testing.assert_array_equal(found.astype(np.float32), tensor.to(torch.float32).numpy())


@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda: torch.eye(2).to_sparse(), r"torch\._utils\._rebuild_sparse_tensor"),
    (lambda: torch.empty(2, device="meta"), r"torch\._utils\._rebuild_meta_tensor_no_storage"),
    (lambda: torch.empty(2, dtype=torch.float4_e2m1fn_x2), r"torch\.float4_e2m1fn_x2"),
  ],
)
def test_other_tensors_are_refused_by_name(make, told, tmp_path):
  torch.save(make(), tmp_path / "f.pt")
  with pytest.raises(UserError, match=told):
    torch_files.read(tmp_path / "f.pt")


def test_damage_inside_of_a_tensor_is_told(tmp_path):
  torch.save({"a": torch.ones(1000)}, tmp_path / "f.pt")
  content = bytearray((tmp_path / "f.pt").read_bytes())
  content[content.find(np.ones(4, np.float32).tobytes()) + 400] ^= 1
  (tmp_path / "f.pt").write_bytes(content)
  tensor = torch_files.read(tmp_path / "f.pt")["a"]
  with pytest.raises(UserError, match=r"f.pt: not a readable PyTorch file .*CRC"):
    tensor.read()


def test_programs_of_torch_script_are_named(tmp_path):
  torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "f.pt")
  with pytest.raises(UserError, match=r"a TorchScript program; save its state_dict\(\)"):
    torch_files.read(tmp_path / "f.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_modules_become_stubs_with_the_names_of_their_state_dict(legacy, tmp_path):
  module = torch.nn.Sequential(
    torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Sequential(torch.nn.LSTM(4, 2))
  )
  module.register_buffer("transient", torch.ones(1), persistent=False)
  torch.save(module, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
  stub = torch_files.read(tmp_path / "m.pt")
  found = torch_files.state_dict(stub)
  expected = module.state_dict()
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name].read(), value.numpy())


HOSTILE = {
  "os.system": (Call(__import__("os").system, "touch PROOF"), r"(posix|nt)\.system"),
  "eval": (Call(eval, "open('PROOF', 'w')"), r"(__builtin__|builtins)\.eval"),
  "nested": ({"state_dict": [{"w": Call(exec, "open('PROOF', 'w')")}]}, r"\w+\.exec"),
  "getattr": (Call(getattr, "".__class__, "mro"), r"(__builtin__|builtins)\.getattr"),
  "partial": (Call(__import__("functools").partial, print), r"functools\.partial"),
  "file": (Call(open, "PROOF", "w"), r"(io|_io)\.open"),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name(name, write, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  content, told = HOSTILE[name]
  path = write(tmp_path / "evil.pt", pickle.dumps(content, 2))
  with pytest.raises(UserError, match=rf"evil.pt: refused: it asks for {told}"):
    torch_files.read(path)
  assert not (tmp_path / "PROOF").exists()


# A tuple in a tuple, a million times.
_DEEP = b")" + b"\x85" * 10**6

# Programs that no pickler writes: of allowed names only, or of unusual instructions.
TRICKS = {
  "call inside an allowed class": (
    b"cmodel\ncompose_local\n)\x81}X\x01\x00\x00\x00acposix\nsystem\nX\x02\x00\x00\x00ls\x85Rsb.",
    r"posix\.system",
  ),
  "arguments for an allowed class": (b"cmodel\ncompose_local\nX\x02\x00\x00\x00ls\x85R.", "calls"),
  "attribute of an allowed module": (b"\x80\x04\x8c\x05model\x8c\x09os.system\x93.", "model.os"),
  "module under an allowed prefix": (b"ctimm/../os\nsystem\n.", "timm/../os"),
  "lookalike module": (b"cmodels\nx\n.", r"models\.x"),
  "state for a class": (b"cmodel\nx\n}b.", "__setstate__"),
  "state for a function": (b"ctorch._utils\n_rebuild_parameter\n}b.", "__setstate__"),
  "attributes for a class": (b"cmodel\nx\nN}X\x01\x00\x00\x00aK\x01s\x86b.", "__setstate__"),
  "state for a list": (b"]}X\x01\x00\x00\x00aK\x01sb.", "__dict__"),
  "calls a storage": (b"ctorch\nFloatStorage\n)R.", "not callable"),
  "calls an object": (b"cmodel\nx\n)R)R.", "not callable"),
  "old instance": (b"(iposix\nsystem\n.", r"posix\.system"),
  "object": (b"(cposix\nsystem\no.", r"posix\.system"),
  "extension": (b"\x80\x02\x82\x01.", "instruction"),
  "huge bytearray": (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "only 1 remain"),
  "many instructions": (b"\x80\x04(" + b"\x8f" * 5 * 10**6 + b"t.", "more than 4000000"),
  "huge memo": (b"\x80\x02Nr\xff\xff\xff\xff.", "LONG_BINPUT with index 4294967295"),
  "persistent id": (b"X\x01\x00\x00\x00xQ.", "evil.pt"),
  "tuple as key": (b"}))s.", "SETITEM with a tuple"),
  # What takes forever to hash, or overflows the stack of C, wherever something is hashed.
  "deep key": (b"}" + _DEEP + b"Ns.", "SETITEM with a tuple"),
  "deep key of several": (b"}(K\x01N" + _DEEP + b"Nu.", "SETITEMS with a tuple"),
  "deep key that was kept": (b"}" + _DEEP + b"q\x000h\x00Ns.", "SETITEM with a tuple"),
  "deep key that was doubled": (b"}" + _DEEP + b"20Ns.", "SETITEM with a tuple"),
  "deep key of a dictionary": (b"(" + _DEEP + b"Nd.", "DICT with a tuple"),
  "deep key in a set": (b"\x8f(" + _DEEP + b"\x90.", "ADDITEMS with a tuple"),
  "deep key in a frozen set": (b"(" + _DEEP + b"\x91.", "FROZENSET with a tuple"),
  "set as key": (b"}(\x91Ns.", "SETITEM with a tuple"),
  "deep key of an ordered dictionary": (
    b"ccollections\nOrderedDict\n]]" + _DEEP + b"aNaa\x85R.",
    "key that is no string",
  ),
  "deep persistent id": (_DEEP + b"q\x00(h\x00h\x00h\x00h\x00h\x00tQ.", "persistent id"),
  "deep parameter": (b"}ctorch._utils\n_rebuild_parameter\n" + _DEEP + b"\x85RNs.", "no tensor"),
  "numbers of one hash": (
    b"}("
    + b"".join(
      b"\x8a\x0b" + (k * (2**61 - 1) << 20).to_bytes(11, "little") + b"N" for k in range(1, 9)
    )
    + b"u.",
    "huge number as key",
  ),
  "stops nowhere": (b"\x80\x02}", "evil.pt"),
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_refused(name, tmp_path):
  program, told = TRICKS[name]
  with pytest.raises(UserError, match=told):
    torch_files.read(write_zip(tmp_path / "evil.pt", program))


def test_extensions_that_this_process_knows_are_refused(tmp_path):
  """Python keeps what a code once meant, and asks nobody the second time."""
  copyreg.add_extension("builtins", "print", 1)
  try:
    assert pickle.loads(b"\x80\x02\x82\x01.") is print
    path = write_zip(tmp_path / "evil.pt", b"\x80\x02\x82\x01)R.")
    with pytest.raises(UserError, match="instruction EXT1"):
      torch_files.read(path)
  finally:
    copyreg.remove_extension("builtins", "print", 1)


def saved(tensor) -> tuple[bytes, bytes]:
  """Program and storage of a tensor's file."""
  buffer = io.BytesIO()
  torch.save(tensor, buffer)
  with zipfile.ZipFile(buffer) as archive:
    prefix = archive.namelist()[0].split("/")[0]
    return archive.read(f"{prefix}/data.pkl"), archive.read(f"{prefix}/data/0")


def test_sizes_that_lie_are_refused(tmp_path):
  program, data = saved(torch.arange(8.0).reshape(2, 4))
  path = tmp_path / "evil.pt"
  for storages, told in (
    ([("0", data[:-4])], "claims 32 bytes and holds 28"),
    ([("0", data + data)], "holds 64"),
    ([], "storage '0' is missing"),
  ):
    with pytest.raises(UserError, match=told):
      torch_files.read(write_zip(path, program, storages))
  beyond = program.replace(b"K\x02K\x04\x86", b"K\x03K\x04\x86")
  expanded = program.replace(b"K\x02K\x04\x86", b"K\x7fK\x7f\x86").replace(
    b"K\x04K\x01\x86", b"K\x00K\x00\x86"
  )
  assert len({program, beyond, expanded}) == 3
  for changed in (beyond, expanded):
    with pytest.raises(UserError, match="reaches beyond its storage of 8 elements"):
      torch_files.read(write_zip(path, changed, [("0", data)]))


def test_zip_bombs_are_refused(tmp_path):
  path = write_zip(tmp_path / "bomb.pt", b"N.", [("0", b"\0" * 10**6)], zipfile.ZIP_DEFLATED)
  with pytest.raises(UserError, match="compressed entries"):
    torch_files.read(path)
  # Entries that share their bytes: the directory lists one twice.
  path = write_zip(tmp_path / "overlap.pt", b"N.", [("0", b"\0" * 10**6)])
  with zipfile.ZipFile(path, "a") as archive:
    for key in "12":
      entry = zipfile.ZipInfo(f"archive/data/{key}")
      twin = archive.getinfo("archive/data/0")
      entry.file_size = entry.compress_size = twin.file_size
      entry.header_offset, entry.CRC = twin.header_offset, twin.CRC
      archive.filelist.append(entry)
    archive._didModify = True
  with pytest.raises(UserError, match="claim more bytes"):
    torch_files.read(path)


def test_truncated_files_are_named(tmp_path):
  for legacy in (False, True):
    torch.save(
      {"a": torch.ones(1000)}, tmp_path / "f.pt", _use_new_zipfile_serialization=not legacy
    )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "f.pt").read_bytes()[:-500])
    with pytest.raises(UserError, match="cut.pt"):
      torch_files.read(tmp_path / "cut.pt")


def test_modules_without_end_are_refused():
  module = pickles.Stub()
  module.attributes["_modules"] = {"self": module}
  with pytest.raises(UserError, match="without end"):
    torch_files.state_dict(module)
