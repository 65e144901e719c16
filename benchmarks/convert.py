"""Time and memory of converting Swin-L: python benchmarks/convert.py."""

import json
import pathlib
import tempfile
import time

import numpy as np
import safetensors.numpy

from crn_jax.convert import backbone

_KEYS = pathlib.Path(__file__).parents[1] / "tests" / "goldens" / "timm_swin_keys.json"


def main():
  models = json.loads(_KEYS.read_text())["models"]
  shapes = models["swin_large_patch4_window7_224"]["keys"]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model.safetensors"
    _write(path, shapes)
    size = path.stat().st_size
    # A small model first, so that the base holds the libraries.
    small = pathlib.Path(folder) / "small.safetensors"
    safetensors.numpy.save_file({"cls_token": np.zeros(1)}, small)
    try:
      backbone.convert(small, f"{folder}/small")
    except ValueError as error:
      assert "cannot be converted" in str(error)
    _reset_peak()
    base, start = _status("VmRSS"), time.perf_counter()
    backbone.convert(path, f"{folder}/out")
    seconds, peak = time.perf_counter() - start, _status("VmHWM")
  print(f"{size / 1e6:.0f} MB in {seconds:.1f} s, {(peak - base) / 1e6:.0f} MB beyond the base, "
        f"{(peak - base) / size:.2f} times the file")  # fmt: skip


def _write(path, shapes):
  rng = np.random.default_rng(0)
  tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  safetensors.numpy.save_file(tensors, path)


def _reset_peak():
  pathlib.Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
  """Bytes in a field of Linux's /proc/self/status."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))


if __name__ == "__main__":
  main()
