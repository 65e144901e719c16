"""`torch.save` files are read as data: what PyTorch wrote, exactly; what does more, not at all."""

import collections
import io
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from crn_jax.convert import pickles
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
  found = pickles.read(tmp_path / "f.pt")
  assert found["n"] == [1, "a", None, 0.5]
  assert found["state"].keys() == content.keys()
  for name, tensor in content.items():
    value = found["state"][name]
    assert value.shape == tensor.shape, name
    assert not value.flags.writeable or not value.size
    np.testing.assert_array_equal(value.astype(np.float64), tensor.detach().double().numpy())


def test_modules_become_stubs_with_the_names_of_their_state_dict(tmp_path):
  module = torch.nn.Sequential(
    torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Sequential(torch.nn.LSTM(4, 2))
  )
  module.register_buffer("transient", torch.ones(1), persistent=False)
  torch.save(module, tmp_path / "m.pt")
  stub = pickles.read(tmp_path / "m.pt")
  assert str(stub.cls) == "torch.nn.modules.container.Sequential"
  found = pickles.state_dict(stub)
  expected = module.state_dict()
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value.numpy())


HOSTILE = {
  "os.system": (Call(__import__("os").system, "touch PROOF"), r"(posix|nt)\.system"),
  "eval": (Call(eval, "open('PROOF', 'w')"), r"(__builtin__|builtins)\.eval"),
  "nested": ({"state_dict": [{"w": Call(exec, "open('PROOF', 'w')")}]}, r"\w+\.exec"),
  "getattr": (Call(getattr, "".__class__, "mro"), r"(__builtin__|builtins)\.getattr"),
  "partial": (Call(__import__("functools").partial, print), r"functools\.partial"),
  "file": (Call(pathlib.PurePosixPath, "x"), r"pathlib\.\w+"),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name(name, write, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  content, told = HOSTILE[name]
  path = write(tmp_path / "evil.pt", pickle.dumps(content, 2))
  with pytest.raises(ValueError, match=rf"evil.pt: refused: it asks for {told}"):
    pickles.read(path)
  assert not (tmp_path / "PROOF").exists()


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
  "state for a class": (b"cmodel\nx\n}b.", "state for"),
  "state for a function": (b"ctorch._utils\n_rebuild_parameter\n}b.", "state for"),
  "calls a storage": (b"ctorch\nFloatStorage\n)R.", r"calls torch\.FloatStorage"),
  "old instance": (b"(iposix\nsystem\n.", "instruction b'i'"),
  "object": (b"(cposix\nsystem\no.", r"posix\.system"),
  "extension": (b"\x80\x02\x82\x01.", "instruction"),
  "huge bytearray": (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "instruction"),
  "persistent id": (b"X\x01\x00\x00\x00xQ.", "evil.pt"),
  "tuple as key": (b"}))s.", "key of type tuple"),
  "stops nowhere": (b"\x80\x02}", "evil.pt"),
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_are_refused(name, tmp_path):
  program, told = TRICKS[name]
  with pytest.raises(ValueError, match=told):
    pickles.read(write_zip(tmp_path / "evil.pt", program))


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
    ([("0", data[:-4])], "claims 8 elements of float32 and holds 28 bytes"),
    ([("0", data + data)], "holds 64 bytes"),
    ([], "storage '0' is missing"),
  ):
    with pytest.raises(ValueError, match=told):
      pickles.read(write_zip(path, program, storages))
  beyond = program.replace(b"K\x02K\x04\x86", b"K\x03K\x04\x86")
  expanded = program.replace(b"K\x02K\x04\x86", b"K\x7fK\x7f\x86").replace(
    b"K\x04K\x01\x86", b"K\x00K\x00\x86"
  )
  assert len({program, beyond, expanded}) == 3
  for changed in (beyond, expanded):
    with pytest.raises(ValueError, match="reaches beyond storage '0' of 8 elements"):
      pickles.read(write_zip(path, changed, [("0", data)]))


def test_zip_bombs_are_refused(tmp_path):
  path = write_zip(tmp_path / "bomb.pt", b"N.", [("0", b"\0" * 10**6)], zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="compressed entries"):
    pickles.read(path)
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
  with pytest.raises(ValueError, match="claim more bytes"):
    pickles.read(path)


def test_truncated_files_are_named(tmp_path):
  for legacy in (False, True):
    torch.save(
      {"a": torch.ones(1000)}, tmp_path / "f.pt", _use_new_zipfile_serialization=not legacy
    )
    (tmp_path / "cut.pt").write_bytes((tmp_path / "f.pt").read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut.pt"):
      pickles.read(tmp_path / "cut.pt")


def test_modules_without_end_are_refused():
  module = pickles.Stub(pickles.Global("model", "x"))
  module.attributes["_modules"] = {"self": module}
  with pytest.raises(ValueError, match="without end"):
    pickles.state_dict(module)
