"""Reads .safetensors files with every type of number that ml_dtypes has."""

import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors

from crn_jax.errors import UserError

# safetensors' own reader for NumPy knows neither bfloat16 nor float8.
_DTYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E8M0": ml_dtypes.float8_e8m0fnu, "C64": np.complex64, "BOOL": np.bool_,
  "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
  "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Name -> tensor, mapped from the file and read-only.

  Raises:
    UserError: if the file is damaged, or has tensors of an unknown type; names them.
  """
  try:
    with safetensors.safe_open(path, "np"):
      pass  # The library checks every offset and shape against the file.
  except safetensors.SafetensorError as error:
    raise UserError(f"{path}: not a readable safetensors file ({error}); fetch it again") from error
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
  header.pop("__metadata__", None)
  unknown = [f"{name} ({t['dtype']})" for name, t in header.items() if t["dtype"] not in _DTYPES]
  if unknown:
    raise UserError(f"{path}: tensors of a type that is not known here: {', '.join(unknown[:5])}")
  content = np.memmap(path, np.uint8, "r")[8 + length :]
  return {
    name: np.asarray(content[slice(*tensor["data_offsets"])])
    .view(_DTYPES[tensor["dtype"]])
    .reshape(tensor["shape"])
    for name, tensor in header.items()
  }
